"""Pruning criteria: how much each weight of a matrix is worth. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

BLOCK_WEIGHTS = 1 << 19
"""Weights that are scored at a time; bounds the memory, changes no result."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes, what has the bits of a floating-point number."""


def magnitude(weight: Float[Tensor, "output input"]) -> Float32[Tensor, "output input"]:
    """|W| (methods §3)."""
    return weight.abs().float()


def wanda(
    weight: Float[Tensor, "output input"], input_norm: Float[Tensor, " input"]
) -> Float32[Tensor, "output input"]:
    """|W_ij| * ||X_j||_2 (methods §3; Sun et al. 2023), the product rounded to float32.

    Args:
        weight: rows are outputs.
        input_norm: the Euclidean norm of each input over all calibration tokens, not divided by
            their number (which would change no order).
    """
    return weight.abs().float() * input_norm.to(weight.device).float()


class Scored(NamedTuple):
    """A matrix and how its weights are scored, a block of rows at a time.

    A score is not negative, so its bit pattern, read as an integer (its *key*), has its order.
    """

    weight: Float[Tensor, "output input"]
    """Rows are outputs."""
    input_norm: Float[Tensor, " input"] | None
    """For `wanda`; None for `magnitude`."""
    dtype: torch.dtype
    """Of the scores: float32, or that of 16-bit weights whose magnitude needs no rounding."""

    @property
    def infinity(self) -> int:
        """The key of infinity; those of NaN lie above."""
        return int(torch.tensor(torch.inf, dtype=self.dtype).view(INTEGERS[self.dtype.itemsize]))

    def blocks(self) -> Iterator[slice]:
        """Rows by the dozen: a multiple of eight, so that a block's mask fills whole bytes."""
        num_rows, num_columns = self.weight.shape
        step = 8 * max(1, BLOCK_WEIGHTS // (8 * max(1, num_columns)))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def keys(self, rows: slice) -> Int[Tensor, "rows input"]:
        """The keys of some rows."""
        weight = self.weight[rows]
        if self.input_norm is not None:
            return wanda(weight, self.input_norm).contiguous().view(torch.int32)
        integers = INTEGERS[self.dtype.itemsize]
        bits = weight.to(self.dtype).contiguous().view(integers)
        return bits & torch.iinfo(integers).max  # without its sign
