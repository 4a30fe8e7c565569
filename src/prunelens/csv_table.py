"""Tables as CSV files in which no text is a formula.

Excel, LibreOffice and Google Sheets run a cell that begins with `=`, `+`, `-` or `@`, and names and
reasons come from elsewhere. A quote in front makes a cell text to them (OWASP, CSV injection).
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from prunelens.config.names import FORMULA_STARTS

QUOTE = "'"


def as_csv(table: pd.DataFrame) -> str:
    """The table as CSV without its index: numbers as they are, texts as `harmless` has them."""
    columns = {harmless(name): _harmless_column(column) for name, column in table.items()}
    return pd.DataFrame(columns, index=table.index).to_csv(index=False)


def harmless(cell: Any) -> Any:
    """A text that no spreadsheet takes for a formula; what is no text stays as it is.

    `as_written` undoes it, but for carriage returns, which become line feeds: a spreadsheet begins
    a row at one that is not in quotes.
    """
    if not isinstance(cell, str) or _is_number(cell):
        return cell
    text = cell.replace("\r\n", "\n").replace("\r", "\n")
    starts = (*FORMULA_STARTS, QUOTE)
    is_risky = cell.startswith(starts) or cell.lstrip().startswith(starts)
    return QUOTE + text if is_risky else text


def as_written(cell: Any) -> Any:
    """The text that `harmless` was given."""
    return cell.removeprefix(QUOTE) if isinstance(cell, str) else cell


def _harmless_column(column: pd.Series) -> pd.Series:
    """As objects: pandas would make 1.0 of a 1 beside a missing number."""
    if column.dtype.kind in "biufc":
        return column
    return pd.Series([harmless(cell) for cell in column], index=column.index, dtype=object)


def _is_number(text: str) -> bool:
    """Whether a text is a number, whose minus sign begins no formula."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text
