"""Means over seeds, over windows of text."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Float

from prunelens.analyses.statistics.estimates import Estimate, jackknifed, no_estimate

MOST_STRETCHES = 20  # of neighbouring windows of a text


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
