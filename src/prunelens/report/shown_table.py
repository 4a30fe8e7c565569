"""DataFrames -> tables for reading: rounded, with a dash and a footnote where nothing is known."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

UNKNOWN = "–"
PUBLISHED = "paper_"  # columns with the paper's numbers
REASONS = ("reason", "paper_note")


class Cell(NamedTuple):
    """One cell as shown."""

    text: str
    numeric: bool = False
    published: bool = False
    """A number of the paper."""
    note: int | None = None
    """Number of the footnote that says why it is unknown."""


class Shown(NamedTuple):
    """A table as shown."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    """Reasons, numbered from 1."""
    file: str | None
    """The CSV that holds it in full, relative to the page."""
    assumed: str = ""
    """What differs from the paper, or is assumed of it."""
    meanings: Mapping[str, str] = {}
    """What columns mean, as they are shown."""


def shown(
    table: pd.DataFrame,
    caption: str,
    *,
    drop: tuple[str, ...] = (),
    file: str | None = None,
    assumed: str = "",
    meanings: Mapping[str, str] = {},
) -> Shown:
    """The table for reading; columns in `drop`, and those of which nothing is known, are left out.

    A table's own column `reason` becomes footnotes at the unknown cells of its row.
    """
    reasons = table["reason"] if "reason" in table else pd.Series("", index=table.index)
    remarks = table["paper_note"] if "paper_note" in table else pd.Series("", index=table.index)
    explained = any(map(_said, reasons))
    kept = [
        name
        for name in table
        if name not in (*drop, *REASONS)
        and (table[name].notna().any() or (explained and not str(name).startswith(PUBLISHED)))
    ]
    numeric = {name: pd.api.types.is_numeric_dtype(table[name]) for name in kept}
    notes: list[str] = []
    rows = []
    for index, row in enumerate(table[kept].to_dict("records")):
        why, remark = _said(reasons.iloc[index]), _said(remarks.iloc[index])
        cells = []
        for name in kept:
            published = str(name).startswith(PUBLISHED)
            cell = _cell(row[name], published, numeric[name])
            said = remark if published else why
            marked = cell.text == UNKNOWN or (remark and name == "paper_perplexity")
            if marked and said:
                if said not in notes:
                    notes.append(said)
                cell = cell._replace(note=notes.index(said) + 1)
            cells.append(cell)
        rows.append(cells)
    told = {_heading(name): meaning for name, meaning in meanings.items()}
    return Shown(caption, [_heading(str(name)) for name in kept], rows, notes, file, assumed, told)


def number(value: Any) -> str:
    """Rounded for reading: three decimals, or four figures where it is large or tiny."""
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return UNKNOWN if math.isnan(value) else str(value)
    size = abs(value)
    if size >= 1e6:
        return f"{value:.3e}"
    if size >= 100:
        return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
    if size >= 10 and value != round(value):
        return f"{value:.2f}"
    if 0 < size < 0.001:
        return f"{value:.2e}"
    return f"{value:.3f}" if value != round(value) or size < 1 else f"{value:g}"


def _cell(value: Any, published: bool, numeric: bool) -> Cell:
    if value is None or value is pd.NA or value == "" or value != value:
        return Cell(UNKNOWN, numeric, published)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return Cell(str(value), published=published)
    return Cell(number(value), numeric, published)


def _said(reason: Any) -> str:
    return reason if isinstance(reason, str) else ""


def _heading(name: str) -> str:
    """As in the CSV, with spaces; the paper's columns say so."""
    if name.startswith(PUBLISHED):
        return f"paper: {name.removeprefix(PUBLISHED).replace('_', ' ')}"
    return name.replace("_", " ")
