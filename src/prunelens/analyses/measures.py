"""Everything that the table of fates says about the survival of each latent, by name.

The one place where a measure per latent gets its name; fragility sorts them by firing rate, grades
hold them against the planted truth.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from prunelens.analyses.persistence import NOISES, relative_to_noise

ARMS = (  # of a pruned condition, and of the dense one: what no pruning or a shared start shows
    *("shared_init", "shared_start", "cross_init", "warm_start"),
    *("ceiling_shared", "floor_shared", "ceiling_cross", "chance", "ceiling_warm", "floor_warm"),
)
WHOLE, FIRST_HALF = "firing_rate", "firing_rate_first_half"
Source = Literal["pruned", "null"]


class Means(NamedTuple):
    """Of a measure whose group value is a mean over latents, or a ratio of two means."""

    above: Float[np.ndarray, " rows"]
    above_without: Float[np.ndarray, "rows groups"]
    """Without each group of documents."""
    below: Float[np.ndarray, " rows"]
    """1 for a plain mean."""
    below_without: Float[np.ndarray, "rows groups"]


class LatentMeasure(NamedTuple):
    """One way to say how well each latent survived."""

    value: Float[np.ndarray, " rows"]
    """The more, the better it survived; NaN where undefined."""
    mutual: Bool[np.ndarray, " rows"] | None
    """Of a match: whether it is mutual. None: the measure matches nothing."""
    rate: str
    """The column of firing rates that may sort it: persistence and scaling are measured on the
    second half of the eval documents, and no latent is to be chosen by the noise that it is judged
    by."""
    means: Means | None = None
    """What a group's value and its interval are made from; None: the mean of `value`."""


def latent_measures(fates: pd.DataFrame, source: Source = "pruned") -> dict[str, LatentMeasure]:
    """Name -> measure, for the columns that `fates` has (see `analyses.fates`).

    <arm>: cosine to the best match. activation_<arm>: correlation with it instead. subspace_<arm>:
    share of the direction inside the span of its nearest rows. persistence: correlation of the
    dense SAE's activations before and after; persistence_jaccard: overlap of where it fires;
    persistence_undone: the former after undoing the common change; excess_<noise>: Fisher z of the
    former minus that of noise; relative_<noise>: the former as a multiple of what noise of equal
    size leaves. scaling: multiple of its direction that is there.
    Args: source: `null` gives what those that read pruned activations say where nothing is there.
    """
    found = {} if source == "null" else _of_dictionaries(fates)
    tail = "" if source == "pruned" else f"_{source}"
    halves: dict[str, pd.Series] = {}
    for name, column in (
        ("persistence", f"persistence{tail}"),
        ("persistence_jaccard", f"persistence_jaccard{tail}"),
        ("persistence_undone", f"persistence_undone{tail}"),
        ("scaling", f"scaling{tail}"),
    ):
        if column in fates:
            halves[name] = fates[column]
    means = {}
    for noise in NOISES if f"persistence{tail}" in fates else ():
        own, other = f"persistence{tail}", f"persistence_noise_{noise}"
        halves[f"excess_{noise}"] = fates[f"{own}_z"] - fates[f"{other}_z"]
        name = f"relative_{noise}"
        halves[name] = pd.Series(relative_to_noise(_values(fates[own]), _values(fates[other])))
        above, below = (np.stack(fates[f"{each}_without"]) for each in (own, other))
        means[name] = Means(_values(fates[own]), above, _values(fates[other]), below)
        means["persistence"] = Means(
            _values(fates[own]), above, np.ones(len(fates)), np.ones(above.shape)
        )
    for name, series in halves.items():
        found[name] = LatentMeasure(_values(series), None, FIRST_HALF, means.get(name))
    return found


def _of_dictionaries(fates: pd.DataFrame) -> dict[str, LatentMeasure]:
    """Those that compare two SAEs."""
    found = {}
    for arm in ARMS:
        if f"cosine_{arm}" in fates:
            found[arm] = _matched(fates, f"cosine_{arm}", f"mutual_{arm}", WHOLE)
    for arm in ARMS:
        if f"activation_correlation_{arm}" in fates:
            names = (f"activation_correlation_{arm}", f"activation_mutual_{arm}")
            found[f"activation_{arm}"] = _matched(fates, *names, FIRST_HALF)
    for arm in ARMS:
        if f"subspace_{arm}" in fates:
            found[f"subspace_{arm}"] = LatentMeasure(_values(fates[f"subspace_{arm}"]), None, WHOLE)
    return found


def _matched(fates: pd.DataFrame, value: str, mutual: str, rate: str) -> LatentMeasure:
    return LatentMeasure(_values(fates[value]), fates[mutual].eq(True).to_numpy(), rate)


def _values(series: pd.Series) -> np.ndarray:
    return series.to_numpy(dtype=float)
