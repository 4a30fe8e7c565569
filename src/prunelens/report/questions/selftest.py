"""The self-test on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.panel import Tables
from prunelens.report.panels.selftest import selftest, world_of
from prunelens.report.questions.section import FigureOf, Section


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    made = _selftest(tables["selftest"]) if len(tables.get("selftest", ())) else {}
    if len(tables.get("selftest_null", ())):
        made["selftest null"] = _nothing(tables["selftest_null"])
    return made


def _selftest(grades: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One table per planted world, one row per measure; and what comes before training's end."""
    end, early = grades[grades["step"].isna()], grades[grades["step"].notna()]
    names = ["measure", "share_defined", "auc", "precision", "recall", "false_survival"]
    names += ["bias", "bias_rotated", "rate_rho", "rate_low", "rate_high", "truth_rho"]
    names += ["mark"]
    found = {}
    for world, part in end.groupby(world_of(end["run"]), sort=False):
        made = part[names].reset_index(drop=True)
        missed = "MISSED: " + part["reason"].fillna("").str.removeprefix("misses: ")
        passed = part["passed"].map({True: "passed"}).fillna("")
        made["verdict"] = missed.where(part["passed"].eq(False), passed).to_numpy()
        found[f"selftest {world}"] = made
    steps = early.assign(world=world_of(early["run"])) if len(early) else early
    if len(steps):
        wide = steps.pivot_table(index="step", columns="world", values="false_survival")
        found["selftest by step"] = wide.reset_index().astype({"step": int})
    return found


def _nothing(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a mark."""
    rows = rows[rows["mark"].notna() & (rows["mark"] != "")].reset_index(drop=True)
    names = ["measure", "source", "statistic", "value", "low", "high", "nothing", "passed"]
    return rows[names].assign(world=world_of(rows["run"]))[["world", *names]]


SELFTEST = Section(
    "selftest",
    "Self-test: do the measures tell the truth?",
    "In this planted world it is known what became of every feature. AUC: are survived features"
    " (kept, rescaled) told from destroyed ones (removed, rotated)? False survival: the share"
    " of destroyed ones that the measure calls survived. Bias: how far it is from the planted"
    " angle or scale. Its rank correlation with firing rate belongs beside that of the truth:"
    " a measure that depends on firing rate where the truth does not invents a pattern. Split"
    " and merged features, and those of which a part survived, are in the correlations alone;"
    " to matching by activations a rotated one has survived, because it fires where it did."
    " Where nothing is, nothing may be found; and intervals should hold the truth.",
    "",
    "",
    figures={
        "fig9_selftest": FigureOf(
            selftest, ("selftest",), "Figure 9: measures held against the truth"
        )
    },
    tables={
        "selftest independent": "Grades where fates do not depend on firing rate",
        "selftest by_rate": "Grades where rare features are destroyed more often",
        "selftest none": "Grades where nothing happened to any feature",
        "selftest by step": "False survival by a shared start, by training step",
        "selftest null": "What is found where nothing is, by measures that decide claims",
        "coverage": "Intervals and verdicts by simulation: how often they are right, and wrong",
    },
    more={"selftest": "Every grade", "selftest_null": "What every measure finds where nothing is"},
    needs=("selftest",),
    moved_by_sinks=False,
    made=_made,
)
