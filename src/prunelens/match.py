"""Two dictionaries in, matches and match rates out (methods §6).

Similarities (cosines of decoder rows, or any other) are computed in blocks of rows; the full matrix
is never held. Both directions read the same computed values, so that a pair is each other's best or
it is not, and mnn <= greedy <= one_way holds exactly.

Beside the product, what costs is to read its result. So it is read once, a few rows at a time that
stay in the cache, by numpy, whose maxima are the fastest on a CPU: the maximum of each column over
those rows says which columns can hold a new best, or a pair above tau, and only these are looked at
again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

TAU = 0.7  # the paper's threshold, where a number is told at one
BLOCK_ROWS = 2048  # rows of A whose similarities to all of B are held at a time
TILE_ROWS = 16  # of them, looked at in one go: with 10,000 columns, 0.6 MB
MAX_PAIRS = 1_500_000  # candidate pairs of the greedy matching held at a time (75 bytes each)
BINS = 4096  # of the histogram that cuts too many candidates into bands

Similarities = Callable[[int, int], Float[Tensor, "rows latents_b"]]
"""(first, last) -> float32 similarities of rows first..last-1 of A to every row of B, at most 1.
The same values whenever the same rows are asked for: the greedy matching may ask again. The block
may be overwritten by the next call."""


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
    Memory beyond the inputs: the unit rows of B, one block of BLOCK_ROWS x latents_b cosines, and
    what `match_similarities` takes.
    """
    b = unit_rows(b)
    buffer = torch.empty(min(BLOCK_ROWS, len(a)), len(b), device=b.device)

    def cosines(first: int, last: int) -> Tensor:
        return torch.mm(unit_rows(a[first:last]), b.T, out=buffer[: last - first])

    return match_similarities(cosines, len(a), len(b), lowest_tau=lowest_tau)


def match_similarities(
    similarities: Similarities, num_a: int, num_b: int, *, lowest_tau: float
) -> Matches:
    """Match `num_a` latents to `num_b` by any similarity, asked for in blocks of BLOCK_ROWS rows.

    Similarities of another device are brought to the CPU block by block.
    Memory: MAX_PAIRS candidates, about 75 bytes each while they are matched.
    """
    best_in_b = np.empty(num_a, dtype=np.int64)
    similarity_a = np.empty(num_a, dtype=np.float32)
    best_in_a = np.zeros(num_b, dtype=np.int64)
    similarity_b = np.full(num_b, -np.inf, dtype=np.float32)
    candidates = _Candidates(lowest_tau, limit=MAX_PAIRS)
    for first, tile in _tiles(similarities, num_a):
        column_maxima = tile.max(0)
        columns = tile.argmax(1)  # argmax gives the first of equal values
        best_in_b[first : first + len(tile)] = columns
        similarity_a[first : first + len(tile)] = tile[np.arange(len(tile)), columns]
        # Strictly: an equal value keeps the lower row.
        better = np.flatnonzero(column_maxima > similarity_b)
        similarity_b[better] = column_maxima[better]
        best_in_a[better] = first + tile[:, better].argmax(0)
        candidates.add(tile, column_maxima, first)
    return Matches(
        best_in_b,
        similarity_a,
        best_in_a,
        similarity_b,
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


def _tiles(similarities: Similarities, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and similarities of every TILE_ROWS rows; in the same blocks each time."""
    for first in range(0, num_rows, BLOCK_ROWS):
        block = similarities(first, min(first + BLOCK_ROWS, num_rows)).cpu().numpy()
        for row in range(0, len(block), TILE_ROWS):
            yield first + row, block[row : row + TILE_ROWS]


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
            for first, tile in _tiles(similarities, num_a):
                band.add(tile, tile.max(0), first)
            pairs = band.pairs
        assert pairs is not None
        _match_in_order(_joined(pairs), matched, taken)
    return matched


class _Pairs(NamedTuple):
    """Pairs of latents."""

    rows: Int[np.ndarray, " pairs"]
    columns: Int[np.ndarray, " pairs"]
    values: Float[np.ndarray, " pairs"]

    def at(self, index: np.ndarray) -> _Pairs:
        """Those at `index`, or where it is true."""
        return _Pairs(*(part[index] for part in self))


def _joined(parts: list[_Pairs]) -> _Pairs:
    """One list of all pairs; `parts` is emptied, so that they are not held twice."""
    joined = _Pairs(*(np.concatenate(field) for field in zip(*parts, strict=True)))
    parts.clear()
    return joined


def _match_in_order(pairs: _Pairs, matched: np.ndarray, taken: np.ndarray) -> None:
    """Greedy matching of pairs sorted by row then column, written into `matched` and `taken`.

    A pair that comes first in the order both for its row and for its column is always taken;
    taking all such pairs at once and striking what they block gives the greedy matching in a
    few rounds over arrays.
    """
    pairs = pairs.at(np.argsort(-pairs.values, kind="stable"))  # ties stay by row, then column
    while len(pairs.rows):
        pairs = pairs.at(np.isnan(matched[pairs.rows]) & ~taken[pairs.columns])
        now = _first_of_each(pairs.rows, len(matched)) & _first_of_each(pairs.columns, len(taken))
        matched[pairs.rows[now]] = pairs.values[now]
        taken[pairs.columns[now]] = True


def _first_of_each(numbers: np.ndarray, limit: int) -> np.ndarray:
    """Where each of the numbers below `limit` occurs for the first time."""
    places = np.arange(len(numbers), dtype=np.int32)
    first = np.empty(limit, dtype=np.int32)
    first[numbers[::-1]] = places[::-1]  # of several assignments numpy keeps the last
    return first[numbers] == places


class _Candidates:
    """Pairs of similarity in [low, high), kept while they are at most `limit`.

    With a limit they are also counted by bins, from which the bands follow where they are too many.
    """

    def __init__(self, low: float, high: float = np.inf, *, limit: int | None) -> None:
        self._low, self._high, self._limit = np.float32(low), np.float32(high), limit
        self._histogram = np.zeros(BINS, dtype=np.int64)
        nothing = np.empty(0, dtype=np.int32)
        self.pairs: list[_Pairs] | None = [_Pairs(nothing, nothing, nothing.astype(np.float32))]

    def add(self, tile: np.ndarray, column_maxima: np.ndarray, first_row: int) -> None:
        """Look at similarities whose first row is `first_row` of A; tiles come in order."""
        able = np.flatnonzero(column_maxima >= self._low)
        if not len(able):
            return
        part = tile[:, able]
        inside = part >= self._low
        if self._high < np.inf:
            inside &= part < self._high
        values = part[inside]
        if self._limit is not None:
            self._histogram += np.bincount(self._bin(values), minlength=BINS)
            if self._histogram.sum() > self._limit:
                self.pairs = None
        if self.pairs is not None:
            rows, columns = (index.astype(np.int32) for index in inside.nonzero())
            self.pairs.append(_Pairs(first_row + rows, able.astype(np.int32)[columns], values))

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
