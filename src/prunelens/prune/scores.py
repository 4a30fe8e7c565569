"""Pruning criteria: how much each weight of a matrix is worth. The lowest scores go first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

BLOCK_WEIGHTS = 1 << 19
"""Weights that are scored at a time; bounds the memory, changes no result."""
LOT_BITS = 30
"""Of a lot; as a float32's bits it is below those of infinity."""
_GAMMA, _FIRST_FACTOR, _SECOND_FACTOR = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
NARROW = {torch.bfloat16, torch.float16}
"""What is ordered by its own bits, if all matrices have it; others are scored in float32."""
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


def lots(
    seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu"
) -> Int32[Tensor, " count"]:
    """Uniform numbers in [0, 2^30) for some weights of a matrix (methods §3, `random`).

    Each depends on seed, matrix and flat index alone (SplitMix64, Steele et al. 2014, at that
    index), so it is the same on every device and however the weights are shared out.

    Args:
        seed: of the pruning.
        name: the matrix; its own seed is the first eight bytes of a SHA-256 of seed and name.
        start: flat index of the first weight.
        count: how many weights.
        device: where to work.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    own = int.from_bytes(digest[:8], "little", signed=True)
    steps = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    state = steps * _GAMMA + own
    state = (state ^ _shifted(state, 30)) * _FIRST_FACTOR
    state = (state ^ _shifted(state, 27)) * _SECOND_FACTOR
    return _shifted(state ^ _shifted(state, 31), 64 - LOT_BITS).int()


def _shifted(state: Int[Tensor, " count"], bits: int) -> Int[Tensor, " count"]:
    """To the right without its sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


class Scored(NamedTuple):
    """A matrix and how its weights are scored, a block of rows at a time.

    A score is not negative, so its bit pattern, read as an integer (its *key*), has its order.
    """

    weight: Float[Tensor, "output input"]
    """Rows are outputs."""
    input_norm: Float[Tensor, " input"] | None
    """For `wanda`; None for the others."""
    dtype: torch.dtype
    """Of the scores: float32, or that of 16-bit weights whose magnitude needs no rounding."""
    lot: tuple[int, str] | None = None
    """Seed and name for `random`, where the weights' values do not matter."""
    num_zero_inputs: int = 0
    """Inputs that calibration reached and that were always 0."""

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
        if self.lot is not None:
            start = rows.start * weight.shape[1]
            return lots(*self.lot, start, weight.numel(), weight.device).view(weight.shape)
        if self.input_norm is not None:
            return wanda(weight, self.input_norm).contiguous().view(torch.int32)
        integers = INTEGERS[self.dtype.itemsize]
        bits = weight.to(self.dtype).contiguous().view(integers)
        return bits & torch.iinfo(integers).max  # without its sign
