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
from prunelens.prune.compare import (
    MatrixDifference,
    WeightComparison,
    check_takes_place,
    compare_weights,
)
from prunelens.prune.masks import PackedMasks, keep_masks, load_masks, masks_sha256, save_masks
from prunelens.prune.record import ModelRecord, PerplexityRecord, PruningRecord, TextRecord
from prunelens.prune.scores import lots
from prunelens.prune.stored import apply_pruning, save_pruning

__all__ = [
    "MatrixDifference",
    "MatrixSparsity",
    "ModelRecord",
    "PackedMasks",
    "PerplexityRecord",
    "Pruned",
    "PruningRecord",
    "TextRecord",
    "WeightComparison",
    "apply_masks",
    "apply_pruning",
    "as_matrix",
    "check_takes_place",
    "compare_weights",
    "input_norms",
    "keep_masks",
    "load_masks",
    "lots",
    "masks_sha256",
    "prunable_matrices",
    "prune_model",
    "save_checkpoint",
    "save_masks",
    "save_pruning",
]
