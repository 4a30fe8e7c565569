"""Rank correlations: exact over a few groups, over latents and documents with intervals; Holm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from prunelens.analyses.statistics.estimates import Estimate, LatentSample, crossed, no_estimate

_DECIMALS = 12  # values that differ by less are ties, not an order made by rounding


class ExactTest(NamedTuple):
    """A rank correlation with its exact permutation p."""

    rho: float
    """Spearman's, in [-1, 1]; NaN where `reason` says why."""
    p: float
    """Two-sided, over all orders."""
    reason: str


class RankSample(NamedTuple):
    """The latents of one seed."""

    x: Float[np.ndarray, " latents"]
    y: Float[np.ndarray, " latents"]
    y_without: Float[np.ndarray, "latents groups"]
    """Of a measure of tokens: y without each group of documents; else without a column."""
    given: Float[np.ndarray, " latents"]
    """What the partial correlation holds fixed."""


def exact_spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> ExactTest:
    """Spearman's rho of a few pairs and its p over all n! orders of y (five: 120).

    Ties get their mean rank; values that agree to twelve decimals are ties. Two-sided: the share
    of orders whose |rho| is at least the observed one, so never below 2/n! without ties.
    """
    from scipy.stats import rankdata

    assert len(x) <= 8, "n! orders"
    if np.isnan(x).any() or np.isnan(y).any():
        return ExactTest(np.nan, np.nan, "a group is empty or has no defined value")
    ranks = [rankdata(np.round(values, _DECIMALS)) for values in (x, y)]
    if any(np.ptp(r) == 0 for r in ranks):
        return ExactTest(np.nan, np.nan, "the same value in every group, so there is no order")
    a, b = ((r - r.mean()) / np.linalg.norm(r - r.mean()) for r in ranks)
    rhos = b[list(itertools.permutations(range(len(b))))] @ a  # the first is the observed order
    p = float((np.abs(rhos) >= abs(rhos[0]) - 1e-9).mean())
    return ExactTest(float(np.round(rhos[0], _DECIMALS)), p, "")


def holm_adjusted(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values; NaN stays NaN and does not count as a test.

    The i-th smallest of m times m - i + 1, at most 1, and never below that of a smaller one.
    """
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    stepped = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def rank_correlation(samples: Sequence[RankSample], *, partial: bool = False) -> Estimate:
    """Mean over seeds of the within-seed Spearman correlation of x and y, on Fisher's scale.

    Args:
        samples: of every seed; no NaN in x, y and given.
        partial: with `given` held fixed: of what x's and y's ranks have beyond it.
    Returns: NaN where a seed has fewer than three latents, or x or y never varies (or not beyond
        `given`). The interval is over latents and, where y is measured on tokens, documents.
    """
    found = []
    for sample in samples:
        value, parts = _spearman(sample.x, sample.y, sample.given if partial else None)
        without = [_without(sample, y, partial) for y in sample.y_without.T]
        lefts = np.array([left for left, _ in without])
        rest = np.array([part for _, part in without]).reshape(len(without), len(parts))
        found.append(LatentSample(value, lefts, parts, rest, len(parts)))
    if not found or not all(np.isfinite(sample.value) for sample in found):
        return no_estimate(np.nan, "firing rate or value never varies, or too few latents")
    return crossed(found, scale="fisher")


def _without(
    sample: RankSample, y: Float[np.ndarray, " latents"], partial: bool
) -> tuple[float, Float[np.ndarray, " latents"]]:
    """The correlation without a group of documents; a latent that fires in no other has no part."""
    known = np.isfinite(y)
    given = sample.given[known] if partial else None
    value, parts = _spearman(sample.x[known], y[known], given)
    spread = np.full(len(y), np.nan)
    spread[known] = parts
    return value, spread


def _spearman(
    x: Float[np.ndarray, " latents"],
    y: Float[np.ndarray, " latents"],
    given: Float[np.ndarray, " latents"] | None,
) -> tuple[float, Float[np.ndarray, " latents"]]:
    """The correlation of ranks and what every latent adds to it (its influence, over the number of
    latents)."""
    from scipy.stats import rankdata

    if len(x) < 3:
        return np.nan, np.full(len(x), np.nan)
    u, v = (_standardised(rankdata(np.round(values, _DECIMALS))) for values in (x, y))
    if given is not None:
        w = _standardised(rankdata(given))
        u, v = (_standardised(part - (part @ w / len(w)) * w) for part in (u, v))
    rho = float(u @ v / len(u))
    return rho, (u * v - rho * (u**2 + v**2) / 2) / len(u)


def _standardised(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean 0 and deviation 1; NaN where they never vary (but for rounding)."""
    off = values - values.mean()
    spread = off.std()
    return off / spread if spread > 1e-9 * max(1.0, np.abs(values).max()) else off * np.nan
