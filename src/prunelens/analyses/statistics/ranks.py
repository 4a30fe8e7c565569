"""Rank correlations: exact over a few groups, bootstrapped over latents and seeds; Holm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from prunelens.analyses.statistics.intervals import DRAWS, span

_DRAWS_AT_A_TIME = 64  # weights of that many draws are in memory: 9 MB for 18,432 latents
_DECIMALS = 12  # values that differ by less are ties, not an order made by rounding


class ExactTest(NamedTuple):
    """A rank correlation with its exact permutation p."""

    rho: float
    """Spearman's, in [-1, 1]; NaN where `reason` says why."""
    p: float
    """Two-sided, over all orders."""
    reason: str


class RankSample(NamedTuple):
    """The latents of one seed, for several measures at once."""

    x: Float[np.ndarray, "latents measures"]
    y: Float[np.ndarray, "latents measures"]
    """NaN leaves the latent out of that measure."""
    given: Float[np.ndarray, " latents"]
    """What the partial correlation holds fixed."""


class Estimates(NamedTuple):
    """Values per measure with their 95 % interval; NaN where undefined."""

    value: Float[np.ndarray, " measures"]
    low: Float[np.ndarray, " measures"]
    high: Float[np.ndarray, " measures"]


class RankCorrelations(NamedTuple):
    """Mean over seeds of the within-seed rank correlation of x and y."""

    raw: Estimates
    partial: Estimates
    """The same given `RankSample.given`."""
    defined: Bool[np.ndarray, "seeds measures"]
    """Where the raw correlation exists: neither x nor y is constant."""


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


def rank_correlations(
    samples: Sequence[RankSample], *, seed: int, draws: int = DRAWS
) -> RankCorrelations:
    """Within-seed Spearman of x and y, raw and partial given `given`, averaged over seeds.

    The partial correlation is that of the ranks. The interval is a two-stage bootstrap: seeds with
    replacement, and within each drawn seed its latents with replacement. Ranks are those of the
    full seed sample, not of the draw: a draw then needs sums alone (`weights @ moments`, one
    weight matrix for all measures). Seeds and draws in which x or y never varies are left out.
    """
    moments = [_rank_moments(sample) for sample in samples]
    whole = np.concatenate([_correlations(m.sum(0, keepdims=True)) for m in moments])
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(samples), size=(draws, len(samples)))
    drawn = np.empty((*picks.shape, *whole.shape[1:]))  # [draws, seeds, 2, measures]
    for s, m in enumerate(moments):
        drawn[picks == s] = _resampled(m, int((picks == s).sum()), generator)
    value, means = _mean_of_known(whole, 0), _mean_of_known(drawn, 1)
    spans = np.array(
        [[span(column, 2.5, 97.5) for column in kind.T] for kind in means.swapaxes(0, 1)]
    )
    spans[np.isnan(value)] = np.nan
    raw, partial = (Estimates(v, s[:, 0], s[:, 1]) for v, s in zip(value, spans, strict=True))
    return RankCorrelations(raw, partial, ~np.isnan(whole[:, 0]))


def _rank_moments(sample: RankSample) -> Float[np.ndarray, "latents measures 10"]:
    """Products of every two of (1, x, y, given), in standardised ranks; 0 where y is NaN."""
    known = ~np.isnan(sample.y)
    parts = np.zeros((4, *known.shape))
    parts[0] = known
    for m, rows in enumerate(known.T):
        for part, values in enumerate((sample.x[:, m], sample.y[:, m], sample.given), start=1):
            parts[part, rows, m] = _standard_ranks(values[rows])
    pairs = itertools.combinations_with_replacement(parts, 2)
    return np.stack([a * b for a, b in pairs], axis=-1)


def _standard_ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    from scipy.stats import rankdata

    ranks = rankdata(values) - (len(values) + 1) / 2
    return ranks / ranks.std() if np.ptp(ranks) > 0 else ranks


def _resampled(
    moments: Float[np.ndarray, "latents measures 10"], count: int, generator: np.random.Generator
) -> Float[np.ndarray, "draws 2 measures"]:
    """Correlations of `count` resamples of the latents, a few at a time."""
    num, flat = len(moments), moments.reshape(len(moments), -1)
    results = [np.empty((0, 2, moments.shape[1]))]
    for start in range(0, count, _DRAWS_AT_A_TIME):
        size = min(_DRAWS_AT_A_TIME, count - start)
        drawn = generator.integers(num, size=(size, num)) + num * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * num).reshape(size, num)
        sums = weights.astype(float) @ flat
        results.append(_correlations(sums.reshape(size, *moments.shape[1:])))
    return np.concatenate(results)


def _correlations(
    sums: Float[np.ndarray, "draws measures 10"],
) -> Float[np.ndarray, "draws 2 measures"]:
    """Raw and partial correlation from sums of products; NaN where something never varies."""
    n, x, y, z, xx, xy, xz, yy, yz, zz = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = {"x": x / n, "y": y / n, "z": z / n}

        def covariance(total: np.ndarray, a: str, b: str) -> np.ndarray:
            return total / n - means[a] * means[b]

        variances = (covariance(xx, "x", "x"), covariance(yy, "y", "y"), covariance(zz, "z", "z"))
        sx, sy, sz = (np.sqrt(np.where(v > 1e-9, v, np.nan)) for v in variances)
        r_xy = covariance(xy, "x", "y") / (sx * sy)
        r_xz = covariance(xz, "x", "z") / (sx * sz)
        r_yz = covariance(yz, "y", "z") / (sy * sz)
        left = (1 - r_xz**2) * (1 - r_yz**2)
        partial = (r_xy - r_xz * r_yz) / np.sqrt(np.where(left > 1e-9, left, np.nan))
    return np.stack([r_xy, partial], axis=1)


def _mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)
