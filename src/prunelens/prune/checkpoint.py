"""A model as a Hugging Face checkpoint on disk, with a card that says how it was pruned."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from prunelens import tensor_files
from prunelens.cards import CARD_FILE, RECORD_FILE, Sharing, version
from prunelens.checkpoint import without_progress_bars
from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.offload import any_offloaded
from prunelens.prune.card import checkpoint_card
from prunelens.prune.masks import MASKS_FILE, masks_sha256, save_masks
from prunelens.prune.record import PruningRecord
from prunelens.temporary import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def save_checkpoint(
    lm: LanguageModel,
    folder: pathlib.Path,
    *,
    record: PruningRecord | None = None,
    masks: Mapping[str, Bool[Tensor, "_output _input"]] | None = None,
    sharing: Sharing | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model (safetensors) and tokenizer so that `AutoModelForCausalLM` loads them.

    They are written beside `folder`, flushed to disk and renamed, so `folder` is whole or not
    there. Zeroed weights are stored as zeros: the files are as large as the dense model's. A model
    that was loaded from several files is written to several, of the largest one's size at most.

    Args:
        lm: the model, pruned already.
        folder: a new or an empty one.
        record: how it was pruned. With it the folder also gets a model card (README.md), the same
            facts for programs (prunelens.json) and the masks (prune_masks.safetensors).
        masks: those of `record`; given with it and only with it.
        sharing: license and repository, for the card.
        dtype: what the files are to hold, and `lm` from then on; where that is not the model's own
            and would change a number, the model's is kept, which is told.
    Raises: UserError as `check_target`.
    """
    with writing_checkpoint(folder) as partial:
        if dtype is not None and dtype != lm.model.dtype:
            _narrow(lm, dtype)
        with without_progress_bars():
            lm.model.save_pretrained(
                partial,
                state_dict=_written_once(lm.model),
                max_shard_size=_shard_bytes(lm.model),
            )
        save_beside_weights(lm, partial, record=record, masks=masks, sharing=sharing)


def _written_once(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state without second names of tied weights; None where transformers sees to that itself.

    Those that are offloaded it writes twice, or refuses where both names have one storage.
    """
    if not any_offloaded(model):
        return None
    state, ties = model.state_dict(), model.all_tied_weights_keys
    return {name: tensor for name, tensor in state.items() if name not in ties}


def _narrow(lm: LanguageModel, dtype: torch.dtype) -> None:
    """Have the model in `dtype` if all its numbers are numbers of that."""
    parameters = list(lm.model.parameters())
    if not any_offloaded(lm.model) and all(
        dtype.itemsize < weight.dtype.itemsize and torch.equal(weight.to(dtype).to(weight), weight)
        for weight in parameters
    ):
        for weight in parameters:
            weight.data = weight.to(dtype)
        return
    log.warning(
        "%s: saved in %s, which it ran in; in %s, as its dense files are, it would be another",
        *(lm.label, lm.model.dtype, dtype),
    )


def _shard_bytes(model: PreTrainedModel) -> int | str:
    """The most bytes of a file: as many numbers as in the largest of those that it was loaded from.

    What was one file stays one; a model from elsewhere is written as transformers does.
    """
    source = model.name_or_path
    files = list(pathlib.Path(source).glob("model*.safetensors")) if source else []
    if len(files) < 2:
        return sys.maxsize if files else "50GB"
    held = (tensor_files.layout(file).values() for file in files)
    most = max(sum(math.prod(place.shape) for place in places) for places in held)
    return most * model.dtype.itemsize


@contextlib.contextmanager
def writing_checkpoint(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes `folder` once all is written, or is gone.

    Raises: UserError as `check_target`.
    """
    check_target(folder)
    with new_folder(folder) as partial:
        yield partial


def save_beside_weights(
    lm: LanguageModel,
    folder: pathlib.Path,
    *,
    record: PruningRecord | None,
    masks: Mapping[str, Bool[Tensor, "_output _input"]] | None,
    sharing: Sharing | None,
) -> None:
    """All of a checkpoint but config and weights: tokenizer, and what is known of its pruning."""
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
    if record is None:
        return
    assert masks is not None and masks_sha256(masks) == record.masks_sha256
    save_masks(masks, folder / MASKS_FILE)
    card = checkpoint_card(record, sharing or Sharing())
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    facts = {"kind": "pruned checkpoint", "prunelens": version(), **record.as_json()}
    (folder / RECORD_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check_target(folder: pathlib.Path) -> None:
    """Make room for `folder`, whose place what is written beside it takes.

    Raises: UserError where it is not empty, a symbolic link or a mount point, where the caller
        stands in it, or where it cannot be written.
    """
    where = folder.resolve()
    taken = None
    if folder.is_symlink():
        taken = f"is a symbolic link to {str(where)!r}"
    elif where.exists() and (not where.is_dir() or any(where.iterdir())):
        taken = "exists and is not an empty folder"
    elif os.path.ismount(where):
        taken = "is a mount point, which nothing can take the place of"
    elif where == pathlib.Path.cwd():
        taken = "is the folder that you are in, and would be replaced"
    if taken:
        raise UserError(f"out: {str(folder)!r} {taken}; name a new one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        why = f"cannot write to {str(folder)!r} ({error.strerror})"
        raise UserError(f"out: {why}; name a folder that you can write to") from None
