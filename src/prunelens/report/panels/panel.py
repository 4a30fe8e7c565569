"""What a panel of a figure is: points, intervals and levels, whatever draws them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from prunelens.match import TAU
from prunelens.report.published import beside_published, condition_of
from prunelens.study.results import table_columns

PRIMARY_TAU = TAU
Tables = dict[str, pd.DataFrame]
Protocol = Literal["paper", "controlled", "check"]  # check: of the measurement itself
Line = Literal["solid", "dashed", "dotted", "none"]
METHOD_COLOURS = {
    "magnitude": "#1f77b4",
    "wanda": "#ff7f0e",
    "dense": "#707070",
    "planted-independent": "#1f77b4",
    "planted-by_rate": "#c1440e",
    "planted-none": "#2ca02c",
}
OTHER_COLOURS = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2")
MARKERS = ("circle", "square", "diamond", "triangle-up")
LONE_MARKERS = {"dashed": "diamond", "dotted": "triangle-up"}


class Points(NamedTuple):
    """One series."""

    name: str
    x: list[float] | list[str]
    y: list[float]
    low: list[float] | None = None
    """Ends of the intervals; None: no intervals."""
    high: list[float] | None = None
    colour: str = METHOD_COLOURS["dense"]
    marker: str = "circle"
    line: Line = "solid"
    hollow: bool = False
    """The paper's own numbers are drawn hollow."""
    words: list[str] | None = None
    """A word beside each point."""
    shaded: list[float] | None = None
    """Of each bar, the part from 0 up that is drawn shaded."""


class Level(NamedTuple):
    """A horizontal line."""

    name: str
    y: float
    colour: str


class Panel(NamedTuple):
    """One pair of axes."""

    protocol: Protocol
    title: str
    x_label: str
    y_label: str
    points: list[Points]
    levels: tuple[Level, ...] = ()
    kind: Literal["lines", "dots", "bars"] = "lines"
    """dots and bars of several series stand side by side at each category."""
    y_range: tuple[float, float] | None = None
    categories: list[str] | None = None
    """The x values in order where they are words."""
    x_ticks: list[float] | None = None
    caption: str = ""
    """What the panel shows, in a sentence, for those who do not see it."""

    @property
    def empty(self) -> bool:
        """Nothing to draw."""
        return not any(len(points.y) for points in self.points)


class Site(NamedTuple):
    """A model and a layer."""

    model: str
    layer: int

    @property
    def label(self) -> str:
        """As in titles."""
        return f"{shortened(self.model)}, layer {self.layer}"


def sites(tables: Tables, names: Sequence[str]) -> list[Site]:
    """The sites of those tables, in order of appearance."""
    found: dict[Site, None] = {}
    for name in names:
        if name in tables and len(tables[name]):
            for model, layer in (
                tables[name][["model", "layer"]].drop_duplicates().itertuples(index=False)
            ):
                found[Site(str(model), int(layer))] = None
    return list(found)


def rows_of(tables: Tables, name: str, site: Site, **where: object) -> pd.DataFrame:
    """The rows of a table at a site whose columns have those values.

    A table of the output contract that is not there has its columns, and no rows.
    """
    if name not in tables:
        return pd.DataFrame(columns=table_columns().get(name))
    rows = tables[name]
    rows = rows[(rows["model"].astype(str) == site.model) & (rows["layer"] == site.layer)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def at_tau(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at the primary threshold, or without one."""
    return rows[rows["tau"].isna() | (rows["tau"] == PRIMARY_TAU)] if "tau" in rows else rows


def of_first_seed(rows: pd.DataFrame, column: str = "seed") -> pd.DataFrame:
    """The rows of each run's lowest seed: the paper compares conditions by its seed 0."""
    if not len(rows):
        return rows
    return rows[rows[column] == rows.groupby("run")[column].transform("min")]


def points_of(rows: pd.DataFrame, name: str, x: str, y: str, *ends: str, **style: Any) -> Points:
    """One series from two columns, of the rows that have a value; `ends`: of its intervals."""
    known = rows.dropna(subset=y)
    style |= dict(zip(("low", "high"), (list(known[end]) for end in ends), strict=False))
    return Points(name, list(known[x]), list(known[y]), **style)


def over_sparsity(
    rows: pd.DataFrame,
    column: str,
    *,
    spread: Literal["range", "std"],
    suffix: str = "",
    line: Line = "solid",
) -> list[Points]:
    """Means of a column, one series per method and scope, dense as the common first point."""
    if not len(rows):
        return []
    rows = rows.dropna(subset=column)
    dense = rows[rows["method"] == "dense"]
    found = [
        told_apart(
            _means(pd.concat([dense, part]), column, spread)._replace(
                name=_named(name, suffix), colour=colour_of(method), marker=marker, line=line
            )
        )
        for name, method, marker, part in families(rows)
    ]
    if not found and len(dense):
        found = [_means(dense, column, spread)._replace(name=_named("dense", suffix))]
    return found


def by_value(
    rows: pd.DataFrame, key: str, told: Mapping[str, tuple[str, Line]], column: str
) -> list[Points]:
    """`over_sparsity` of the rows with each of the values of `key`: value -> suffix and line."""
    return [
        series
        for value, (suffix, line) in told.items()
        for series in over_sparsity(
            rows[rows[key] == value], column, spread="range", suffix=suffix, line=line
        )
    ]


def told_apart(points: Points) -> Points:
    """A single point shows no line: its marker stands for the style."""
    if len(points.y) > 1:
        return points
    return points._replace(marker=LONE_MARKERS.get(points.line, points.marker))


def _named(name: str, suffix: str) -> str:
    return f"{name}, {suffix}" if suffix else name


def _means(rows: pd.DataFrame, column: str, spread: str) -> Points:
    groups = rows.groupby("sparsity")[column]
    centre = groups.mean()
    if spread == "std":
        deviation = groups.std().fillna(0)
        low, high = centre - deviation, centre + deviation
    else:
        low, high = groups.min(), groups.max()
    return Points("", list(centre.index), list(centre), list(low), list(high))


def families(rows: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Pruned rows by condition but for the sparsity: its name, method, marker and rows.

    Instead of the method the name, where that has a colour of its own.
    """
    if not len(rows):
        return
    pruned = rows[rows["method"] != "dense"]
    family = family_of(pruned["run"])
    seen: dict[str, int] = {}
    for name, part in pruned.groupby(family, sort=False):
        method = _method_of(str(name), part)
        marker = MARKERS[seen.get(method, 0) % len(MARKERS)]
        seen[method] = seen.get(method, 0) + 1
        yield str(name), method, marker, part


def colour_of_run(run: str, rows: pd.DataFrame) -> str:
    """The colour of a run, whose rows these are, where its sparsity does not matter."""
    return colour_of(_method_of(str(family_of(pd.Series([run])).iloc[0]), rows))


def _method_of(family: str, rows: pd.DataFrame) -> str:
    return family if family in METHOD_COLOURS else str(rows["method"].iloc[0])


def family_of(runs: pd.Series) -> pd.Series:
    """Conditions without their sparsity, as wanda-row."""
    return condition_of(runs).map(lambda name: re.sub(r"-0\.[0-9]+(?=-|$)", "", name))


def conditions(rows: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Pruned rows by condition: its name, colour (paler where less is pruned), marker, rows."""
    for _name, method, marker, part in families(rows):
        sparsities = sorted(part["sparsity"].unique())
        for rank, sparsity in enumerate(sparsities, start=1):
            chosen = part[part["sparsity"] == sparsity]
            name = str(condition_of(chosen["run"]).iloc[0])
            yield name, colour_of(method, rank / len(sparsities)), marker, chosen


def published_points(rows: pd.DataFrame, table: str, column: str) -> list[Points]:
    """The paper's numbers for the conditions among the rows, one hollow series per method."""
    if not len(rows):
        return []
    found = beside_published(rows.drop_duplicates("run"), table).dropna(subset=f"paper_{column}")
    style: dict[str, Any] = {"line": "none", "hollow": True}
    return [
        points_of(
            *(part, f"paper: {method}", "sparsity", f"paper_{column}"),
            colour=colour_of(str(method)),
            **style,
        )
        for method, part in found.sort_values("sparsity").groupby("method", sort=False)
    ]


def colour_of(method: str, strength: float = 1.0) -> str:
    """A method's colour as #rrggbb; mixed with white where strength is below 1."""
    named = METHOD_COLOURS.get(method)
    colour = named or OTHER_COLOURS[sum(map(ord, method)) % len(OTHER_COLOURS)]
    share = 0.45 + 0.55 * strength
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - channel) * share):02x}" for channel in channels)


def shortened(name: str, length: int = 40) -> str:
    """A long name with its middle left out."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def ticks(rows: pd.DataFrame) -> list[float]:
    """The sparsities among the rows."""
    return sorted(rows["sparsity"].dropna().unique()) if len(rows) else []
