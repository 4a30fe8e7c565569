"""Two dictionaries in, matches and match rates out (methods §6).

Cosines are computed in blocks of rows; the full similarity matrix is never held. Both directions
read the same computed cosines, so that a pair is each other's best or it is not, and
mnn <= greedy <= one_way holds exactly.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 1024  # rows of A whose cosines to all of B are held at a time
MAX_PAIRS = 8_000_000  # candidate pairs of the greedy matching held at a time (16 bytes each)
BINS = 4096  # of the histogram that cuts too many candidates into bands


class Matches(NamedTuple):
    """Best matches in both directions, and the greedy one-to-one matching."""

    best_in_b: Int[np.ndarray, " latents_a"]
    """For each latent of A the most similar latent of B; ties go to the lowest index."""
    cosine_a: Float[np.ndarray, " latents_a"]
    """Its cosine."""
    best_in_a: Int[np.ndarray, " latents_b"]
    """For each latent of B the most similar latent of A."""
    cosine_b: Float[np.ndarray, " latents_b"]
    """Its cosine."""
    greedy_cosine_a: Float[np.ndarray, " latents_a"]
    """Cosine of each latent of A to its greedy partner; NaN where it has none above the tau."""
    lowest_tau: float
    """Greedy pairs below this cosine were not sought."""

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
    best_in_b, cosine_a = [], []
    cosine_b = torch.full((len(b),), -torch.inf, device=b.device)
    best_in_a = torch.zeros(len(b), dtype=torch.long, device=b.device)
    candidates = _Candidates(lowest_tau)
    for first in range(0, len(a), BLOCK_ROWS):
        cosines = a[first : first + BLOCK_ROWS] @ b.T
        columns = cosines.argmax(1)  # argmax gives the first of equal values
        best_in_b.append(columns)
        cosine_a.append(cosines.gather(1, columns[:, None]).squeeze(1))
        rows = cosines.argmax(0)
        values = cosines.gather(0, rows[None, :]).squeeze(0)
        better = values > cosine_b  # strictly: an equal value keeps the lower row
        best_in_a[better] = rows[better] + first
        cosine_b[better] = values[better]
        candidates.add(cosines, first)
    return Matches(
        torch.cat(best_in_b).cpu().numpy(),
        torch.cat(cosine_a).cpu().numpy(),
        best_in_a.cpu().numpy(),
        cosine_b.cpu().numpy(),
        _greedy(a, b, candidates),
        lowest_tau,
    )


def match_rates(matches: Matches, tau: float) -> MatchRates:
    """One-way, mutual-nearest-neighbour and greedy rates at `tau`; denominator: all latents."""
    assert tau >= matches.lowest_tau, "greedy pairs below lowest_tau were not sought"
    close = matches.cosine_a >= np.float32(tau)
    return MatchRates(
        tau,
        float(close.mean()),
        float((close & matches.mutual).mean()),
        float((matches.greedy_cosine_a >= np.float32(tau)).mean()),  # NaN compares false
        float((matches.cosine_b >= np.float32(tau)).mean()),
    )


def unit_rows(rows: Float[Tensor, "latents d_model"]) -> Float[Tensor, "latents d_model"]:
    """Rows scaled to unit norm in float32; zero rows stay zero."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def _greedy(a: Tensor, b: Tensor, candidates: _Candidates) -> np.ndarray:
    """Greedy one-to-one matching in descending cosine, ties by row then column.

    Where the pairs above the lowest tau are too many to hold, they are visited in bands of
    cosine from the top; the same block products are computed again, so the values are the same.
    """
    matched = np.full(len(a), np.nan, dtype=np.float32)
    taken = np.zeros(len(b), dtype=bool)
    for low, high in candidates.bands():
        if (pairs := candidates.pairs) is None:
            band = _Candidates(low, high, limit=None)
            for first in range(0, len(a), BLOCK_ROWS):
                band.add(a[first : first + BLOCK_ROWS] @ b.T, first)
            pairs = band.pairs
        assert pairs is not None
        rows, columns, cosines = (np.concatenate(part) for part in zip(*pairs, strict=True))
        _match_in_order(rows, columns, cosines, matched, taken)
    return matched


def _match_in_order(
    rows: np.ndarray,
    columns: np.ndarray,
    cosines: np.ndarray,
    matched: np.ndarray,
    taken: np.ndarray,
) -> None:
    """Greedy matching of one list of pairs, written into `matched` and `taken`.

    A pair that comes first in the order both for its row and for its column is always taken;
    taking all such pairs at once and striking what they block gives the greedy matching in a
    few rounds over arrays.
    """
    order = np.lexsort((columns, rows, -cosines))
    rows, columns, cosines = rows[order], columns[order], cosines[order]
    while len(rows):
        free = np.isnan(matched[rows]) & ~taken[columns]
        rows, columns, cosines = rows[free], columns[free], cosines[free]
        first_of_row = np.zeros(len(rows), dtype=bool)
        first_of_row[np.unique(rows, return_index=True)[1]] = True
        first_of_column = np.zeros(len(rows), dtype=bool)
        first_of_column[np.unique(columns, return_index=True)[1]] = True
        now = first_of_row & first_of_column
        matched[rows[now]] = cosines[now]
        taken[columns[now]] = True


class _Candidates:
    """Pairs with cosine in [low, high), kept while they are few, counted by bins in any case."""

    def __init__(self, low: float, high: float = np.inf, *, limit: int | None = MAX_PAIRS) -> None:
        self._low, self._high, self._limit = np.float32(low), high, limit
        self._histogram = np.zeros(BINS, dtype=np.int64)
        self.pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = []

    def add(self, cosines: Tensor, first_row: int) -> None:
        """Look at one block of cosines whose first row is `first_row` of A."""
        inside = cosines >= float(self._low)
        if self._high < np.inf:
            inside &= cosines < self._high
        rows, columns = (part.cpu().numpy() for part in inside.nonzero(as_tuple=True))
        values = cosines[inside].cpu().numpy()
        self._histogram += np.bincount(self._bin(values), minlength=BINS)
        if self._limit is not None and self._histogram.sum() > self._limit:
            self.pairs = None
        if self.pairs is not None:
            self.pairs.append((rows.astype(np.int32) + first_row, columns.astype(np.int32), values))

    def bands(self) -> list[tuple[float, float]]:
        """Bands of cosine from the top; at most MAX_PAIRS pairs each unless one bin has more."""
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
        """Lower edges of the bins in float32, the first exactly at the lowest cosine sought."""
        return np.linspace(self._low, 1.0, BINS, endpoint=False, dtype=np.float32)
