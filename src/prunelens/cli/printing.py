"""Results on standard output: JSON for machines, tables for people."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from prunelens.console import Console
from prunelens.terminal import say

if TYPE_CHECKING:
    import pandas as pd

WIDE = 110  # letters; a narrower terminal wraps lines, which reads better than cells cut short


def print_json(content: Any) -> None:
    """JSON, indented."""
    say(json.dumps(content, indent=1))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON rows; NaN becomes null."""
    return json.loads(table.to_json(orient="records"))


def print_table(rows: pd.DataFrame) -> None:
    """A DataFrame for people; NaN is a dash."""
    table = Table(*rows.columns)
    for row in rows.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    (console if console.width >= WIDE else Console(width=WIDE)).print(table)


@contextlib.contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on standard error; gives a callback for the share that is done, 0 to 1."""
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return escape(str(value))
