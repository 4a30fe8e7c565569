"""RQ1 on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.report.by_run import KEYS
from prunelens.report.panels.panel import Tables, at_tau
from prunelens.report.panels.survival import seed_stability
from prunelens.report.published import beside_published
from prunelens.report.questions.section import FigureOf, Section


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    if not len(tables.get("stability", ())):
        return {}
    return {"stability by run": _stability(tables["stability"])}


def _stability(table: pd.DataFrame) -> pd.DataFrame:
    groups = at_tau(table).groupby(KEYS, sort=False)
    made = groups[["mnn", "one_way", "greedy"]].mean().reset_index()
    made["pairs"] = groups.size().to_numpy()
    return beside_published(made, "stability")


STABILITY = Section(
    "stability",
    "RQ1: do two seeds find the same features?",
    "Two SAEs of the same model that differ only in their seed: what share of their features"
    " do they have in common?",
    "The share of mutual nearest neighbours between seeds, for every condition.",
    "The same share for dictionaries that start from equal weights, with nothing pruned and"
    " with no feature in common. It tells how much agreement the start alone makes.",
    figures={
        "fig1_seed_stability": FigureOf(
            seed_stability, ("stability", "survival"), "Figure 1: agreement between seeds"
        )
    },
    tables={"stability by run": "Seed stability at tau 0.7, means over pairs of seeds"},
    more={"stability": "Every pair of seeds"},
    needs=("stability",),
    made=_made,
)
