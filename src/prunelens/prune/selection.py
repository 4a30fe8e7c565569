"""From scores to what stays: exactly floor(sparsity * n) weights of every scope group go.

One threshold over many matrices is found by counting keys (the bit patterns of scores), without
sorting, copying or joining the matrices: 16-bit scores have 2^15 keys, counted in one pass, float32
scores take two. Both counting and the choice that follows look at a block of rows at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from prunelens.errors import UserError
from prunelens.prune.scores import Scored

LOW_BITS = 15
"""A float32 key of 31 bits is counted as 16 high bits, then 15 low ones."""

_Part: TypeAlias = tuple[str, Scored, slice]
"""A matrix, by name, and some of its rows."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Kept(NamedTuple):
    """What stays of some rows of a matrix."""

    name: str
    """The matrix."""
    rows: slice
    """Its rows."""
    keep: Bool[Tensor, "rows input"]
    """True where a weight stays; on the weights' device."""
    num_zero_inputs: int = 0
    """Inputs of the matrix that calibration reached and that were always 0."""


def select(
    matrices: Mapping[str, Scored],
    *,
    scope: Literal["global", "matrix", "row"],
    sparsity: Fraction,
    group: tuple[int, int] | None = None,
) -> Iterator[Kept]:
    """What stays, block by block, in order; a block may be zeroed as soon as it is given.

    Args:
        matrices: by name, in `named_modules` order, which is the order of ties.
        scope: the weights that compete: `global` all, `matrix` those of one, `row` of one row.
        sparsity: in [0, 1], exact.
        group: n and m of a pattern n:m, with scope `row` and sparsity n/m: of every m neighbours
            in a row n go.
    Raises: UserError, before the first block is given, where a score is NaN or infinite, or m
        divides no row.
    """
    assert group is None or (scope == "row" and sparsity == Fraction(*group)), (scope, group)
    device = next((matrix.weight.device for matrix in matrices.values()), torch.device("cpu"))
    threads = _threads(device)
    if scope == "row":
        for name, matrix in matrices.items():
            _check_finite(name, matrix)
            check_groups(name, matrix.weight.shape[1], group)
        yield from _lowest_of_rows(matrices, sparsity, group, threads)
        return
    rivals = [matrices] if scope == "global" else [{n: m} for n, m in matrices.items()]
    cuts = [_cut(those, sparsity, threads) for those in rivals]
    for those, cut in zip(rivals, cuts, strict=True):
        yield from _above(those, cut, threads)


def check_groups(name: str, num_inputs: int, group: tuple[int, int] | None) -> None:
    """Raises UserError where rows of a matrix do not fall into whole groups."""
    if group and num_inputs % group[1]:
        raise UserError(
            f"pruning.pattern: '{group[0]}:{group[1]}' needs rows of a multiple of {group[1]}"
            f" weights, and those of {name} have {num_inputs}; use unstructured"
        )


class _Cut(NamedTuple):
    """Which weights of a group go."""

    threshold: int
    """Those with a lower key."""
    num_ties: int
    """And so many of those with this very key, the first ones."""


def _cut(group: Mapping[str, Scored], sparsity: Fraction, threads: int) -> _Cut:
    low_bits = 0 if all(matrix.dtype.itemsize == 2 for matrix in group.values()) else LOW_BITS

    def high_keys(matrix: Scored, rows: slice) -> Tensor:
        keys = matrix.keys(rows)
        return keys >> low_bits if low_bits else keys

    infinity = next(iter(group.values())).infinity >> low_bits
    high = _histogram(group, high_keys, threads, refused_from=infinity)
    top = _locate(high, math.floor(sparsity * int(high.sum())))
    if not low_bits:
        return top

    def low_keys(matrix: Scored, rows: slice) -> Tensor:
        keys = matrix.keys(rows)
        return keys[(keys >> low_bits) == top.threshold] & ((1 << low_bits) - 1)

    bottom = _locate(_histogram(group, low_keys, threads), top.num_ties)
    return _Cut((top.threshold << low_bits) | bottom.threshold, bottom.num_ties)


def _histogram(
    group: Mapping[str, Scored],
    values: Callable[[Scored, slice], Int[Tensor, "*shape"]],
    threads: int,
    *,
    refused_from: int | None = None,
) -> Int64[np.ndarray, " bins"]:
    """How often each 16-bit value occurs, over all blocks.

    Raises: UserError where a value is `refused_from` or more: those of scores that are not finite.
    """

    def count(share: list[_Part]) -> Int64[np.ndarray, " bins"]:
        total = np.zeros(1 << 16, dtype=np.int64)
        for name, matrix, rows in share:
            counts = torch.bincount(values(matrix, rows).flatten()).cpu().numpy()
            if refused_from is not None and len(counts) > refused_from:
                raise _not_finite(name)
            total[: len(counts)] += counts
        return total

    parts = _parts(group)
    shares = [parts[thread::threads] for thread in range(threads)]
    return np.sum(list(_in_threads(count, shares, threads)), axis=0)


def _locate(histogram: Int64[np.ndarray, " bins"], rank: int) -> _Cut:
    """The bin that holds the value of that rank (counted from 1) and its rank within the bin.

    Rank 0 lies in bin 0 with nothing remaining.
    """
    cumulated = histogram.cumsum()
    found = int(np.searchsorted(cumulated, rank))
    return _Cut(found, rank - int(cumulated[found] - histogram[found]))


def _above(group: Mapping[str, Scored], cut: _Cut, threads: int) -> Iterator[Kept]:
    """What stays under one threshold."""
    ties_left = cut.num_ties

    def reach(part: _Part) -> tuple[Kept, Tensor | None]:
        """What reaches the threshold, and what lies on it if it may have to go."""
        name, matrix, rows = part
        keys = matrix.keys(rows)
        ties = keys == cut.threshold if ties_left else None
        return Kept(name, rows, keys >= cut.threshold), ties

    for kept, ties in _in_threads(reach, _parts(group), threads):
        if ties_left:
            assert ties is not None, "ties never grow"
            first = ties.flatten().nonzero().flatten()[:ties_left]
            kept.keep.view(-1)[first] = False
            ties_left -= len(first)
        yield kept


def _lowest_of_rows(
    matrices: Mapping[str, Scored],
    sparsity: Fraction,
    group: tuple[int, int] | None,
    threads: int,
) -> Iterator[Kept]:
    """What stays where every row, or every group of a row, competes on its own."""

    def choose(part: _Part) -> Kept:
        name, matrix, rows = part
        keys = matrix.keys(rows)
        width = group[1] if group else keys.shape[1]
        return Kept(name, rows, _keep_in_rows(keys.view(-1, width), sparsity).view(keys.shape))

    return _in_threads(choose, _parts(matrices), threads)


def _keep_in_rows(keys: Int[Tensor, "rows input"], sparsity: Fraction) -> Tensor:
    """What stays of some rows."""
    num_rows, num_columns = keys.shape
    num_dropped = math.floor(sparsity * num_columns)
    if num_dropped == num_columns:
        return torch.zeros_like(keys, dtype=torch.bool)
    lowest_kept = _of_rank(keys, num_dropped)
    keep = keys >= lowest_kept
    if int(keep.count_nonzero()) == num_rows * (num_columns - num_dropped):
        return keep
    surplus = keep.sum(1, keepdim=True) - (num_columns - num_dropped)  # ties that must go as well
    tied = surplus.flatten().nonzero().flatten()
    ties = keys[tied] == lowest_kept[tied]
    keep[tied] &= ~(ties & (ties.cumsum(1, dtype=torch.int32) <= surplus[tied]))
    return keep


def _of_rank(keys: Int[Tensor, "rows input"], rank: int) -> Int[Tensor, "rows 1"]:
    """Each row's key of that rank, counted from 0.

    On a CPU numpy's partition of integers takes a tenth of the time of torch's kthvalue.
    """
    if keys.device.type != "cpu":
        return keys.kthvalue(rank + 1, dim=1, keepdim=True).values

    return torch.from_numpy(np.partition(keys.numpy(), rank, axis=1)[:, rank : rank + 1])


def _check_finite(name: str, matrix: Scored) -> None:
    """Refuse scores that are NaN or infinite; looks at each only where one may be."""
    if not matrix.are_surely_finite() and any(
        int(matrix.keys(rows).amax()) >= matrix.infinity for rows in matrix.blocks()
    ):
        raise _not_finite(name)


def _not_finite(name: str) -> UserError:
    return UserError(
        f"pruning: scores of {name} are NaN or infinite, so its weights or its calibration"
        " inputs are; load the model in bfloat16 or float32, or mend the checkpoint"
    )


def _parts(matrices: Mapping[str, Scored]) -> list[_Part]:
    """All blocks of all matrices, in order."""
    return [(name, matrix, rows) for name, matrix in matrices.items() for rows in matrix.blocks()]


def _threads(device: torch.device) -> int:
    """Threads of our own: on a CPU as many as torch has."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def _in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int
) -> Iterator[_Result]:
    """`function` of every item, in order; no more than two results a thread wait to be taken."""
    if threads == 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), 2 * threads):
            # A block is small, and counting it or taking its partition runs in one thread anyway:
            # to share out every operation on it as well takes many times as long where other work
            # keeps cores busy.
            with threads_of_torch(1):
                results = list(pool.map(function, items[start : start + 2 * threads]))
            yield from results


@contextlib.contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """Meanwhile operations of torch are shared out among so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
