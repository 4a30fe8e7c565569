"""Figure 9: which measures tell the truth where it is known?"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from prunelens.analyses.coverage import COVERS
from prunelens.analyses.grades import AUC_MARK, FALSE_SURVIVAL_MARK
from prunelens.report.panels.panel import (
    Level,
    Panel,
    Points,
    Site,
    Tables,
    colour_of,
    family_of,
    points_of,
    rows_of,
)

WORLDS = {
    "independent": "fates independent of firing rate",
    "by_rate": "rare features destroyed more often",
    "none": "nothing happened to any feature",
}
ZERO = Level("", 0.0, "#7f7f7f")
ONE = Level("", 1.0, "#7f7f7f")


def selftest(tables: Tables, site: Site) -> list[Panel]:
    """AUCs; what depends on firing rate, in every world; what is found where nothing is, and how
    often intervals are right; and what hardly trained SAEs feign."""
    rows = rows_of(tables, "selftest", site)
    grades = rows[rows["step"].isna()]
    by_rate = [
        _against_rate(f"dependence on firing rate: {label}", part)
        for label, _colour, part in _worlds(grades)
    ]
    nulls = rows_of(tables, "selftest_null", site)
    nothing = [_nothing(nulls, ZERO), _nothing(nulls, ONE)]
    return [_separation(grades), *by_rate, *nothing, _coverage(tables, site), _feigned(rows)]


def world_of(runs: pd.Series) -> pd.Series:
    """`independent`, `by_rate` or `none`, from run names."""
    return family_of(runs).str.removeprefix("planted-")


def measure_name(measure: str) -> str:
    """For reading: `activation: cross init`."""
    for whole in ("activation_", "subspace_"):
        if measure.startswith(whole):
            measure = f"{whole[:-1]}: {measure.removeprefix(whole)}"
    return measure.replace("_", " ")


def _separation(rows: pd.DataFrame) -> Panel:
    points = []
    for label, colour, part in _worlds(rows):
        part = part.assign(name=part["measure"].map(measure_name))
        points.append(points_of(part, label, "name", "auc", colour=colour, line="none"))
    lowest = min([AUC_MARK, *(value for series in points for value in series.y)])
    return Panel(
        "check",
        "survived features told from destroyed ones",
        "",
        "AUC",
        points,
        (Level(f"mark {AUC_MARK}", AUC_MARK, "#7f7f7f"),),
        kind="dots",
        y_range=(lowest - 0.02, 1.005),
        categories=list(dict.fromkeys(name for series in points for name in map(str, series.x))),
        caption="For every measure, how well it tells planted features that survived from those"
        " that were destroyed: 1 always, 0.5 not at all.",
    )


def _against_rate(title: str, rows: pd.DataFrame) -> Panel:
    known = rows.dropna(subset="rate_rho")
    known = known.assign(name=known["measure"].map(measure_name))
    columns, colour = ("rate_rho", "rate_low", "rate_high"), next(iter(_worlds(rows)))[1]
    measured = points_of(known, "measure", "name", *columns, colour=colour, line="none")
    truth = list(known["truth_rho"])
    points = [measured, Points("truth", measured.x, truth, line="none", marker="diamond")]
    return Panel(
        "check",
        title,
        "",
        "rank correlation with firing rate",
        points if measured.y else [],
        (ZERO,),
        kind="dots",
        categories=list(known["name"]),
        caption="Rank correlation of firing rate and of every measure, with 95 % intervals, beside"
        " that of firing rate and of what was planted.",
    )


def _nothing(rows: pd.DataFrame, level: Level) -> Panel:
    """What measures that decide claims say where nothing is, and should be at this level."""
    points, every = [], []
    rows = rows[rows["mark"].fillna("").ne("") & rows["nothing"].eq(level.y)]
    for label, colour, part in _worlds(rows):
        names = [
            f"{measure_name(row.measure)}, {row.statistic} ({row.source})"
            for row in part.itertuples()
        ]
        value, low, high = (list(part[name]) for name in ("value", "low", "high"))
        points.append(Points(label, names, value, low, high, colour=colour, line="none"))
        every += names
    return Panel(
        "check",
        f"found where nothing is: should be {level.y:g}",
        "",
        "value",
        points,
        (level,),
        kind="dots",
        categories=list(dict.fromkeys(every)),
        caption="Measures by which claims are decided, with 95 % intervals, where noise stands in"
        " the place of what pruning did.",
    )


def _coverage(tables: Tables, site: Site) -> Panel:
    """How often simulated intervals hold the truth."""
    rows = tables.get("coverage", pd.DataFrame())
    if len(rows):
        of_site = rows["run"].str.startswith(f"{site.model}/L{site.layer}/")
        rows = rows[of_site & (rows["kind"] == "interval")]
    points, every = [], []
    for world, part in rows.groupby("world", sort=False) if len(rows) else ():
        names, share = list(part["name"]), list(part["measured"])
        points.append(Points(str(world), names, share, line="none"))
        every += names
    return Panel(
        "check",
        "95 % intervals that hold the truth",
        "",
        "share of simulated sets",
        points,
        tuple(Level(f"{share:.0%}", share, "#7f7f7f") for share in COVERS),
        kind="dots",
        y_range=(min([0.9, *(y for series in points for y in series.y)]) - 0.01, 1.005),
        categories=list(dict.fromkeys(every)),
        caption="Of intervals whose truth is known, the share that holds it, over simulated sets.",
    )


def _feigned(rows: pd.DataFrame) -> Panel:
    """What the shared-init arm says of destroyed features while SAEs are trained."""
    points = []
    for label, colour, part in _worlds(rows):
        known = part.dropna(subset="step").sort_values("step").astype({"step": float})
        points.append(points_of(known, label, "step", "false_survival", colour=colour))
    return Panel(
        "check",
        "destroyed, and called survived by a shared start",
        "training step",
        "false survival (shared_init)",
        [series for series in points if series.y],
        (Level(f"mark of the first: {FALSE_SURVIVAL_MARK}", FALSE_SURVIVAL_MARK, "#7f7f7f"),),
        y_range=(-0.02, 1.02),
        caption="Share of destroyed features that the comparison with a shared start calls"
        " survived, over the steps of training.",
    )


def _worlds(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Label, colour and rows of every world."""
    if not len(rows):
        return
    for world, part in rows.groupby(world_of(rows["run"]), sort=False):
        yield WORLDS.get(str(world), str(world)), colour_of(f"planted-{world}"), part
