"""Figures 4 and 5: are rare latents harmed less than frequent ones?"""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.panel import (
    PRIMARY_TAU,
    Level,
    Panel,
    Points,
    Site,
    Tables,
    at_tau,
    conditions,
    families,
    points_of,
    rows_of,
)
from prunelens.report.panels.survival import ARM_COLOURS, ARM_LABELS
from prunelens.report.published import beside_published

QUINTILES = ["Q1 rare", "Q2", "Q3", "Q4", "Q5 frequent"]
MEASURES = {
    "shared_init": "survival, same start (paper)",
    "shared_start": "survival, same start reordered",
    "cross_init": "survival, other start",
    "persistence": "persistence",
    "relative_shuffled": "relative to shuffled noise",
    "relative_isotropic": "relative to isotropic noise",
    "scaling": "scaling",
}
ZERO = Level("", 0.0, "#7f7f7f")


def fragility(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 4; beside it the measures that share no start, and the noise control."""
    published = _by_quintile(
        tables,
        site,
        "shared_init",
        "paper",
        "survival by firing rate, and of the start alone",
        f"MNN rate to dense, tau {PRIMARY_TAU}",
        (-0.02, 1.02),
    )
    return [
        published._replace(points=[*published.points, *_of_the_start(tables, site)]),
        _by_quintile(
            tables,
            site,
            "persistence",
            "controlled",
            "persistence by firing rate",
            "persistence (mean correlation)",
            None,
        ),
        _by_quintile(
            tables,
            site,
            "relative_shuffled",
            "controlled",
            "persistence as a share of what equal noise leaves",
            "relative to shuffled noise (ratio of means)",
            None,
        )._replace(levels=(Level("nothing beyond noise", 1.0, "#7f7f7f"),)),
    ]


def fragility_by_method(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 5, one panel per method; beside it correlations over single latents."""
    rows = at_tau(rows_of(tables, "fragility", site, measure="shared_init"))
    panels = [
        Panel(
            "paper",
            name,
            "firing rate, in fifths",
            f"MNN rate to dense, tau {PRIMARY_TAU}",
            _quintile_points(part),
            y_range=(-0.02, 1.02),
            categories=QUINTILES,
            caption=f"Survival by firing rate under {name} pruning, one line per sparsity.",
        )
        for name, _method, _marker, part in families(rows)
    ]
    tests = at_tau(rows_of(tables, "fragility_tests", site))
    return [
        *panels,
        _correlations(
            tests, ("latent_rho", "ci_low", "ci_high"), "firing rate and fate, per latent"
        ),
        _correlations(
            tests,
            ("partial_rho", "partial_low", "partial_high"),
            "the same, given each latent's distance from its start",
        ),
    ]


def _by_quintile(
    tables: Tables,
    site: Site,
    measure: str,
    protocol: str,
    title: str,
    y_label: str,
    y_range: tuple[float, float] | None,
) -> Panel:
    rows = at_tau(rows_of(tables, "fragility", site, measure=measure))
    null = rows["source"] == "null"
    points = _quintile_points(rows[~null], with_published=measure == "shared_init")
    for series in _quintile_points(rows[null], with_published=False):
        points.append(series._replace(name=f"{series.name}, null", line="dotted", hollow=True))
    return Panel(
        "paper" if protocol == "paper" else "controlled",
        title,
        "firing rate, in fifths",
        y_label,
        points,
        y_range=y_range,
        categories=QUINTILES,
        caption=f"{title.capitalize()}, from the rarest fifth of the latents to the most frequent.",
    )


def _of_the_start(tables: Tables, site: Site) -> list[Points]:
    """The same without pruning, and in a space with no feature in common: what a start makes."""
    points = []
    for arm in ("ceiling_shared", "floor_shared"):
        rows = at_tau(rows_of(tables, "fragility", site, measure=arm))
        style = {"colour": ARM_COLOURS[arm], "line": "dashed"}
        points.append(_over_quintiles(rows, ARM_LABELS[arm], **style))
    return [series for series in points if series.y]


def _quintile_points(rows: pd.DataFrame, *, with_published: bool = True) -> list[Points]:
    points = []
    for name, colour, marker, part in conditions(rows):
        points.append(_over_quintiles(part, name, colour=colour, marker=marker))
        if with_published:
            points += _published_ends(part.head(1), name, colour)
    return [series for series in points if series.y]


def _over_quintiles(rows: pd.DataFrame, name: str, **style: str) -> Points:
    places = dict(enumerate(QUINTILES, 1))
    placed = rows.sort_values("quintile").assign(place=rows["quintile"].map(places))
    return points_of(placed, name, "place", "survival_rate", **style)


def _published_ends(row: pd.DataFrame, name: str, colour: str) -> list[Points]:
    """The paper's Table 3 has the two ends."""
    found = beside_published(row, "fragility")[["paper_q1_rare", "paper_q5_frequent"]].iloc[0]
    if found.isna().any():
        return []
    ends = [QUINTILES[0], QUINTILES[-1]]
    return [Points(f"paper: {name}", ends, list(found), colour=colour, line="none", hollow=True)]


def _correlations(rows: pd.DataFrame, columns: tuple[str, str, str], title: str) -> Panel:
    """Rank correlations with their intervals, by measure and condition."""
    points = []
    for name, colour, marker, part in conditions(rows):
        known = part[part["measure"].isin(list(MEASURES)) & (part["source"] != "null")]
        known = known.assign(place=known["measure"].map(MEASURES))
        style = {"colour": colour, "marker": marker, "line": "none"}
        points.append(points_of(known, name, "place", *columns, **style))
    present = {place for series in points for place in series.x}
    return Panel(
        "controlled",
        title,
        "",
        "rank correlation with firing rate",
        [series for series in points if series.y],
        (ZERO,),
        kind="dots",
        categories=[label for label in MEASURES.values() if label in present],
        caption="Rank correlation of firing rate and survival over single latents, with 95 %"
        " intervals, by measure and condition.",
    )
