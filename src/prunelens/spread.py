"""Samples that are even over documents (methods §10): which text, windows and groups of rows.

The windows of one document resemble each other: the first N of a stream may all be of one file,
and an interval that takes windows for independent is too narrow. Documents are numbered; windows
and rows come with the numbers of theirs.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools

import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor


class DocumentStream:
    """The first documents of a text, one after the other, until `quota` tokens are there.

    A document gives at most `most` tokens; only where the text ends before the quota is reached
    does each give more, up to the least length with which it is. Without `keep` they are counted.
    """

    def __init__(self, quota: int, most: int, *, keep: bool = True) -> None:
        self.quota, self._most, self._keep = quota, most, keep
        self.missing = quota
        """Tokens still wanted while none gives more than it may."""
        self.lacking = quota
        """Tokens that are not there even if all give what they have."""
        self._documents: list[Tensor] = []

    def add(self, ids: Int32[Tensor, " tokens"]) -> None:
        """The next document."""
        if not self.missing or not len(ids):
            return
        # Without a cap the text is taken from the front, as far as it goes.
        held = ids[: self.missing] if self._most >= self.quota else _part(ids, self.quota)
        if self._keep:
            self._documents.append(held.clone())
        self.missing -= min(len(held), self._most, self.missing)
        self.lacking -= min(len(held), self.lacking)

    def joined(self) -> tuple[Int32[Tensor, " tokens"], Int64[Tensor, " documents"]]:
        """The stream, and where in it each document begins."""
        lengths = [len(ids) for ids in self._documents]
        most = self._most
        if self.missing:
            most = bisect.bisect_left(
                range(self.quota), self.quota, key=lambda n: sum(min(n, own) for own in lengths)
            )
        parts = [_part(ids, most) for ids in self._documents]
        stream = torch.cat([torch.empty(0, dtype=torch.int32), *parts])[: self.quota]
        ends = torch.tensor([0, *itertools.accumulate(map(len, parts))], dtype=torch.long)
        return stream, ends[:-1][ends[:-1] < len(stream)]


def _part(ids: Int32[Tensor, " tokens"], most: int) -> Int32[Tensor, " part"]:
    """At most `most` tokens in a row, from a random place that the content alone decides."""
    if len(ids) <= most:
        return ids
    digest = hashlib.sha256(ids.numpy().tobytes()).digest()
    first = int.from_bytes(digest[:8]) % (len(ids) - most + 1)
    return ids[first : first + most]


def window_documents(
    starts: Int[Tensor, " documents"], num_windows: int, tokens_per_window: int
) -> Int64[Tensor, " windows"]:
    """The number, from 0, of the document that each window's first token belongs to.

    Args:
        starts: where in the stream each document begins, as in `TokenSplits`.
        num_windows: of the stream.
        tokens_per_window: that it is cut into; a BOS, which the stream lacks, does not count.
    """
    first_tokens = torch.arange(num_windows) * tokens_per_window
    return torch.searchsorted(starts.long(), first_tokens, right=True) - 1


def spread_over_documents(
    documents: Int[Tensor, " windows"], *, seed: int
) -> Int64[Tensor, " windows"]:
    """An order of the windows, every prefix of which is as even over documents as can be.

    Round by round, every document that has windows left gives one of them, drawn at random without
    replacement; the order of the documents is random, too, and the same in every round.
    """
    generator = torch.Generator().manual_seed(seed)
    _, document, sizes = torch.unique(documents, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(documents), generator=generator)
    by_document = shuffled[document[shuffled].argsort(stable=True)]
    turn_in_round = torch.randperm(len(sizes), generator=generator)[document[by_document]]
    round_number = torch.arange(len(documents)) - (sizes.cumsum(0) - sizes)[document[by_document]]
    return by_document[(round_number * len(sizes) + turn_in_round).argsort()]


def document_groups(documents: Int[Tensor, " rows"], *, most: int = 20) -> Int64[Tensor, " rows"]:
    """Every row's group, from 0: documents in the order they appear, none of them divided.

    There are `most` groups, or as many as documents where those are fewer, with about equally many
    rows each.
    """
    _, document, sizes = torch.unique(documents, return_inverse=True, return_counts=True)
    rows = torch.arange(len(documents))
    first = rows.new_zeros(len(sizes)).scatter_reduce(0, document, rows, "amin", include_self=False)
    in_order = first.argsort()
    group_of = torch.empty_like(in_order)
    group_of[in_order] = torch.tensor(_groups(sizes[in_order].tolist(), most), dtype=torch.long)
    return group_of[document]


def _groups(sizes: list[int], most: int) -> list[int]:
    """Each document's group; one ends where half the next document would go beyond its share."""
    groups_left, rows_left = min(most, len(sizes)), sum(sizes)
    found, group, in_group = [], 0, 0
    for number, size in enumerate(sizes):
        share = (rows_left + in_group) / max(groups_left, 1)
        full = in_group + size / 2 >= share and groups_left > 1
        if in_group and (full or len(sizes) - number < groups_left):
            group, in_group, groups_left = group + 1, 0, groups_left - 1
        found.append(group)
        in_group, rows_left = in_group + size, rows_left - size
    return found


def one_of_each_stretch(num_windows: int, count: int, *, seed: int) -> Int64[Tensor, " count"]:
    """Numbers of `count` windows in rising order: one at random out of each of equal stretches.

    All of them where there are no more than `count`.
    """
    if count >= num_windows:
        return torch.arange(num_windows)
    bounds = torch.arange(count + 1) * num_windows // count
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(count, generator=generator, dtype=torch.float64)
    return bounds[:-1] + (shares * bounds.diff()).long()
