"""Pruning: a criterion scores weights, a scope and a sparsity say which go, a model loses them."""

from prunelens.prune.apply import (
    MatrixSparsity,
    Pruned,
    apply_masks,
    as_matrix,
    prunable_matrices,
    prune_model,
)
from prunelens.prune.calibrate import input_norms
from prunelens.prune.checkpoint import save_checkpoint
from prunelens.prune.masks import PackedMasks, keep_masks, load_masks, masks_sha256, save_masks
from prunelens.prune.record import ModelRecord, PerplexityRecord, PruningRecord, TextRecord
from prunelens.prune.scores import magnitude, wanda

__all__ = [
    "MatrixSparsity",
    "ModelRecord",
    "PackedMasks",
    "PerplexityRecord",
    "Pruned",
    "PruningRecord",
    "TextRecord",
    "apply_masks",
    "as_matrix",
    "input_norms",
    "keep_masks",
    "load_masks",
    "magnitude",
    "masks_sha256",
    "prunable_matrices",
    "prune_model",
    "save_checkpoint",
    "save_masks",
    "wanda",
]
