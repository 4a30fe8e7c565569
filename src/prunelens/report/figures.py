"""Panels -> figures for print. Every number drawn here stands in a CSV."""

from __future__ import annotations

import math
import pathlib
import textwrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunelens.report.panels.panel import Panel, Points, Site, shortened, sites
from prunelens.report.questions import figures
from prunelens.report.questions.section import FigureOf
from prunelens.temporary import replacing

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^"}
LINES = {"solid": "-", "dashed": "--", "dotted": ":", "none": ""}
VIEWS = {"paper": ", as published", "controlled": ", controlled", "check": ""}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a name is a $
    "hatch.linewidth": 0.6,
}
PANEL_WIDTH, PANEL_HEIGHT = 4.4, 3.9  # inches
MOST_AMONG_LINES = 3  # names in a legend that finds room beside the lines
LEGEND_ROW, LEGEND_ROW_OVER_WORDS = 0.065, 0.085  # of a panel's height; slanted words lower it
LETTERS_ABREAST = 62  # below a panel
TITLE_LETTERS = 44  # per line


def write_figures(tables: dict[str, pd.DataFrame], out: pathlib.Path) -> list[pathlib.Path]:
    """Draw the figures that the tables allow into `figures/` as .png and .pdf; returns the PNGs.

    A figure without data is not written, and one from an earlier run is removed.
    """
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure_of in figures().items():
            drawn = _draw(tables, figure_of)
            if drawn is None:
                for suffix in (".pdf", ".png"):
                    (folder / f"{name}{suffix}").unlink(missing_ok=True)
            else:
                written.append(_save(drawn, folder / name))
    return written


def _draw(tables: dict[str, pd.DataFrame], figure_of: FigureOf) -> Figure | None:
    """One row of panels per site; None where all of them are empty."""
    rows: list[tuple[Site, list[Panel]]] = []
    for site in sites(tables, figure_of.needs[:1]):
        panels = figure_of.panels(tables, site)
        if not all(panel.empty for panel in panels):
            rows.append((site, panels))
    if not rows:
        return None
    columns = max(len(panels) for _, panels in rows)
    size = (PANEL_WIDTH * columns, PANEL_HEIGHT * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (site, panels) in zip(grid, rows, strict=True):
        for axes, panel in zip(line, panels, strict=False):
            _draw_panel(axes, panel, site)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    return figure


def _draw_panel(axes: Axes, panel: Panel, site: Site) -> None:
    title = f"{site.label}{VIEWS[panel.protocol]}\n{_wrapped(panel.title)}"
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.empty:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    for level in panel.levels:
        style = "--" if level.name else "-"
        axes.axhline(level.y, color=level.colour, ls=style, lw=0.9, label=level.name or None)
    order = {name: float(index) for index, name in enumerate(panel.categories or [])}
    beside = _beside(panel)
    for points in panel.points:
        x = np.array([order[at] if isinstance(at, str) else at for at in points.x])
        x = x + beside[points.name]
        if panel.kind == "bars":
            _bars(axes, x, points, width=0.8 / max(1, len(_names_beside(panel))))
        else:
            _line(axes, x, points)
    _scales(axes, panel)


def _names_beside(panel: Panel) -> list[str]:
    """The series that stand side by side; the paper's stand where ours of that name do."""
    return list(dict.fromkeys(p.name.removeprefix("paper: ") for p in panel.points))


def _beside(panel: Panel) -> dict[str, float]:
    """How far each series is moved aside from its category."""
    names = _names_beside(panel)
    shift = dict.fromkeys(names, 0.0)
    if panel.kind != "lines":
        for index, name in enumerate(names):
            shift[name] = ((index + 0.5) / len(names) - 0.5) * 0.8
    return {p.name: shift[p.name.removeprefix("paper: ")] for p in panel.points}


def _line(axes: Axes, x: np.ndarray, points: Points) -> None:
    drawn = axes.errorbar(
        x,
        points.y,
        yerr=_errors(points),
        fmt=f"{MARKERS[points.marker]}{LINES[points.line]}",
        color=points.colour,
        markerfacecolor="none" if points.hollow else points.colour,
        markersize=8 if points.hollow else 4.5,
        capsize=2,
        lw=1.3,
        label=shortened(points.name),
    )
    above = 4 if points.line == "solid" else -9
    for place, y, word in zip(x, points.y, points.words or [], strict=False):
        axes.annotate(
            word, (place, y), xytext=(4, above), textcoords="offset points", fontsize=6.5,
            color=drawn.lines[0].get_color(),
        )  # fmt: skip


def _bars(axes: Axes, x: np.ndarray, points: Points, *, width: float) -> None:
    if points.hollow:
        axes.plot(
            x, points.y, "o", color=points.colour, markerfacecolor="white", markeredgewidth=1.6,
            markersize=7,
            label=shortened(points.name), zorder=4,
        )  # fmt: skip
        return
    axes.bar(
        x, points.y, width * 0.92, yerr=_errors(points), color=points.colour, capsize=2,
        label=shortened(points.name),
    )  # fmt: skip
    if points.shaded:
        axes.bar(
            x, points.shaded, width * 0.92, color="none", edgecolor="white", hatch="////", lw=0,
        )  # fmt: skip


def _errors(points: Points) -> Any:
    """Lengths below and above; an interval that leaves its point out is cut at the point."""
    if points.low is None or points.high is None:
        return None
    y, low, high = (np.array(v, dtype=float) for v in (points.y, points.low, points.high))
    return np.nan_to_num(np.clip([y - low, high - y], 0, None))


def _scales(axes: Axes, panel: Panel) -> None:
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.categories:
        _categories(axes, panel.categories)
    elif panel.x_ticks:
        axes.set_xticks(panel.x_ticks)
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    in_strip = panel.kind != "lines" or len(labels) > MOST_AMONG_LINES
    columns = 2 if in_strip else 1
    if in_strip:  # points anywhere: the legend has a strip of its own above them
        row = LEGEND_ROW if panel.kind == "lines" else LEGEND_ROW_OVER_WORDS
        _raise_ceiling(axes, row * math.ceil(len(labels) / columns))
    axes.legend(
        handles, labels, frameon=False, fontsize=6 if in_strip else 6.5, ncols=columns,
        loc="upper left" if in_strip else "best", handlelength=1.6, labelspacing=0.35,
        columnspacing=1.0, borderaxespad=0.2 if in_strip else 0.5,
    )  # fmt: skip


def _raise_ceiling(axes: Axes, share: float) -> None:
    """Room above the points for a legend; the scale ends where it did."""
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    axes.set_ylim(low, high + share * (high - low))
    axes.set_yticks(shown)


def _categories(axes: Axes, names: list[str]) -> None:
    """Words along the x axis, slanted where they would not fit."""
    words = [shortened(name, 30) for name in names]
    axes.set_xlim(-0.6, len(words) - 0.4)
    axes.set_xticks(range(len(words)), words, fontsize=7)
    if len(words) * max(map(len, words)) > LETTERS_ABREAST:
        for label in axes.get_xticklabels():
            label.set(rotation=55, horizontalalignment="right", rotation_mode="anchor")


def _wrapped(text: str, letters: int = TITLE_LETTERS) -> str:
    return "\n".join(textwrap.wrap(text, letters)) or text


def _save(figure: Figure, stem: pathlib.Path) -> pathlib.Path:
    """Both files of a figure. Drawing is what takes the time: once to each file, and no more."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)  # arranges the panels, once for both files
    # Not "none": that leaves a placeholder, for which every file is drawn twice.
    figure.set_layout_engine(None)
    for suffix in (".pdf", ".png"):
        with replacing(stem.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], dpi=150)
    return stem.with_suffix(".png")
