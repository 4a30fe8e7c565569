"""What the page says of one question, and shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from prunelens.report.panels.panel import Panel, Site, Tables


class FigureOf(NamedTuple):
    """One of the paper's six figures, or of ours.

    A function of the tables and a site gives its panels from left to right, the paper's view first
    where there is one. Every number in a panel stands in a CSV; nothing is computed but means and
    ranges.
    """

    panels: Callable[[Tables, Site], list[Panel]]
    needs: tuple[str, ...]
    """Without the first of these tables there is no figure."""
    title: str


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    anchor: str
    title: str
    asks: str
    paper: str
    """How the paper answers it."""
    controlled: str
    """The control that could falsify that answer."""
    figures: Mapping[str, FigureOf] = field(default_factory=dict)
    """By the names of their files."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Shown in full: name -> caption. With a space in it the name is of one in `made`."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Shown on request, likewise."""
    assumed: Mapping[str, str] = field(default_factory=dict)
    """Of some of these tables what is assumed of the paper, or where we differ; the whole list is
    in docs/methods.md."""
    needs: tuple[str, ...] = ()
    """Results without any of which the question was not asked."""
    moved_by_sinks: bool = True
    """Whether it reads activations that sinks of the compressed model alone can change."""
    made: Callable[[Tables], dict[str, pd.DataFrame]] = lambda _: {}
    """Tables that are made for the page alone, by name; empty ones are not shown."""
    further: Callable[[Tables], Mapping[str, list[Panel]]] = lambda _: {}
    """Panels over all sites, by what they are called."""
