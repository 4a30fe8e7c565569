"""What the command line does outside a study: prune a checkpoint, try an SAE."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from prunelens.analyses.transfer import DenseReference, Transfer, transfer, transfer_verdicts
from prunelens.cards import Sharing
from prunelens.checkpoint import model_folder, stored_dtype
from prunelens.config import (
    CorpusConfig,
    ModelConfig,
    PretrainedSaeConfig,
    PruningConfig,
    TransferConfig,
    part_from_data,
)
from prunelens.corpus import TokenSplits, split_documents, split_tokens, windows
from prunelens.errors import UserError
from prunelens.model import LanguageModel, described_model, load_model, model_fingerprint
from prunelens.prune.apply import Pruned, check_prunable, prune_model
from prunelens.prune.calibrate import input_norms
from prunelens.prune.checkpoint import (
    check_target,
    save_beside_weights,
    save_checkpoint,
    writing_checkpoint,
)
from prunelens.prune.masks import masks_sha256
from prunelens.prune.on_disk import NotOnDiskError, copy_to_disk
from prunelens.prune.record import ModelRecord, PruningRecord, TextRecord
from prunelens.sae.exchange.formats import check_fits
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.study.finished import sae_place
from prunelens.study.model_stages import EVAL
from prunelens.study.run import resolve_device
from prunelens.text import fingerprint

log = logging.getLogger(__name__)


def prune_checkpoint(
    model: ModelConfig,
    pruning: PruningConfig,
    corpus: CorpusConfig,
    out: pathlib.Path,
    device: str,
    *,
    sharing: Sharing | None = None,
    block_by_block: bool = False,
) -> Pruned:
    """Prune a model and save it as a Hugging Face checkpoint with its card and masks.

    The files have the dtype that `model` was given, else the checkpoint's own, whatever it runs in.
    Criteria that need no calibration prune the new files where they lie, and with `block_by_block`
    the others do, too; else the model is loaded as a whole. The result is the same.
    Raises: UserError for a wrong model or text, as `check_target`, or where a model cannot be
        pruned block by block and was to be.
    """
    check_target(out)
    device = resolve_device(device)
    check_prunable(described_model(model), pruning)  # in seconds, before anything is read
    if block_by_block or not pruning.is_calibrated:
        try:
            return _pruned_on_disk(model, pruning, corpus, out, device, sharing)
        except NotOnDiskError as error:
            if block_by_block:
                raise
            log.warning("%s: the whole model is loaded, as %s", model.label, error.reason)
    lm = load_model(model, device=device)
    own = None if _is_given_dtype(model) else stored_dtype(model_folder(model))
    pruned, record = _pruned_and_told(lm, model, pruning, corpus, rounded_to=own)
    save_checkpoint(lm, out, record=record, masks=pruned.masks, sharing=sharing, dtype=own)
    return pruned


def _is_given_dtype(model: ModelConfig) -> bool:
    """Whether the user chose one; a default says nothing of the files."""
    return "dtype" in model.model_fields_set


def _pruned_on_disk(
    model: ModelConfig,
    pruning: PruningConfig,
    corpus: CorpusConfig,
    out: pathlib.Path,
    device: str,
    sharing: Sharing | None,
) -> Pruned:
    """Copy the weights, then prune the copy."""
    with writing_checkpoint(out) as partial:
        keep_narrow = not _is_given_dtype(model)
        lm = copy_to_disk(model, partial, device=device, keep_narrow=keep_narrow)
        log.info("%s: pruned on disk, the model is not loaded", lm.label)
        pruned, record = _pruned_and_told(lm, model, pruning, corpus)
        save_beside_weights(lm, partial, record=record, masks=pruned.masks, sharing=sharing)
    return pruned


def _pruned_and_told(
    lm: LanguageModel,
    model: ModelConfig,
    pruning: PruningConfig,
    corpus: CorpusConfig,
    *,
    rounded_to: torch.dtype | None = None,
) -> tuple[Pruned, PruningRecord]:
    """Prune in place; what was done, and how it is told."""
    splits, text = None, None
    if pruning.is_calibrated:
        splits = split_tokens(corpus, lm.tokenizer, only=("calibration",))
        text = TextRecord(corpus, fingerprint(corpus))
    pruned = _pruned(
        lm, pruning, splits, corpus.context_tokens, with_masks=True, rounded_to=rounded_to
    )
    record = PruningRecord(
        model=ModelRecord.of(model, model_fingerprint(model)),
        pruning=pruning,
        matrices=pruned.report,
        masks_sha256=masks_sha256(pruned.masks),
        calibration=text,
    )
    return pruned, record


def transfer_sae(
    sae: str,
    model: ModelConfig,
    corpus: CorpusConfig,
    *,
    layer: int | None,
    pruning: PruningConfig | None = None,
    pruned: str | None = None,
    sizes: TransferConfig | None = None,
    device: str = "auto",
    progress: Callable[[float], None] | None = None,
) -> pd.DataFrame:
    """Try an SAE of the dense model on a pruned one (methods §7, RQ3).

    Args:
        sae: a folder that prunelens or SAELens saved, `release:sae_id` as SAELens knows it, or a
            name as `sae_place` takes it.
        model: the dense model, and the site.
        corpus: text: measured on eval, refitted on train, calibrated (Wanda) on calibration.
        layer: the decoder block that the SAE is for; None: as the SAE's own files say.
        pruning: how to prune the model; or
        pruned: a compressed checkpoint (folder or hub id) to try instead.
        sizes: how much text; None: the defaults.
        device: `auto`, `cpu`, `cuda`, …
        progress: told the share that is done, 0 to 1.
    Returns: condition (dense, then the pruned one) and the columns of `transfer`; verdicts by
        TRANSFER_RULE on the rows of the pruned model. Without the null, which needs a study.
    Raises: UserError where SAE, model or text are wrong, the SAE does not fit the model, its
        dense L0 is not the nominal one, or no layer is known.
    """
    if (pruning is None) == (pruned is None):
        raise UserError("--pruned: give either a pruned checkpoint or how to prune")
    device, sizes = resolve_device(device), sizes or TransferConfig()
    given = load_given_sae(_named(sae), device=device)
    layer = given.layer if layer is None else layer
    if layer is None:
        raise UserError(f"--layer: the files of {sae!r} do not say which layer it is for; give it")
    lm = load_model(model, device=device)
    check_fits(given, lm.label, d_model=lm.d_model, site=model.site, layer=layer)
    splits = _text_for_transfer(lm, corpus, pruning, sizes)
    width = corpus.context_tokens

    def measure(lm: LanguageModel, dense: DenseReference | None, before: float) -> Transfer:
        return transfer(
            lm,
            [given],
            torch.cat([_cut(splits, name, width) for name in EVAL]),
            _cut(splits, "train", width),
            split_documents(splits, width, *EVAL),
            site=model.site,
            layer=layer,
            dense=dense,
            ce_windows=max(1, sizes.ce_tokens // width),
            progress=progress and (lambda share: progress(before + share / 2)),
        )

    unpruned = measure(lm, None, 0.0)
    for note in unpruned.notes:
        log.warning(note)
    if pruning is not None:
        _pruned(lm, pruning, splits, width)
    else:
        del lm
        lm = load_model(model.model_copy(update={"name": pruned, "revision": None}), device=device)
    rows = transfer_verdicts(measure(lm, unpruned.reference, 0.5).rows)
    label = pruned if pruning is None else pruning.label
    parts = (("dense", unpruned.rows), (label, rows))
    tables = [table.assign(condition=name) for name, table in parts]
    result = pd.concat(tables, ignore_index=True)
    return result[["condition", *unpruned.rows.columns]]


def _text_for_transfer(
    lm: LanguageModel, corpus: CorpusConfig, pruning: PruningConfig | None, sizes: TransferConfig
) -> TokenSplits:
    """Of train only what is refitted on, calibration only where the criterion asks for it."""
    least = max(sizes.refit_tokens, corpus.context_tokens)
    corpus = corpus.model_copy(update={"train_tokens": min(corpus.train_tokens, least)})
    only = ["train", *EVAL]
    if pruning is not None and pruning.is_calibrated:
        only.append("calibration")
    return split_tokens(corpus, lm.tokenizer, only=only, even=only)


def _named(sae: str) -> PretrainedSaeConfig:
    """A folder or `release:sae_id`; the layer, which loading does not look at, is left at 0."""
    if (folder := sae_place(sae).expanduser()).is_dir():
        return part_from_data(PretrainedSaeConfig, {"layer": 0, "folder": str(folder)})
    release, separator, sae_id = sae.partition(":")
    if not separator or not release or not sae_id:
        raise UserError(f"SAE: {sae!r} is neither a folder nor release:sae_id; give one of them")
    fields = {"layer": 0, "release": release, "sae_id": sae_id}
    return part_from_data(PretrainedSaeConfig, fields)


def _pruned(
    lm: LanguageModel,
    pruning: PruningConfig,
    splits: TokenSplits | None,
    width: int,
    *,
    with_masks: bool = False,
    rounded_to: torch.dtype | None = None,
) -> Pruned:
    """Prune in place, calibrated on the splits where the criterion asks for it."""
    norms, tokens = None, None
    if pruning.is_calibrated:
        assert splits
        tokens = _cut(splits, "calibration", width)
        if pruning.calibration == "dense":
            norms, tokens = input_norms(lm, tokens), None
    return prune_model(
        lm,
        pruning,
        calibration=tokens,
        input_norms=norms,
        with_masks=with_masks,
        rounded_to=rounded_to,
    )


def _cut(splits: TokenSplits, name: str, width: int) -> Tensor:
    return windows(getattr(splits, name), width, splits.bos_token)
