"""Figure 7: did the SAEs leave their start, and would more steps change them?"""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.sufficiency import RETENTION_LIMIT
from prunelens.report.panels.identity import ARM_LINES
from prunelens.report.panels.panel import (
    PRIMARY_TAU,
    Level,
    Panel,
    Points,
    Site,
    Tables,
    at_tau,
    colour_of_run,
    rows_of,
)
from prunelens.report.published import condition_of


def training(tables: Tables, site: Site) -> list[Panel]:
    """FVU, distance from the start, and survival, while the SAEs were trained."""
    curves = rows_of(tables, "training_curves", site)
    limit = Level(f"limit {RETENTION_LIMIT}", RETENTION_LIMIT, "#d62728")
    return [
        _curves(curves, "fvu", "reconstruction", "FVU"),
        _curves(curves, "mean_init_retention", "distance from the start", "mean cosine", limit),
        _survival(at_tau(rows_of(tables, "survival_by_step", site))),
    ]


def _curves(
    rows: pd.DataFrame, column: str, title: str, y_label: str, *levels: Level
) -> Panel:  # fmt: skip
    """One line per run that was looked at before its end, and one for a longer training."""
    points = []
    for run, part in rows.groupby("run", sort=False):
        own = part["total_steps"] == part["total_steps"].min()
        if part.loc[own, "step"].nunique() < 2:
            continue
        name, colour = _name_and_colour(str(run), part)
        points.append(_over_steps(part[own], column)._replace(name=name, colour=colour))
        if not own.all():
            longer = _over_steps(part[~own], column)
            named = longer._replace(name=f"{name}, one seed twice as long", line="dashed")
            points.append(named._replace(colour=colour, marker="square"))
    return Panel(
        "check",
        title,
        "training step",
        y_label,
        points,
        levels,
        caption=f"{title.capitalize()} of the dense and of one pruned condition's SAEs over the"
        " steps of their training, and of one seed of each trained for twice as long.",
    )


def _survival(rows: pd.DataFrame) -> Panel:
    """Dense against pruned SAEs of the same step, with and without a shared start."""
    points = []
    for run, part in rows.groupby("run", sort=False):
        name, colour = _name_and_colour(str(run), part)
        for arm, (label, line) in ARM_LINES.items():
            series = _over_steps(part[part["arm"] == arm], "mnn")
            points.append(series._replace(name=f"{label}, {name}", colour=colour, line=line))
    return Panel(
        "check",
        "survival, both SAEs at that step",
        "training step",
        f"MNN rate to dense, tau {PRIMARY_TAU}",
        [series for series in points if series.y],
        y_range=(-0.02, 1.02),
        caption="Share of dense features found again after pruning over the steps of training,"
        " where both SAEs start from the same weights and where they do not.",
    )


def _name_and_colour(run: str, rows: pd.DataFrame) -> tuple[str, str]:
    return str(condition_of(pd.Series([run])).iloc[0]), colour_of_run(run, rows)


def _over_steps(rows: pd.DataFrame, column: str) -> Points:
    """Means with ranges over what there is of every step."""
    groups = rows.dropna(subset=column).groupby("step")[column]
    steps = [float(step) for step in groups.mean().index]
    return Points("", steps, list(groups.mean()), list(groups.min()), list(groups.max()))
