"""What intervals and verdicts are worth, by simulation.

An interval of 95 % should hold the truth in 95 of 100 data sets, and hardly ever should a verdict
be reached where nothing is there. What reads pruned activations is asked by `simulation`: small
studies of the planted world through the code that real ones use; other intervals by `synthetic`:
numbers that vary over seeds, conditions, latents and documents as is stated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from prunelens import planted
from prunelens.analyses.claims import judge_claims
from prunelens.analyses.fragility import GROUPS, fragility_contrasts
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.simulation import SEEDS, simulated_fates
from prunelens.analyses.statistics import RankSample, rank_correlation
from prunelens.analyses.synthetic import SYNTHETIC

COVERS = (0.92, 0.98)  # what counts as 95 %
MOST_WRONG = 0.05  # share of sets in which a verdict may be reached that is wrong
SURE = 0.01  # a mark is missed where chance would make the measured share in one of so many tests
COLUMNS = [
    "world", "kind", "name", "truth", "measured", "low", "high", "num_sets", "num_undefined",
    "mark", "passed", "reason",
]  # fmt: skip
WITH_RATE = "rank correlation with firing rate"
STATISTICS = (*GROUPS, WITH_RATE)
WORLDS: tuple[planted.Choice, ...] = ("none", "by_rate")  # without an effect, and with one
# Means over 120 conditions of 48 documents (`large_sample`), in the order of STATISTICS.
TRUTHS: dict[tuple[str, str], tuple[float, ...]] = {
    ("none", "relative_shuffled"): (1, 1, 1, 1, 1, 1, 0, 0),  # by construction
}
RUNS = {"wanda": ("wanda-row-0.50", 0.5), "magnitude": ("magnitude-global-0.50", 0.5)}
PREDICTED = 6  # sets of two are joined to a study of four conditions in one of so many
WRONG = {  # claim -> its verdicts that are wrong where rare features are destroyed more often
    1: ("holds",),
    2: ("holds", "fails"),
    6: ("fails",),
    7: ("holds",),
    8: ("holds",),
}


class Found(NamedTuple):
    """One interval or one verdict of one set."""

    world: str
    kind: str
    """interval or verdict."""
    name: str
    truth: float
    """What an interval should hold; NaN of a verdict."""
    is_so: float
    """Whether the interval holds it, or the verdict was reached; NaN where there is none."""


def coverage(
    world: str, num_sets: int, *, progress: Callable[[int], None] | None = None
) -> pd.DataFrame:
    """How often intervals hold the truth and verdicts are wrong, with COLUMNS.

    Args:
        world: `none`, where there is no effect, `by_rate`, where there is one of known size, or
            `synthetic`.
        num_sets: simulated.
    Returns: kind (interval, verdict), name, truth (of an interval), measured (the share of sets
        whose interval holds it, or that reached the verdict), low and high (where the true share
        lies, with 99 %: Clopper and Pearson), num_sets, num_undefined (of them without an
        interval), mark and whether it is reached: the share may be 92 to 98 %, or at most 5 %. A
        verdict that is right has no mark.
    """
    found = pd.DataFrame(_found(world, num_sets, progress))
    rows = []
    for key, part in found.groupby(["world", "kind", "name"], sort=False):
        ...
    return pd.DataFrame(rows).reindex(columns=COLUMNS)
