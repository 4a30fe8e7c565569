"""Figures 1 and 2: do seeds agree, and what is found again after pruning?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from prunelens.report.panels.panel import (
    PRIMARY_TAU,
    Level,
    Line,
    Panel,
    Points,
    Site,
    Tables,
    at_tau,
    by_value,
    colour_of,
    families,
    of_first_seed,
    over_sparsity,
    points_of,
    published_points,
    rows_of,
    ticks,
    told_apart,
)

ARM_COLOURS = {
    "ceiling_shared": "#2ca02c",
    "floor_shared": "#d62728",
    "ceiling_cross": "#9467bd",
    "chance": "#7f7f7f",
    "ceiling_warm": "#2ca02c",
    "floor_warm": "#d62728",
}
ARM_LABELS = {
    "ceiling_shared": "same start, no pruning",
    "floor_shared": "same start, nothing in common",
    "ceiling_cross": "other start, no pruning",
    "chance": "untrained",
    "ceiling_warm": "trained on without pruning",
    "floor_warm": "trained on, nothing in common",
}
SOURCE_LINES: dict[str, tuple[str, Line]] = {
    "pruned": ("pruned", "solid"),
    "noise_isotropic": ("noise: isotropic", "dotted"),
    "noise_shuffled": ("noise: shuffled", "dashed"),
    "undone": ("undone", "none"),
}
FROM_RANDOM = ("ceiling_shared", "floor_shared", "ceiling_cross", "chance")


def seed_stability(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 1; beside it, what the start of training alone contributes."""
    rows = at_tau(rows_of(tables, "stability", site))
    controls = rows_of(tables, "survival", site, coordinates="normalised", method="dense")
    paper = Panel(
        "paper",
        "between seeds (bars: s.d. over pairs)",
        "sparsity",
        f"MNN rate, tau {PRIMARY_TAU}",
        over_sparsity(rows, "mnn", spread="std") + published_points(rows, "stability", "mnn"),
        levels_of(at_tau(controls), "mnn", ["chance"]),
        x_ticks=ticks(rows),
        caption="Share of features that two seeds have in common, over sparsity.",
    )
    by_arm = []
    for arm in FROM_RANDOM:
        rates = controls[controls["arm"] == arm].groupby("tau")["mnn"].mean().reset_index()
        if len(rates):
            by_arm.append(points_of(rates, ARM_LABELS[arm], "tau", "mnn", colour=ARM_COLOURS[arm]))
    control = Panel(
        "controlled",
        "how much agreement is the start? (nothing pruned)",
        "tau",
        "MNN rate of dense dictionaries",
        by_arm,
        y_range=(-0.02, 1.02),
        caption="Agreement of dense dictionaries over the threshold, with and without a shared"
        " start of training.",
    )
    return [paper, control]


def survival(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 2 by its seed 0; corrected for the start; and without a second dictionary."""
    rows = at_tau(rows_of(tables, "survival", site, coordinates="normalised"))
    published = rows[rows["arm"] == "shared_init"]
    paper = Panel(
        "paper",
        "survival, and what it is without pruning or features",
        "sparsity",
        f"MNN rate to dense, tau {PRIMARY_TAU}",
        _first_seed_and_mean(published) + published_points(published, "survival", "mnn"),
        levels_of(rows, "mnn", FROM_RANDOM),
        y_range=(-0.02, 1.02),
        x_ticks=ticks(published),
        caption="Share of dense features found again after pruning, over sparsity: of the first"
        " seed (solid; the paper takes seed 0) and the mean over seeds with their range (dotted),"
        " with the same share where nothing was pruned and where there is no feature in common.",
    )
    return [paper, _corrected(tables, site), _persistence(tables, site)]


def _first_seed_and_mean(rows: pd.DataFrame) -> list[Points]:
    """MNN of the first seed as a line; beside it the mean over seeds, where there are several."""
    if not len(rows):
        return []
    first = over_sparsity(of_first_seed(rows, "init_a"), "mnn", spread="range")
    alone = [series._replace(low=None, high=None) for series in first]
    if rows["init_a"].nunique() == 1:
        return alone
    means = over_sparsity(rows, "mnn", spread="range", suffix="mean of seeds", line="dotted")
    return [s._replace(name=f"{s.name}, first seed") for s in alone] + means


def levels_of(rows: pd.DataFrame, column: str, arms: Sequence[str]) -> tuple[Level, ...]:
    """A line at the mean of a column for each of those control arms that are there."""
    means = rows.groupby("arm")[column].mean().dropna() if len(rows) else {}
    return tuple(
        Level(ARM_LABELS[arm], means[arm], ARM_COLOURS[arm]) for arm in arms if arm in means
    )


def _corrected(tables: Tables, site: Site) -> Panel:
    rows = at_tau(rows_of(tables, "survival_corrected", site))
    points = []
    lines: dict[str, Line] = {"shared": "solid", "cross": "dotted"}  # warm: figure 8
    for arm, line in lines.items():
        for name, method, marker, part in families(rows[rows["arm"] == arm]):
            style = {"colour": colour_of(method), "marker": marker, "line": line}
            columns = ("sparsity", "corrected", "low", "high")
            known = part.sort_values("sparsity")
            points.append(told_apart(points_of(known, f"{name}, {arm}", *columns, **style)))
    return Panel(
        "controlled",
        "0: as if nothing survived, 1: as if nothing was pruned",
        "sparsity",
        "corrected survival",
        [series for series in points if series.y],
        (
            Level("", 1.0, ARM_COLOURS["ceiling_shared"]),
            Level("", 0.0, ARM_COLOURS["floor_shared"]),
        ),
        x_ticks=ticks(rows),
        caption="Survival between its floor (0) and its ceiling (1), over sparsity.",
    )


def _persistence(tables: Tables, site: Site) -> Panel:
    rows = rows_of(tables, "persistence", site)
    return Panel(
        "controlled",
        "the dense SAE on the same tokens, beside noise of equal size",
        "sparsity",
        "persistence (mean correlation)",
        by_value(rows, "source", SOURCE_LINES, "mean_correlation"),
        y_range=(-0.02, 1.02),
        x_ticks=ticks(rows),
        caption="Correlation of each latent's activations before and after pruning, over sparsity,"
        " beside that for noise of the same size around the same common change, and after undoing"
        " that change.",
    )
