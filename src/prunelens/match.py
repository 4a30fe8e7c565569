"""Two dictionaries in, matches and match rates out (methods §6).

Similarities (cosines of decoder rows, or any other) are computed in blocks of rows; the full matrix
is never held. Both directions read the same computed values, so that a pair is each other's best or
it is not, and mnn <= greedy <= one_way holds exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 1024  # rows of A whose similarities to all of B are held at a time
MAX_PAIRS = 8_000_000  # candidate pairs of the greedy matching held at a time (16 bytes each)
BINS = 4096  # of the histogram that cuts too many candidates into bands

Similarities = Callable[[int, int], Float[Tensor, "rows latents_b"]]
"""(first, last) -> float32 similarities of rows first..last-1 of A to every row of B, at most 1.
The same values whenever the same rows are asked for: the greedy matching may ask again."""


class Matches(NamedTuple):
    """Best matches in both directions, and the greedy one-to-one matching."""

    best_in_b: Int[np.ndarray, " latents_a"]
    """For each latent of A the most similar latent of B; ties go to the lowest index."""
    similarity_a: Float[np.ndarray, " latents_a"]
    """Its similarity."""
    best_in_a: Int[np.ndarray, " latents_b"]
    """For each latent of B the most similar latent of A."""
    similarity_b: Float[np.ndarray, " latents_b"]
    """Its similarity."""
    greedy_similarity_a: Float[np.ndarray, " latents_a"]
    """Similarity of each latent of A to its greedy partner; NaN where it has none above the tau."""
    lowest_tau: float
    """Greedy pairs below this similarity were not sought."""

    @property
    def mutual(self) -> np.ndarray:
        """Whether each latent of A and its best in B are each other's best."""
        return self.best_in_a[self.best_in_b] == np.arange(len(self.best_in_b))


class MatchRates(NamedTuple):
    """Shares of the latents of A (one_way_reverse: of B) that are matched at one tau."""

    tau: float
    one_way: float
    mnn: float
    greedy: float
    one_way_reverse: float


def match_dictionaries(
    a: Float[Tensor, "latents_a d_model"],
    b: Float[Tensor, "latents_b d_model"],
    *,
    lowest_tau: float = 0.5,
) -> Matches:
    """Match the rows of two decoders by cosine.

    Rows need not have unit norm; a row of zeros has cosine 0 to everything.
    Memory beyond the inputs: one block of BLOCK_ROWS x latents_b cosines and MAX_PAIRS candidates.
    """
    a, b = unit_rows(a), unit_rows(b)
    return match_similarities(
        lambda first, last: a[first:last] @ b.T, len(a), len(b), lowest_tau=lowest_tau
    )


def match_similarities(
    similarities: Similarities, num_a: int, num_b: int, *, lowest_tau: float
) -> Matches:
    """Match `num_a` latents to `num_b` by any similarity, asked for in blocks of BLOCK_ROWS rows.

    Memory: one block of similarities and MAX_PAIRS candidates.
    """
    best_in_b, similarity_a = [], []
    similarity_b = torch.full((num_b,), -torch.inf)
    best_in_a = torch.zeros(num_b, dtype=torch.long)
    candidates = _Candidates(lowest_tau)
    for first, last in _blocks(num_a):
        block = similarities(first, last)
        columns = block.argmax(1)  # argmax gives the first of equal values
        best_in_b.append(columns.cpu())
        similarity_a.append(block.gather(1, columns[:, None]).squeeze(1).cpu())
        rows = block.argmax(0)
        values = block.gather(0, rows[None, :]).squeeze(0).cpu()
        better = values > similarity_b  # strictly: an equal value keeps the lower row
        best_in_a[better] = rows.cpu()[better] + first
        similarity_b[better] = values[better]
        candidates.add(block, first)
    return Matches(
        torch.cat(best_in_b).numpy(),
        torch.cat(similarity_a).numpy(),
        best_in_a.numpy(),
        similarity_b.numpy(),
        _greedy(similarities, num_a, num_b, candidates),
        lowest_tau,
    )


def match_rates(matches: Matches, tau: float) -> MatchRates:
    """One-way, mutual-nearest-neighbour and greedy rates at `tau`; denominator: all latents."""
    assert tau >= matches.lowest_tau, "greedy pairs below lowest_tau were not sought"
    close = matches.similarity_a >= np.float32(tau)
    return MatchRates(
        tau,
        float(close.mean()),
        float((close & matches.mutual).mean()),
        float((matches.greedy_similarity_a >= np.float32(tau)).mean()),  # NaN compares false
        float((matches.similarity_b >= np.float32(tau)).mean()),
    )


def unit_rows(rows: Float[Tensor, "latents d_model"]) -> Float[Tensor, "latents d_model"]:
    """Rows scaled to unit norm in float32; zero rows stay zero."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def _blocks(num_rows: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of every block; the same each time."""
    return [(row, min(row + BLOCK_ROWS, num_rows)) for row in range(0, num_rows, BLOCK_ROWS)]


def _greedy(
    similarities: Similarities, num_a: int, num_b: int, candidates: _Candidates
) -> np.ndarray:
    """Greedy one-to-one matching in descending similarity, ties by row then column.

    Where the pairs above the lowest tau are too many to hold, they are visited in bands of
    similarity from the top; the same blocks are asked for again, so the values are the same.
    """
    matched = np.full(num_a, np.nan, dtype=np.float32)
    taken = np.zeros(num_b, dtype=bool)
    for low, high in candidates.bands():
        if (pairs := candidates.pairs) is None:
            band = _Candidates(low, high, limit=None)
            for first, last in _blocks(num_a):
                band.add(similarities(first, last), first)
            pairs = band.pairs
        assert pairs is not None
        rows, columns, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
        _match_in_order(rows, columns, values, matched, taken)
    return matched


def _match_in_order(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    matched: np.ndarray,
    taken: np.ndarray,
) -> None:
    """Greedy matching of one list of pairs, written into `matched` and `taken`.

    A pair that comes first in the order both for its row and for its column is always taken;
    taking all such pairs at once and striking what they block gives the greedy matching in a
    few rounds over arrays.
    """
    order = np.lexsort((columns, rows, -values))
    rows, columns, values = rows[order], columns[order], values[order]
    while len(rows):
        free = np.isnan(matched[rows]) & ~taken[columns]
        rows, columns, values = rows[free], columns[free], values[free]
        first_of_row = np.zeros(len(rows), dtype=bool)
        first_of_row[np.unique(rows, return_index=True)[1]] = True
        first_of_column = np.zeros(len(rows), dtype=bool)
        first_of_column[np.unique(columns, return_index=True)[1]] = True
        now = first_of_row & first_of_column
        matched[rows[now]] = values[now]
        taken[columns[now]] = True


class _Candidates:
    """Pairs of similarity in [low, high), kept while they are few, counted by bins in any case."""

    def __init__(self, low: float, high: float = np.inf, *, limit: int | None = MAX_PAIRS) -> None:
        self._low, self._high, self._limit = np.float32(low), high, limit
        self._histogram = np.zeros(BINS, dtype=np.int64)
        self.pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = []

    def add(self, block: Tensor, first_row: int) -> None:
        """Look at one block of similarities whose first row is `first_row` of A."""
        inside = block >= float(self._low)
        if self._high < np.inf:
            inside &= block < self._high
        rows, columns = (part.cpu().numpy() for part in inside.nonzero(as_tuple=True))
        values = block[inside].cpu().numpy()
        self._histogram += np.bincount(self._bin(values), minlength=BINS)
        if self._limit is not None and self._histogram.sum() > self._limit:
            self.pairs = None
        if self.pairs is not None:
            self.pairs.append((rows.astype(np.int32) + first_row, columns.astype(np.int32), values))

    def bands(self) -> list[tuple[float, float]]:
        """Bands from the top; at most MAX_PAIRS pairs each unless one bin has more."""
        if self.pairs is not None:
            return [(float(self._low), np.inf)]
        bands, high, held = [], np.inf, 0
        for number in reversed(range(BINS)):
            held += int(self._histogram[number])
            below = int(self._histogram[number - 1]) if number else 0
            if held and (number == 0 or held + below > MAX_PAIRS):
                bands.append((float(self._edges[number]), float(high)))
                high, held = self._edges[number], 0
        return bands

    def _bin(self, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._edges, values, side="right") - 1

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """Lower edges of the bins in float32, the first exactly at the lowest value sought."""
        return np.linspace(self._low, 1.0, BINS, endpoint=False, dtype=np.float32)
