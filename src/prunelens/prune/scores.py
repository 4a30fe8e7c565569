"""The scores of a matrix as integers in their order, and numbers drawn by lot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

from prunelens.criteria import CRITERIA, Criterion
from prunelens.errors import UserError

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
    dtype: torch.dtype = torch.float32
    """Of the scores: float32, or that of 16-bit weights whose scores need no rounding."""
    criterion: Criterion = CRITERIA["magnitude"]
    """What the scores are of."""
    norms: Float[Tensor, " input"] | None = None
    """If it needs them."""
    lot: tuple[int, str] | None = None
    """Seed and name, if it needs lots."""
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

    def scores(self, rows: slice) -> Float[Tensor, "rows input"]:
        """The scores of some rows, as the criterion gives them."""
        weight = self.weight[rows]
        known = weight if self.norms is None else self._norms()
        if self.lot is not None:
            start = rows.start * weight.shape[1]
            drawn = lots(*self.lot, start, weight.numel(), weight.device)
            known = drawn.view(torch.float32).view(weight.shape)
        assert self.criterion.score
        return self.criterion.score(weight, known)

    def are_surely_finite(self) -> bool:
        """Whether the largest weight, norm and lot tell that all scores are finite."""
        if not (self.criterion.rises and self.weight.numel()):
            return not self.weight.numel()
        largest = torch.stack(self.weight.aminmax()).abs().amax()
        known = largest if self.norms is None else self._norms().amax()
        if self.lot is not None:
            known = torch.tensor((1 << LOT_BITS) - 1, dtype=torch.int32).view(torch.float32)
        assert self.criterion.score
        return bool(self.criterion.score(largest, known).isfinite())

    def keys(self, rows: slice) -> Int[Tensor, "rows input"]:
        """The keys of some rows."""
        integers = INTEGERS[self.dtype.itemsize]
        scores = self.scores(rows).to(self.dtype).contiguous()
        if not self.criterion.rises and bool((scores < 0).any()):
            raise UserError(f"criterion: a score of {self.criterion.name!r} is negative; mend it")
        bits = scores.view(integers)
        return bits & torch.iinfo(integers).max  # without the sign of 0 and NaN

    def _norms(self) -> Float32[Tensor, " input"]:
        assert self.norms is not None
        return self.norms.to(self.weight.device).float()


def in_their_dtype(matrices: Mapping[str, Scored]) -> dict[str, Scored]:
    """Matrices that compete, all in the 16 bits that their scores have, or all in float32."""
    dtypes = {matrix.scores(slice(0, 0)).dtype for matrix in matrices.values()}
    [dtype] = dtypes if len(dtypes) == 1 and dtypes <= NARROW else {torch.float32}
    return {name: matrix._replace(dtype=dtype) for name, matrix in matrices.items()}
