"""Which latents of two SAEs do the same thing, by when they fire and not by where they point?

Pearson correlation of activations over the same tokens, with the rates of methods §6. Decoders are
not looked at, so neither shared coordinates nor a shared start can make two latents alike; what a
latent fires on can. Chance of another kind remains: of thousands of latents the best partner of a
rare one correlates a little with it by luck. The floor that is reported is the `chance` arm:
untrained SAEs on the same tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.analyses.noise import Rows
from prunelens.analyses.persistence import BATCH_TOKENS, FEWEST_FIRINGS
from prunelens.match import Matches, match_rates, match_similarities
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers

if TYPE_CHECKING:
    from scipy.sparse import csr_array

RANGE_TOKENS = 2**16  # whose products with one latent are held at a time: 20 bytes per firing of B
SMALLEST_VARIATION = 1e-5  # of a series' own size; below it, float32 values vary by rounding alone


class LatentSeries(NamedTuple):
    """The activations of all latents of one SAE on one set of tokens, on the CPU."""

    values: csr_array
    """float32 [tokens, latents]; what is not stored is 0."""
    mean: Float[np.ndarray, " latents"]
    """float64, over all tokens."""
    deviation: Float[np.ndarray, " latents"]
    """float64: square root of the sum over tokens of (value - mean)^2."""
    firings: Int[np.ndarray, " latents"]
    """Tokens on which a latent fires."""

    @property
    def correlates(self) -> np.ndarray:
        """Which latents fire often enough, and vary enough, for a correlation to say anything."""
        size = np.hypot(self.deviation, np.sqrt(self.values.shape[0]) * self.mean)
        varies = self.deviation > SMALLEST_VARIATION * size
        return (self.firings >= FEWEST_FIRINGS) & varies


class ActivationComparison(NamedTuple):
    """One arm for one pair of SAEs, each on its own activations of the same tokens."""

    arm: str
    source: str
    """What B reads: `pruned` activations, the `null` in their place, or, of dense SAEs, `dense`."""
    init_a: int
    order_a: int
    init_b: int
    order_b: int
    a: LatentSeries
    b: LatentSeries


class ActivationMatching(NamedTuple):
    """The rates of every comparison, and the best match of every latent of A."""

    rates: pd.DataFrame
    """arm, source, init_a, order_a, init_b, order_b, and the fields of MatchRates."""
    latents: pd.DataFrame
    """arm, source, init_a, order_a, init_b, order_b, latent, match, correlation, mutual.
    `correlation` is NaN where the latent fires on fewer than 10 tokens or never varies; `match` is
    NaN there, and where no latent of B that can be matched correlates above 0 while some cannot be
    matched."""


def activation_matching(
    comparisons: Iterable[ActivationComparison], taus: Sequence[float]
) -> ActivationMatching:
    """Match every comparison by activations. Source: methods §6, `activation` matching.

    Taken one at a time, so that a generator need hold only two series.
    """
    rates, latents = [], []
    for comparison in comparisons:
        named = comparison._asdict()
        a, b = named.pop("a"), named.pop("b")
        matches = match_activations(a, b, lowest_tau=min(taus))
        rates += [named | match_rates(matches, tau)._asdict() for tau in taus]
        latents.append(_latents(named, a, b, matches))
    return ActivationMatching(pd.DataFrame(rates), pd.concat(latents, ignore_index=True))


@torch.no_grad()
def latent_series(
    sae: SparseAutoencoder,
    rows: Rows,
    tokens: Int[Tensor, " tokens"],
    *,
    progress: Callable[[int], None] | None = None,
) -> LatentSeries:
    """Encode `tokens` of `rows`, which are normalised as the SAE was trained.

    Memory: 8 bytes per firing; at most k firings per token.
    """
    from scipy.sparse import csr_array

    values, indices, per_token = [], [], []
    buffers = Buffers()
    for start in range(0, len(tokens), BATCH_TOKENS):
        batch = tokens[start : start + BATCH_TOKENS]
        latents = sae.encode(rows.rows(batch), buffers=buffers)
        kept, numbers = latents.values.cpu().numpy(), latents.indices.int().cpu().numpy()
        fires = kept > 0
        values.append(kept[fires])
        indices.append(numbers[fires])
        per_token.append(np.count_nonzero(fires, axis=1))
        if progress:
            progress(start + len(batch))
    ends = np.concatenate([[0], np.cumsum(np.concatenate(per_token))])
    shape = (len(tokens), sae.num_latents)
    return _with_moments(
        csr_array((np.concatenate(values), np.concatenate(indices), ends), shape=shape)
    )


def match_activations(a: LatentSeries, b: LatentSeries, *, lowest_tau: float) -> Matches:
    """Match the latents of A to those of B by the Pearson correlation of their series.

    A latent that does not `correlates` has similarity 0 to all and can match nothing.
    Sums in float64, in the order of the tokens, whatever the block: exactly the same from B to A.
    Work: one product for each latent of A, each token that it fires on, and each latent of B that
    fires there. Memory beyond the series: one block of match.BLOCK_ROWS x latents_b, and B, 12
    bytes for each of the most latents that fire on one token, for every token.
    """
    num_tokens = a.values.shape[0]
    assert num_tokens == b.values.shape[0], "both series are over the same tokens"
    by_latent = a.values.tocsc()
    scale_a, scale_b = (1 / np.where(s.correlates, s.deviation, np.inf) for s in (a, b))
    indices, values = _by_token(b.values, scale_b)
    mean_a, mean_b = (
        math.sqrt(num_tokens) * s.mean * scale for s, scale in ((a, scale_a), (b, scale_b))
    )

    def correlations(first: int, last: int) -> Tensor:
        block = np.empty((last - first, len(mean_b)), dtype=np.float32)
        for latent, row in zip(range(first, last), block, strict=True):
            stored = slice(by_latent.indptr[latent], by_latent.indptr[latent + 1])
            weights = by_latent.data[stored].astype(np.float64) * scale_a[latent]
            products = _sum_over_tokens(
                by_latent.indices[stored], weights, indices, values, len(mean_b)
            )
            np.subtract(products, mean_a[latent] * mean_b, out=row, casting="same_kind")
        return torch.from_numpy(block)

    return match_similarities(correlations, len(mean_a), len(mean_b), lowest_tau=lowest_tau)


def _by_token(
    series: csr_array, scale: Float[np.ndarray, " latents"]
) -> tuple[Int[np.ndarray, "tokens most"], Float[np.ndarray, "tokens most"]]:
    """Latents that fire on each token, and their values times their scales (float64).

    As many columns as the most latents that fire on one token; the others are filled up with zeros.
    """
    firings = np.diff(series.indptr)
    stored = np.arange(firings.max(initial=0)) < firings[:, None]
    indices = np.zeros(stored.shape, dtype=np.int32)
    values = np.zeros(stored.shape, dtype=np.float64)
    indices[stored] = series.indices
    values[stored] = series.data * scale[series.indices]
    return indices, values


def _sum_over_tokens(
    tokens: Int[np.ndarray, " firings"],
    weights: Float[np.ndarray, " firings"],
    indices: Int[np.ndarray, "all_tokens most"],
    values: Float[np.ndarray, "all_tokens most"],
    num_latents: int,
) -> Float[np.ndarray, " latents"]:
    """Per latent, the sum over `tokens`, which ascend, of their weight times its value there.

    Ranges of tokens are those of the text, not of these tokens: what is added to what does not
    depend on which series is A.
    """
    total = np.zeros(num_latents)
    edges = np.arange(0, len(indices) + RANGE_TOKENS, RANGE_TOKENS)
    for first, last in itertools.pairwise(np.searchsorted(tokens, edges)):
        here = tokens[first:last]
        products = values.take(here, axis=0)
        products *= weights[first:last, None]
        at = indices.take(here, axis=0)
        total += np.bincount(at.ravel(), products.ravel(), num_latents)
    return total


def _with_moments(values: csr_array) -> LatentSeries:
    num_tokens, num_latents = values.shape
    stored = values.data.astype(np.float64)
    firings = np.bincount(values.indices, minlength=num_latents)
    mean = np.bincount(values.indices, stored, num_latents) / num_tokens
    # From deviations, not from squares minus a squared mean: nothing cancels.
    squares = np.bincount(values.indices, (stored - mean[values.indices]) ** 2, num_latents)
    squares += (num_tokens - firings) * mean**2
    return LatentSeries(values, mean, np.sqrt(squares), firings)


def _latents(
    named: dict[str, str | int], a: LatentSeries, b: LatentSeries, matches: Matches
) -> pd.DataFrame:
    known = a.correlates
    matched = known & b.correlates[matches.best_in_b]
    return pd.DataFrame(
        {
            **named,
            "latent": np.arange(len(known)),
            "match": np.where(matched, matches.best_in_b, np.nan),
            "correlation": np.where(known, matches.similarity_a, np.nan),
            "mutual": matched & matches.mutual,
        }
    )
