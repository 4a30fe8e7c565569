"""Panels -> what plotly.js draws on the page, as plain data."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

from prunelens.report.panels.panel import Panel, Points, shortened

DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot", "none": "solid"}
PLOT_HEIGHT, LEGEND_ROW, LABEL_ROW, LETTER = 250, 19, 16, 5.5  # pixels
LETTERS_ABREAST = 14  # of a category's name
MANY = 5  # more categories than this stand upright


def plotly_figure(panel: Panel) -> dict[str, Any]:
    """`data` and `layout` of plotly.js; NaN as null. Names of users are escaped for its markup."""
    data = [trace for points in panel.points for trace in _traces(panel, points)]
    shapes = [_shape(level.y, level.colour, bool(level.name)) for level in panel.levels]
    data += [_legend_of_level(level.name, level.colour) for level in panel.levels if level.name]
    num_named = sum(trace.get("showlegend", True) for trace in data)
    below = _label_height(panel) + LEGEND_ROW * num_named + 45
    layout: dict[str, Any] = {
        "height": PLOT_HEIGHT + below,
        "margin": {"l": 54, "r": 30, "t": 16, "b": below},
        "xaxis": {"title": {"text": panel.x_label}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": panel.y_label}, "automargin": True, "zeroline": False},
        "legend": {
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 11},
        },
        "shapes": shapes,
        "barmode": "group",
        "scattermode": "group",
        "scattergap": 0.25,
    }
    if panel.y_range:
        layout["yaxis"]["range"] = list(panel.y_range)
    if panel.categories is not None:
        words = [_category(name, panel) for name in panel.categories]
        layout["xaxis"] |= {
            "type": "category", "categoryorder": "array", "categoryarray": words,
            "range": [-0.6, len(words) - 0.4],
            "tickangle": -75 if len(words) > MANY else 0, "tickfont": {"size": 11},
        }  # fmt: skip
    elif panel.x_ticks:
        layout["xaxis"] |= {"tickmode": "array", "tickvals": panel.x_ticks}
    if panel.kind == "lines":
        layout["scattermode"] = "overlay"
    return {"data": data, "layout": layout}


def _traces(panel: Panel, points: Points) -> list[dict[str, Any]]:
    group = _text(points.name.removeprefix("paper: "))
    trace: dict[str, Any] = {
        "name": _text(shortened(points.name)),
        "x": [_category(x, panel) if isinstance(x, str) else x for x in points.x],
        "y": _numbers(points.y),
        "hovertemplate": "%{y:.4g}",
        "offsetgroup": group,
    }
    if points.low is not None and points.high is not None:
        ends = zip(points.low, points.high, strict=True)
        trace["customdata"] = [[_number(low), _number(high)] for low, high in ends]
        trace["hovertemplate"] = "%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
        trace["error_y"] = _error_bars(points)
    if panel.kind == "bars" and not points.hollow:
        return _bars(trace, points)
    marker: dict[str, Any] = {"color": points.colour, "symbol": points.marker, "size": 7}
    if points.hollow:
        marker |= {"symbol": f"{points.marker}-open", "size": 12, "line": {"width": 2}}
    if points.hollow and panel.kind == "bars":  # seen on a bar of its own colour
        marker |= {"symbol": points.marker, "color": "#ffffff"}
        marker["line"] |= {"color": points.colour}
    mode = "markers" if points.line == "none" else "lines+markers"
    trace |= {"type": "scatter", "mode": mode, "marker": marker}
    if points.line != "none":
        trace["line"] = {"color": points.colour, "dash": DASHES[points.line], "width": 2}
    if points.words:
        trace |= {
            "mode": f"{mode}+text", "text": [_text(word) for word in points.words],
            "textposition": "top center", "textfont": {"size": 10}, "cliponaxis": False,
        }  # fmt: skip
    return [trace]


def _bars(trace: dict[str, Any], points: Points) -> list[dict[str, Any]]:
    """A bar; where a part of it is shaded, that part as a bar of its own below the rest."""
    trace |= {"type": "bar", "marker": {"color": points.colour}}
    if points.shaded is None:
        return [trace]
    heights = zip(points.y, points.shaded, strict=True)
    error = trace | {
        "name": f"{trace['name']}: the SAE's own error",
        "y": _numbers(points.shaded),
        "hovertemplate": "%{y:.4g}",
        "marker": {"color": points.colour, "opacity": 0.5},
    }
    error.pop("error_y", None)
    rest = trace | {
        "base": _numbers(points.shaded),
        "y": _numbers([y - part for y, part in heights]),
        "text": [f"{y:.4g}" for y in points.y],
        "textposition": "none",
        "hovertemplate": trace["hovertemplate"].replace("%{y:.4g}", "%{text}"),
    }
    return [error, rest]


def _error_bars(points: Points) -> dict[str, Any]:
    low, high = points.low or [], points.high or []
    above = [max(0.0, h - y) for y, h in zip(points.y, high, strict=True)]
    below = [max(0.0, y - v) for y, v in zip(points.y, low, strict=True)]
    return {
        "type": "data", "symmetric": False, "array": _numbers(above), "arrayminus": _numbers(below),
        "thickness": 1.2, "width": 3, "color": points.colour,
    }  # fmt: skip


def _shape(y: float, colour: str, dashed: bool) -> dict[str, Any]:
    line = {"color": colour, "width": 1.2, "dash": "dash" if dashed else "solid"}
    return {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line,
        "layer": "below",
    }  # fmt: skip


def _legend_of_level(name: str, colour: str) -> dict[str, Any]:
    """plotly's legend knows no shapes: an empty series stands for the line."""
    return {
        "type": "scatter", "mode": "lines", "name": _text(shortened(name)),
        "x": [None], "y": [None],
        "line": {"color": colour, "dash": "dash", "width": 1.2},
    }  # fmt: skip


def _numbers(values: list[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _category(name: str, panel: Panel) -> str:
    """Along the x axis, in lines that stand beside each other on a phone."""
    return "<br>".join(_text(line) for line in _lines(name, panel))


def _lines(name: str, panel: Panel) -> list[str]:
    name = shortened(name)
    return [name] if len(panel.categories or []) > MANY else textwrap.wrap(name, LETTERS_ABREAST)


def _label_height(panel: Panel) -> int:
    """Of the words along the x axis, in pixels."""
    names = panel.categories or []
    if len(names) > MANY:
        return round(LETTER * max(len(shortened(name)) for name in names))
    return LABEL_ROW * max((len(_lines(name, panel)) for name in names), default=1)


def _text(text: str) -> str:
    """plotly reads a subset of HTML in every text."""
    return html.escape(text, quote=False)
