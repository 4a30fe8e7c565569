"""Samples over documents, slowly: counted window by window, chosen by trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def documents_of_windows(
    lengths: Sequence[int], num_windows: int, tokens_per_window: int
) -> list[int]:
    """Every token is written down with its document; a window has its first token's."""
    tokens = [number for number, length in enumerate(lengths) for _ in range(length)]
    return [tokens[window * tokens_per_window] for window in range(num_windows)]


def evenest_counts(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` windows each document gives where the fullest gives as few as can be.

    One window after the other is taken from a document that has given least so far, of those that
    have any left; as sorted numbers, because which documents give the last ones does not matter.
    """
    given = [0] * len(sizes)
    for _ in range(count):
        least = min((given[i], i) for i in range(len(sizes)) if given[i] < sizes[i])
        given[least[1]] += 1
    return sorted(given)


def least_largest_group(sizes: Sequence[int], most: int) -> int:
    """Rows of the largest group in the division of documents in order that makes it smallest."""
    num_groups = min(most, len(sizes))
    largest = []
    for cuts in itertools.combinations(range(1, len(sizes)), num_groups - 1):
        bounds = [0, *cuts, len(sizes)]
        largest.append(max(sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)))
    return min(largest)


def level_that_fills(lengths: Sequence[int], quota: int) -> int:
    """The least length such that documents cut to it hold `quota` tokens, found by counting up."""
    return next(n for n in range(quota + 1) if sum(min(n, own) for own in lengths) >= quota)
