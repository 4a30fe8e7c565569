"""Everything that the table of fates says about the survival of each latent, by name.

The one place where a measure per latent gets its name; fragility sorts them by firing rate, grades
hold them against the planted truth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from prunelens.analyses.persistence import relative_to_noise

ARMS = (  # of a pruned condition, and of the dense one: what no pruning or a shared start shows
    *("shared_init", "shared_start", "cross_init", "warm_start"),
    *("ceiling_shared", "floor_shared", "ceiling_cross", "chance", "ceiling_warm", "floor_warm"),
)
WHOLE, FIRST_HALF = "firing_rate", "firing_rate_first_half"
NOISES = ("isotropic", "shuffled")


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


def latent_measures(fates: pd.DataFrame) -> dict[str, LatentMeasure]:
    """Name -> measure, for the columns that `fates` has (see `analyses.fates`).

    <arm>: cosine to the best match. activation_<arm>: correlation with it instead. subspace_<arm>:
    share of the direction inside the span of its nearest rows. persistence: correlation of the
    dense SAE's activations before and after; persistence_jaccard: overlap of where it fires;
    excess_<noise>: Fisher z of the former minus that of noise; relative_<noise>: the former as a
    share of what noise of equal size leaves. scaling: multiple of its direction that is there.
    """
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
    halves: dict[str, pd.Series] = {}
    for name in ("persistence", "persistence_jaccard"):
        if name in fates:
            halves[name] = fates[name]
    for noise in NOISES if "persistence" in fates else ():
        excess = fates["persistence_z"] - fates[f"persistence_z_noise_{noise}"]
        halves[f"excess_{noise}"] = excess
        halves[f"relative_{noise}"] = relative_to_noise(
            fates["persistence"], fates[f"persistence_noise_{noise}"]
        )
    if "scaling" in fates:
        halves["scaling"] = fates["scaling"]
    for name, series in halves.items():
        found[name] = LatentMeasure(_values(series), None, FIRST_HALF)
    return found


def _matched(fates: pd.DataFrame, value: str, mutual: str, rate: str) -> LatentMeasure:
    return LatentMeasure(_values(fates[value]), fates[mutual].eq(True).to_numpy(), rate)


def _values(series: pd.Series) -> np.ndarray:
    return series.to_numpy(dtype=float)
