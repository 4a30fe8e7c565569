"""SparseGPT (Frantar & Alistarh 2023): which weights go, and what the others become instead.

Per matrix, with W [output, input] and H = X Xᵀ of its calibration inputs: columns are taken from
left to right; a weight that goes leaves an error behind, which the columns to its right take over
as least squares ask for it. The updates of a block of columns reach the columns beyond it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from prunelens.config import PruningConfig
from prunelens.criteria import CRITERIA, Score
from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.prune.calibrate import products_upwards
from prunelens.prune.masks import keep_masks
from prunelens.prune.matrices import as_matrix, prunable_matrices
from prunelens.prune.selection import Kept, check_groups

BLOCK_COLUMNS = 128
"""Columns among which weights are chosen together, as in the paper and its code."""
DAMPENING = 0.01
"""Added to H's diagonal, as a share of its mean; of the paper's code."""


@torch.no_grad()
def prune_upwards(
    lm: LanguageModel,
    pruning: PruningConfig,
    calibration: Int[Tensor, "windows context"],
    rounded_to: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Kept]:
    """Prune `lm` in place, one block after the other; the masks of each matrix as it is done.

    A block's inputs are those that the blocks below give as they now are. In memory besides the
    model: the inputs of one block for all windows, and X Xᵀ of the block's matrices. Weights become
    numbers of `rounded_to`, or of the model's dtype.
    Raises: UserError as `products_upwards` and `prune_matrix`.
    """
    scope, score = pruning.scope, pruning.entry.score
    assert scope in ("matrix", "row") and score, scope
    weights = {name: as_matrix(module) for name, module in prunable_matrices(lm).items()}
    for name, weight in weights.items():
        check_groups(name, weight.shape[1], pruning.group)
    for products in products_upwards(lm, calibration, progress):
        for name in list(products):
            num_zero_inputs = int((products[name].diagonal() == 0).count_nonzero())
            solved = prune_matrix(
                weights[name],
                products.pop(name),
                name=name,
                scope=scope,
                sparsity=pruning.fraction,
                group=pruning.group,
                score=score,
            )
            weights[name].copy_(solved.weight.to(rounded_to or weights[name].dtype))
            yield Kept(name, slice(0, len(solved.keep)), solved.keep, num_zero_inputs)


class Solved(NamedTuple):
    """One matrix, pruned."""

    weight: Float32[Tensor, "output input"]
    """0 where a weight went; the others updated."""
    keep: Bool[Tensor, "output input"]
    """True where a weight stays."""


def prune_matrix(
    weight: Float[Tensor, "output input"],
    products: Float32[Tensor, "input input"],
    *,
    name: str,
    scope: Literal["matrix", "row"],
    sparsity: Fraction,
    group: tuple[int, int] | None = None,
    score: Score | None = None,
) -> Solved:
    """SparseGPT of one matrix (methods §3).

    Weights are chosen by W_ij² / U_jj² within a block of 128 columns (with n:m: within m columns)
    as they are by then, U being the upper triangular factor with UᵀU = (H + damping)⁻¹. After a
    block that ends at column c exactly floor(s * c * rows) weights have gone (scope `matrix`), or
    floor(s * c) of every row, so that the whole matrix loses exactly what methods §3 says; among
    equals the lowest flat index goes. An input that calibration never saw other than 0 is worth
    nothing: its weights go first, and those that stay are left as they are. Where it saw no other
    input, weights go by magnitude.

    Args:
        weight: rows are outputs; not changed.
        products: X Xᵀ over all tokens.
        name: for errors.
        scope: what competes within a block of columns: all of it, or every row by itself.
        sparsity: in [0, 1), exact.
        group: n and m of a pattern n:m.
        score: of a criterion that needs products and U's diagonal; None: SparseGPT's.
    Raises: UserError where weights are NaN or infinite, or H cannot be inverted.
    """
    factor, dead = _inverse_factor(products, name)
    score = score or CRITERIA["sparsegpt"].score
    assert score
    # [input, output]: what is updated lies together
    columns = weight.to(products.device).T.float().contiguous().clone()
    kept = torch.ones_like(columns, dtype=torch.bool)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(columns))
        own = factor[start:end, start:end]
        block = _Block(columns[start:end], kept[start:end], own, dead[start:end], score)
        if group is None:
            counts = _counts(start, end, columns.shape[1], scope, sparsity)
            block.choose(slice(0, end - start), name, scope, counts)
        errors = block.update(name, group)
        columns[end:] -= factor[start:end, end:].T @ errors
    return Solved(columns.T.contiguous(), kept.T.contiguous())


class _Block(NamedTuple):
    """Some neighbouring columns; column first, so that one is contiguous."""

    columns: Float32[Tensor, "columns output"]
    """Weights, changed in place."""
    kept: Bool[Tensor, "columns output"]
    """What stays, filled in."""
    factor: Float32[Tensor, "columns columns"]
    """U's own part."""
    dead: Bool[Tensor, " columns"]
    """Inputs that are always 0."""
    score: Score
    """Of the criterion."""

    def choose(
        self, part: slice, name: str, scope: Literal["matrix", "row"], sparsity: Fraction
    ) -> None:
        """Fill in what stays of some of the columns, by their weights as they are now."""
        scores = self.score(self.columns[part].T, self.factor.diagonal()[part]).float()
        scores = scores.masked_fill(self.dead[part], 0.0).contiguous()
        keep = keep_masks({name: scores}, scope=scope, sparsity=sparsity)[name]
        self.kept[part] = keep.T

    def update(self, name: str, group: tuple[int, int] | None) -> Float32[Tensor, "columns output"]:
        """Zero what goes, column by column; the errors that the columns to the right take over."""
        errors = torch.zeros_like(self.columns)
        for j, column in enumerate(self.columns):
            if group and j % group[1] == 0:
                self.choose(slice(j, j + group[1]), name, "row", Fraction(*group))
            gone = ~self.kept[j]
            errors[j] = torch.where(gone, column, 0.0) / self.factor[j, j]
            column.masked_fill_(gone, 0.0)
            self.columns[j + 1 :] -= torch.outer(self.factor[j, j + 1 :], errors[j])
        return errors


def _counts(
    start: int, end: int, num_rows: int, scope: Literal["matrix", "row"], sparsity: Fraction
) -> Fraction:
    """The share of a block that goes, so that what has gone up to its end is exactly asked for."""
    rows = num_rows if scope == "matrix" else 1
    gone = math.floor(sparsity * end * rows) - math.floor(sparsity * start * rows)
    return Fraction(gone, rows * (end - start))


def _inverse_factor(
    products: Float32[Tensor, "input input"], name: str
) -> tuple[Float32[Tensor, "input input"], Bool[Tensor, " input"]]:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, and which inputs are always 0
    while others are not.

    With H turned round both ways = L Lᵀ, L turned round is upper triangular, and U its inverse: no
    inverse of H is needed. In float64, because H of a few thousand inputs is ill-conditioned.
    """
    damped = products.double()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):  # as if all inputs were alike, and none told of another
        diagonal.fill_(1.0)
        dead = ~dead
    live_mean = diagonal[~dead].mean()
    diagonal[dead] = live_mean  # apart from all others: their rows and columns are 0
    diagonal += DAMPENING * live_mean
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise UserError(
            f"pruning: calibration inputs of {name} are so nearly dependent that SparseGPT cannot"
            " invert their products; raise corpus.calibration_tokens, or prune by wanda"
        )
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper.float(), dead
