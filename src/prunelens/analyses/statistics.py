"""Intervals; the only place where anything is resampled or tested (methods §8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

FEWEST_FOR_BOOTSTRAP = 5  # seeds; below, the honest summary is the range


class Interval(NamedTuple):
    """An interval over seeds and what kind it is."""

    low: float
    high: float
    kind: Literal["range", "bootstrap"]


def interval_over_seeds(
    units: Sequence[tuple[int, ...]],
    statistic: Callable[[np.ndarray], float],
    *,
    seed: int = 0,
    draws: int = 1000,
) -> Interval:
    """Spread of `statistic` over seeds.

    Args:
        units: for every observation the seeds that it rests on, e.g. (0,) or a pair (0, 1).
        statistic: from a weight per observation (not all zero) to the value; NaN is left out.
        seed: of the bootstrap.
        draws: bootstrap resamples of the seeds.
    Returns: with fewer than five distinct seeds the smallest and largest value of a single
        observation (`range`), else the 2.5 and 97.5 percentiles over resampled seeds, where an
        observation counts as often as all of its seeds were drawn (`bootstrap`).
    """
    seeds = sorted({s for unit in units for s in unit})
    if len(seeds) < FEWEST_FOR_BOOTSTRAP:
        values = [statistic(weights) for weights in np.eye(len(units))]
        return Interval(*_span(values, 0, 100), "range")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = generator.choice(seeds, len(seeds))
        counts = {s: int((drawn == s).sum()) for s in seeds}
        weights = np.array([np.prod([counts[s] for s in unit]) for unit in units], dtype=float)
        if weights.any():
            values.append(statistic(weights))
    return Interval(*_span(values, 2.5, 97.5), "bootstrap")


def fisher_z(correlation: np.ndarray) -> np.ndarray:
    """atanh of a correlation, which is cut at +-(1 - 1e-6) so that 1 stays finite."""
    return np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6))


def _span(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return float("nan"), float("nan")
    return float(np.percentile(known, low)), float(np.percentile(known, high))
