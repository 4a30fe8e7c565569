"""Intervals over seeds, over windows of text, over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from prunelens.analyses.statistics.estimates import t_quantile

FEWEST_FOR_BOOTSTRAP = 5  # seeds; below, the honest summary is the range
FEWEST_PROMPTS = 5
FEWEST_WINDOWS = 5
DRAWS = 1000


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
        return Interval(*span(values, 0, 100), "range")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = generator.choice(seeds, len(seeds))
        counts = {s: int((drawn == s).sum()) for s in seeds}
        weights = np.array([np.prod([counts[s] for s in unit]) for unit in units], dtype=float)
        if weights.any():
            values.append(statistic(weights))
    return Interval(*span(values, 2.5, 97.5), "bootstrap")


class JackknifeInterval(NamedTuple):
    """A mean over conditions with its interval over seeds."""

    mean: float
    low: float
    high: float
    resampled: str
    """What the interval accounts for, or why there is none."""


def jackknife_over_seeds(rows: pd.DataFrame, *, unit: str = "seeds") -> JackknifeInterval:
    """Mean over conditions (each the mean of its values), with a 95 % interval over seeds.

    The conditions are those of the study, not a sample; what varies are the seeds. Each is left out
    in turn, with every value that rests on it in any condition, and Student's t with seeds - 1
    degrees of freedom widens the spread of the pseudo-values: with one value per seed this is the
    t interval of a mean, with pairs of seeds it is right as well, where treating pairs as
    independent is not.

    Args:
        rows: value (NaN is left out), condition, and seeds: a tuple of those the value rests on.
        unit: what `seeds` holds, for the description.
    Returns: no interval (NaN) with fewer than two seeds, or where a condition rests on one.
    """
    known = rows[np.isfinite(rows["value"].to_numpy(float))]
    if known.empty:
        return JackknifeInterval(math.nan, math.nan, math.nan, f"no value to leave {unit} out of")
    values, condition = known["value"].to_numpy(float), pd.factorize(known["condition"])[0]
    names = sorted({name for group in known["seeds"] for name in group}, key=str)
    uses = np.array([[name in group for group in known["seeds"]] for name in names])

    def mean(kept: np.ndarray) -> float:
        counts = np.bincount(condition, weights=kept)
        with np.errstate(invalid="ignore"):
            return float((np.bincount(condition, weights=kept * values) / counts).mean())

    everything = mean(np.ones(len(values)))
    without = np.array([mean(~used) for used in uses.astype(bool)])
    if len(names) < 2 or np.isnan(without).any():
        return JackknifeInterval(everything, math.nan, math.nan, f"too few {unit} to leave one out")
    pseudo = len(names) * everything - (len(names) - 1) * without
    half = t_quantile(len(names) - 1) * pseudo.std(ddof=1) / math.sqrt(len(names))
    resampled = f"{unit}, left out in turn; t"
    return JackknifeInterval(everything, everything - half, everything + half, resampled)


def interval_over_windows(
    values: Float[np.ndarray, " windows"], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean over windows of text; NaN with fewer than five."""
    if len(values) < FEWEST_WINDOWS:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(values), size=(draws, len(values)))
    return span(values[drawn].mean(1), 2.5, 97.5)


class PromptTerm(NamedTuple):
    """What one group of latents adds to a contrast: sign times the mean over its latents."""

    sign: float
    """+1 or -1."""
    sums: Float[np.ndarray, "prompts latents"]
    """Per prompt and latent the sum over that latent's contexts in that prompt."""
    counts: Float[np.ndarray, "prompts latents"]
    """How many contexts that are."""


class PromptInterval(NamedTuple):
    """A mean, or a contrast of means, with its 95 % interval over prompts; NaN where undefined."""

    mean: float
    low: float
    high: float


def interval_over_prompts(
    terms: Sequence[PromptTerm], *, seed: int = 0, draws: int = DRAWS
) -> PromptInterval:
    """Sum of sign x mean over latents of (the latent's mean over its contexts).

    The interval is a percentile bootstrap over prompts: what belongs to a prompt is drawn together,
    in all terms alike (a contrast is therefore paired by prompt). Equal seeds and numbers of
    prompts give equal draws. A latent without a context in a draw is left out of that draw.

    Returns: NaN throughout where a term has no latent with a context; no interval where a term's
        contexts come from fewer than 5 prompts.
    """
    num_prompts = len(terms[0].sums)
    mean = float(_contrast(terms, np.ones((1, num_prompts)))[0])
    fewest = min(int(term.counts.any(1).sum()) for term in terms)
    if math.isnan(mean) or fewest < FEWEST_PROMPTS:
        return PromptInterval(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), draws)
    values = _contrast(terms, weights.astype(float))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return PromptInterval(mean, float(low), float(high))


def span(values: Sequence[float] | np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Two percentiles of the values that are known; NaN where none is."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return float("nan"), float("nan")
    return float(np.percentile(known, low)), float(np.percentile(known, high))


def _contrast(terms: Sequence[PromptTerm], weights: np.ndarray) -> Float[np.ndarray, " draws"]:
    """`weights` is [draws, prompts]."""
    total = np.zeros(len(weights))
    for sign, sums, counts in terms:
        with np.errstate(invalid="ignore"):
            latents = (weights @ sums) / (weights @ counts)  # [draws, latents]; 0 / 0 is NaN
            known = np.isfinite(latents)
            total += sign * np.where(known, latents, 0).sum(1) / known.sum(1)
    return total
