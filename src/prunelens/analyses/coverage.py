"""What the intervals and the verdicts are worth, by simulation: a 95 % interval should hold the
truth in 95 of 100 data sets, and a verdict should hardly ever be reached where nothing is there.

Intervals of what reads pruned activations come from `simulation`: small studies of the planted
world through the code that real ones use. Those of other numbers come from `synthetic` ones, whose
variation over seeds, latents and documents is stated there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from prunelens import planted
from prunelens.analyses.claims import judge_claims
from prunelens.analyses.fragility import fragility_contrasts
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.simulation import CONDITIONS, SEEDS, simulated_fates
from prunelens.analyses.statistics import Estimate, rank_correlation
from prunelens.analyses.synthetic import SYNTHETIC

NOMINAL = 0.95
COVERS = (0.92, 0.98)
MOST_FALSE = 0.05
COLUMNS = [
    "world", "kind", "name", "truth", "measured", "low", "high", "num_sets", "num_undefined",
    "mark", "passed", "reason",
]  # fmt: skip
MEASURES = ("persistence", "relative_shuffled")
SETS_PER_PREDICTOR = 2  # of which the second stands for another model: four conditions
PREDICTED = 4  # one in so many of these pairs, for fitting takes as long as simulating

# Of the world `by_rate` and, for persistence, of `none`: means over 200 sets of 48 documents.
# `python -m tests.independent.large_sample` makes them.
TRUTHS: dict[tuple[str, str, str, str], float] = {}


class Judged(NamedTuple):
    """One interval, or one verdict, of one set."""

    kind: str
    """interval, or verdict."""
    name: str
    truth: float
    """What the interval should hold; NaN for verdicts."""
    good: float
    """1 where the interval holds it, where the verdict was reached; NaN without an interval."""
