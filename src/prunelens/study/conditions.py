"""The model of a pruned condition: made by the stage `prune`, made again by each later one."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from prunelens.config import ModelConfig, PruningConfig
from prunelens.errors import UserError
from prunelens.model import LanguageModel, load_model, load_tokenizer
from prunelens.prune.apply import prune_model
from prunelens.prune.compare import check_takes_place, compare_weights
from prunelens.prune.stored import FACTS, apply_pruning, save_pruning
from prunelens.study.artifacts.store import Source
from prunelens.study.work import Work, write_json


def make_condition(work: Work, calibration: Tensor | None) -> None:
    """Prune the model, or compare the checkpoint that takes its place with it."""
    source = work.stage.source
    assert source
    if source.checkpoint is not None:
        _compare(work, source.model, source.checkpoint)
        return
    pruning = PruningConfig.model_validate(work.config["pruning"])
    lm = load_model(source.model, device=work.device)
    norms = None
    if "calibration" in work.parents:
        norms = load_file(work.parents["calibration"] / "norms.safetensors")
    progress = None if calibration is None else work.share(len(calibration))
    pruned = prune_model(lm, pruning, calibration=calibration, input_norms=norms, progress=progress)
    pd.DataFrame(pruned.report).to_parquet(work.out / "matrices.parquet")
    save_pruning(lm, pruned, work.out)


def load_condition(source: Source, folder: pathlib.Path, *, device: str) -> LanguageModel:
    """The model that `make_condition` made or compared, with the dense model's tokenizer.

    Args:
        source: of the stage `prune`.
        folder: its artifact, verified.
        device: where to put it.
    Raises: UserError as `load_model` and `apply_pruning`.
    """
    if source.checkpoint is None:
        lm = load_model(source.model, device=device)
        apply_pruning(lm, folder)
        return lm
    with _named_as_checkpoint():
        lm = load_model(source.checkpoint, device=device)
    return dataclasses.replace(lm, tokenizer=load_tokenizer(source.model))


def _compare(work: Work, model: ModelConfig, checkpoint: ModelConfig) -> None:
    """Both models are in memory: the dense one in the machine's, the other on the device."""
    with _named_as_checkpoint():
        other = load_model(checkpoint, device=work.device)
    dense = load_model(model)
    check_takes_place(dense, other)
    compared = compare_weights(dense, other)
    pd.DataFrame(compared.matrices).to_parquet(work.out / "matrices.parquet")
    write_json(work.out / FACTS, compared.as_json())


@contextlib.contextmanager
def _named_as_checkpoint() -> Iterator[None]:
    """What is wrong with the checkpoint is not told as of the model."""
    try:
        yield
    except UserError as error:
        message = str(error).replace("models.name", "prunings.checkpoint", 1)
        raise UserError(message) from None
