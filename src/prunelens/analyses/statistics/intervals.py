"""Means over seeds, over windows of text, over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from prunelens.analyses.statistics.estimates import Estimate, jackknifed, no_estimate

FEWEST_PROMPTS = 5
MOST_STRETCHES = 20  # of neighbouring windows of a text
DRAWS = 1000


def jackknife_over_seeds(rows: pd.DataFrame) -> Estimate:
    """Mean over conditions (each the mean of its values), with seeds left out in turn.

    The conditions are those of the study, not a sample; what varies are the seeds. Each is left out
    with every value that rests on it in any condition: with one value per seed this is the t
    interval of a mean, with pairs of seeds it is right as well, where treating pairs as independent
    is not.

    Args:
        rows: value (NaN is left out), condition, and seeds: a tuple of those the value rests on.
    Returns: no interval with fewer than two seeds, or where a condition rests on one.
    """
    known = rows[np.isfinite(rows["value"].to_numpy(float))]
    if known.empty:
        return no_estimate(math.nan, "no value of any seed")
    values, condition = known["value"].to_numpy(float), pd.factorize(known["condition"])[0]
    names = sorted({name for group in known["seeds"] for name in group}, key=str)
    uses = np.array([[name in group for group in known["seeds"]] for name in names])

    def mean(kept: np.ndarray) -> float:
        counts = np.bincount(condition, weights=kept)
        with np.errstate(invalid="ignore"):
            return float((np.bincount(condition, weights=kept * values) / counts).mean())

    without = np.array([mean(~used) for used in uses.astype(bool)])
    return jackknifed(mean(np.ones(len(values))), without, "seeds", fewest=2)


def interval_over_windows(values: Float[np.ndarray, " windows"]) -> Estimate:
    """The mean over windows of text; stretches of neighbouring windows are left out in turn."""
    stretches = np.array_split(values, min(MOST_STRETCHES, max(len(values), 1)))
    total = values.sum()
    without = [(total - s.sum()) / max(len(values) - len(s), 1) for s in stretches]
    mean = float(values.mean()) if len(values) else math.nan
    return jackknifed(mean, np.array(without), "stretches of text")


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
