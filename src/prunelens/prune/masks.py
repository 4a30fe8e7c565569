"""From scores to masks: exactly floor(sparsity * n) weights of every scope group go.

Scores are float32 and not negative, so their bit patterns, read as integers, have their order.
One threshold over many matrices is therefore found by counting bit patterns, without sorting or
joining the matrices.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch
from jaxtyping import Bool, Float32, Int, Int64
from torch import Tensor

from prunelens.errors import UserError

FORMAT = "prunelens-masks-1"
BLOCK_WEIGHTS = 1 << 22
"""Weights that are ranked at a time under scope `row`; bounds the memory, changes no result."""
LOW_BITS = 15
"""A bit pattern of 31 bits is counted as 16 high bits, then 15 low ones."""


def keep_masks(
    scores: Mapping[str, Float32[Tensor, "_output _input"]],
    *,
    scope: Literal["global", "matrix", "row"],
    sparsity: Fraction,
) -> dict[str, Bool[Tensor, "_output _input"]]:
    """Which weights stay (True), by matrix, on the scores' devices (methods §3).

    Exactly floor(sparsity * n) weights of every scope group go, those of the lowest score; among
    equal scores the lowest flat index goes first, and an earlier matrix before a later one.

    Args:
        scores: by matrix, not negative, in `named_modules` order. Each is looked up one to three
            times and none is held, so a mapping that computes scores on look-up saves memory.
        scope: the weights that compete: `global` all, `matrix` those of one, `row` of one row.
        sparsity: in [0, 1], exact.
    Raises: UserError where a score is NaN or infinite; it names the matrix.
    """
    if scope == "global":
        return _joint_masks(scores, sparsity)
    return {name: _own_mask(_checked(name, scores[name]), scope, sparsity) for name in scores}


def save_masks(masks: Mapping[str, Bool[Tensor, "_output _input"]], path: pathlib.Path) -> None:
    """Write masks as safetensors, one bit per weight (row by row, high bit first), atomically."""
    packed = {name: np.packbits(mask.cpu().numpy().reshape(-1)) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes)}
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(packed, partial, metadata=metadata)
    partial.replace(path)


def load_masks(path: pathlib.Path) -> dict[str, Bool[Tensor, "_output _input"]]:
    """The masks that `save_masks` wrote, in the same order.

    Raises: UserError where the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"masks: no file {str(path)!r}; give one that `save_masks` wrote")
    masks = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"masks: {str(path)!r} holds no masks ({FORMAT})")
            for name, shape in json.loads(metadata["shapes"]).items():
                bits = np.unpackbits(file.get_tensor(name), count=math.prod(shape))
                masks[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
    except safetensors.SafetensorError as error:
        raise UserError(f"masks: {str(path)!r} is no safetensors file ({error})") from None
    return masks


class _Rank(NamedTuple):
    """Where the r-th lowest value (counted from 1) lies in a histogram."""

    bin: int
    """The bin that holds it."""
    remaining: int
    """Its rank among the values of that bin."""


def _joint_masks(scores: Mapping[str, Tensor], sparsity: Fraction) -> dict[str, Tensor]:
    """Masks of matrices that compete with each other under one threshold."""
    high = _histogram(_bits(_checked(name, scores[name])) >> LOW_BITS for name in scores)
    num_dropped = math.floor(sparsity * int(high.sum()))
    top = _locate(high, num_dropped)
    low = _histogram(_low_bits(scores[name], top.bin) for name in scores)
    bottom = _locate(low, top.remaining)
    threshold = (top.bin << LOW_BITS) | bottom.bin
    ties_left = bottom.remaining
    masks = {}
    for name in scores:
        matrix = scores[name]
        bits = _bits(matrix)
        keep = bits >= threshold
        if ties_left:
            dropped = (bits == threshold).nonzero().flatten()[:ties_left]
            keep[dropped] = False
            ties_left -= len(dropped)
        masks[name] = keep.reshape(matrix.shape)
    return masks


def _histogram(pieces: Iterable[Int[Tensor, " _weights"]]) -> Int64[np.ndarray, " bins"]:
    """How often each 16-bit value occurs, over all pieces."""
    total = np.zeros(1 << 16, dtype=np.int64)
    for piece in pieces:
        total += torch.bincount(piece, minlength=1 << 16).cpu().numpy()
    return total


def _low_bits(matrix: Tensor, high_bin: int) -> Int[Tensor, " _weights"]:
    """The low bits of the scores whose high bits are `high_bin`."""
    bits = _bits(matrix)
    return bits[(bits >> LOW_BITS) == high_bin] & ((1 << LOW_BITS) - 1)


def _locate(histogram: Int64[np.ndarray, " bins"], rank: int) -> _Rank:
    """The bin of the value of that rank; rank 0 lies in bin 0 with nothing remaining."""
    cumulated = histogram.cumsum()
    found = int(np.searchsorted(cumulated, rank))
    return _Rank(found, rank - int(cumulated[found] - histogram[found]))


def _own_mask(scores: Tensor, scope: Literal["matrix", "row"], sparsity: Fraction) -> Tensor:
    """The mask of a matrix that competes with no other."""
    if scope == "row":
        return _row_masks(scores, sparsity)
    return _row_masks(scores.reshape(1, -1), sparsity).reshape(scores.shape)


def _row_masks(scores: Float32[Tensor, "output input"], sparsity: Fraction) -> Tensor:
    """Every row on its own, in blocks of rows."""
    num_rows, num_columns = scores.shape
    num_dropped = math.floor(sparsity * num_columns)
    keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if num_dropped == 0:
        return keep
    block_rows = max(1, BLOCK_WEIGHTS // num_columns)
    for start in range(0, num_rows, block_rows):
        block = scores[start : start + block_rows]
        threshold = block.kthvalue(num_dropped, dim=1, keepdim=True).values
        below = block < threshold
        ties = block == threshold
        ties_left = num_dropped - below.sum(1, keepdim=True)
        early = ties.cumsum(1, dtype=torch.int32) <= ties_left
        keep[start : start + block_rows] = ~(below | (ties & early))
    return keep


def _bits(scores: Tensor) -> Int[Tensor, " weights"]:
    """The scores' bit patterns as integers of the same order, row by row."""
    return scores.contiguous().view(torch.int32).flatten()


def _checked(name: str, scores: Tensor) -> Tensor:
    """The scores themselves, if they are finite (UserError) and not negative (our bug)."""
    assert scores.dtype == torch.float32 and scores.ndim == 2, (name, scores.dtype, scores.shape)
    if not bool(scores.isfinite().all()):
        raise UserError(
            f"pruning: scores of {name} are NaN or infinite, so its weights or its calibration"
            " inputs are; load the model in bfloat16 or float32, or mend the checkpoint"
        )
    assert scores.numel() == 0 or int(_bits(scores).min()) >= 0, f"negative scores in {name}"
    return scores
