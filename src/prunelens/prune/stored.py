"""A pruning on disk, from which the pruned model is made again bit for bit.

`masks.safetensors` says what stays. Where the criterion changed what stays as well (SparseGPT),
`weights-00000.safetensors` and so on hold, for each decoder block, every matrix's remaining weights
by rising flat index: at half the weights, half the size. `prune.json` has SHA-256 sums of both.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.prune.apply import Pruned, apply_masks
from prunelens.prune.masks import PackedMasks, load_masks, masks_sha256, save_masks
from prunelens.prune.matrices import as_matrix, prunable_matrices

MASKS, FACTS = "masks.safetensors", "prune.json"


def save_pruning(lm: LanguageModel, pruned: Pruned, folder: pathlib.Path) -> None:
    """Write what `apply_pruning` needs.

    Args:
        lm: the pruned model; read where its remaining weights were changed.
        pruned: what `prune_model` gave for it, with masks.
        folder: it is there already.
    """
    save_masks(pruned.masks, folder / MASKS)
    facts = {
        "achieved_sparsity": pruned.achieved_sparsity,
        "masks_sha256": masks_sha256(pruned.masks),
        "weights_sha256": _save_weights(lm, pruned.masks, folder) if pruned.updates_weights else "",
    }
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@torch.no_grad()
def apply_pruning(lm: LanguageModel, folder: pathlib.Path) -> PackedMasks:
    """Give the dense model `lm`, in place, the weights that `save_pruning` saw; returns the masks.

    Raises: UserError where a file is missing or is not what was written, or where the pruning is of
        another model or dtype; `lm` may be half changed by then.
    """
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    masks = load_masks(folder / MASKS)
    # Studies pruned before the sums were kept have none; their store has one of every file.
    if facts.get("masks_sha256") not in (None, masks_sha256(masks)):
        raise _damaged(folder, MASKS)
    apply_masks(lm, masks)
    if expected := facts.get("weights_sha256"):
        _load_weights(lm, masks, folder, expected)
    return masks


def _save_weights(lm: LanguageModel, masks: PackedMasks, folder: pathlib.Path) -> str:
    """Write the remaining weights, one file per block; returns their SHA-256."""
    digest = hashlib.sha256()
    for number, names in enumerate(_by_block(lm)):
        left = {}
        for name in names:
            weight = as_matrix(lm.model.get_submodule(name))
            left[name] = weight[masks[name].to(weight.device)].cpu()
            _add(digest, name, left[name])
        safetensors.torch.save_file(left, folder / _file(number))
    return digest.hexdigest()


def _load_weights(
    lm: LanguageModel, masks: PackedMasks, folder: pathlib.Path, expected: str
) -> None:
    digest = hashlib.sha256()
    for number, names in enumerate(_by_block(lm)):
        try:
            left = safetensors.torch.load_file(folder / _file(number))
        except (OSError, safetensors.SafetensorError):
            raise _damaged(folder, _file(number)) from None
        for name in names:
            mask, weight = masks[name], as_matrix(lm.model.get_submodule(name))
            values = left.get(name)
            if values is None or len(values) != int(mask.count_nonzero()):
                raise _damaged(folder, _file(number))
            if values.dtype != weight.dtype:
                raise UserError(
                    f"pruning: the weights in {str(folder)!r} are {values.dtype}, the model's"
                    f" {weight.dtype}; load the model as it was pruned"
                )
            _add(digest, name, values)
            weight[mask.to(weight.device)] = values.to(weight.device)
    if digest.hexdigest() != expected:
        raise _damaged(folder, "weights")


def _by_block(lm: LanguageModel) -> list[list[str]]:
    """The prunable matrices of every block, by name."""
    matrices = {id(module): name for name, module in prunable_matrices(lm).items()}
    return [
        sorted(matrices[id(module)] for module in block.modules() if id(module) in matrices)
        for block in lm.blocks
    ]


def _file(number: int) -> str:
    return f"weights-{number:05d}.safetensors"


def _add(digest: Any, name: str, values: Tensor) -> None:
    """Name, dtype, then the bytes of some weights."""
    digest.update(f"{name}\0{values.dtype}\0".encode())
    digest.update(values.view(torch.uint8).numpy().data)


def _damaged(folder: pathlib.Path, what: str) -> UserError:
    return UserError(
        f"pruning: {what} in {str(folder)!r} is not what was written; prune the model again"
    )
