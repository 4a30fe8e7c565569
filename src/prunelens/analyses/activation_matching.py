"""Which latents of two SAEs do the same thing, by when they fire and not by where they point?

Pearson correlation of activations over the same tokens, with the rates of methods §6. Decoders are
not looked at, so neither shared coordinates nor a shared start can make two latents alike; what a
latent fires on can. Chance of another kind remains: of thousands of latents the best partner of a
rare one correlates a little with it by luck. The floor that is reported is the `chance` arm:
untrained SAEs on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.analyses.persistence import BATCH_TOKENS, FEWEST_FIRINGS, Rows
from prunelens.match import Matches, match_rates, match_similarities
from prunelens.sae.topk import TopKSAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

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
    init_a: int
    order_a: int
    init_b: int
    order_b: int
    a: LatentSeries
    b: LatentSeries


class ActivationMatching(NamedTuple):
    """The rates of every comparison, and the best match of every latent of A."""

    rates: pd.DataFrame
    """arm, init_a, order_a, init_b, order_b, and the fields of MatchRates."""
    latents: pd.DataFrame
    """arm, init_a, order_a, init_b, order_b, latent, match, correlation, mutual. `correlation` is
    NaN where the latent fires on fewer than 10 tokens or never varies; `match` is NaN there, and
    where no latent of B that can be matched correlates above 0 while some cannot be matched."""


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
    sae: TopKSAE,
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
    for start in range(0, len(tokens), BATCH_TOKENS):
        batch = tokens[start : start + BATCH_TOKENS]
        latents = sae.encode(rows.rows(batch))
        fires = latents.values > 0
        values.append(latents.values[fires].cpu().numpy())
        indices.append(latents.indices[fires].int().cpu().numpy())
        per_token.append(fires.sum(1).cpu().numpy())
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
    Memory beyond the series: one block of match.BLOCK_ROWS x latents_b, and B in float64.
    """
    num_tokens = a.values.shape[0]
    assert num_tokens == b.values.shape[0], "both series are over the same tokens"
    by_latent = a.values.tocsc()
    b_values = b.values.astype(np.float64)
    spread_a, spread_b = (np.where(s.correlates, s.deviation, np.inf) for s in (a, b))

    def correlations(first: int, last: int) -> Tensor:
        left = by_latent[:, first:last].astype(np.float64).T
        block = (left @ b_values).toarray()
        block -= num_tokens * np.outer(a.mean[first:last], b.mean)
        block /= np.outer(spread_a[first:last], spread_b)
        return torch.from_numpy(block.astype(np.float32))

    return match_similarities(correlations, len(spread_a), len(spread_b), lowest_tau=lowest_tau)


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
