"""Results on standard output: JSON for machines, tables for people."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.progress import Progress
from rich.text import Text

from prunelens.console import Console
from prunelens.terminal import inert, say

if TYPE_CHECKING:
    import pandas as pd

GAP, INDENT = "  ", "    "
NO_LIMIT = 10**6  # letters of a line that is not for a terminal
READABLE = 40  # letters: a column of sentences is not made narrower
STYLES = {"passed": "green", "MISSED": "bold red", "done": "green", "failed": "red"}  # of cells


def print_json(content: Any) -> None:
    """JSON, indented."""
    say(json.dumps(content, indent=1))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON rows; NaN becomes null."""
    return json.loads(table.to_json(orient="records"))


def print_table(headline: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A headline, then rows of the same columns, whole at the width of the terminal.

    Where they do not fit beside each other, the widest columns, never the first, go to an indented
    second line of their row, as `name: value` where there is one. Sentences may be broken between
    words, numbers are not.
    A file or a pipe has no width: each row is one line of it, for `grep`, `less -S` and `sort`.

    Args:
        headline: what the table shows, in one sentence.
        rows: column -> text or number; NaN is a dash. Without any, nothing is printed.
    """
    if not rows:
        return
    say_whole(headline, "bold")
    console = _output()
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    widths = _widths(cells, console.width)
    right = {name for name in widths if all(row[name][:1] in "-+0123456789" for row in cells)}
    head = {name: name for name in widths}
    rule = {name: "-" * cell_len(name) for name in widths}
    for row in (head, rule, *cells):
        columns = [Text(row[name], STYLES.get(row[name], "")) for name in widths]
        wrapped = (t.wrap(console, w) for t, w in zip(columns, widths.values(), strict=True))
        for parts in itertools.zip_longest(*wrapped):
            texts = [part or Text() for part in parts]
            for part, name in zip(texts, widths, strict=True):
                part.align("right" if name in right else "left", widths[name])
            _print_line(Text(GAP).join(texts), console)
        below = {name: text for name, text in row.items() if name not in widths}
        told = (f"{name}: {text}" for name, text in below.items() if text not in ("", "-"))
        for line in _filled(told, console.width - len(INDENT)):
            for part in Text(line).wrap(console, console.width - len(INDENT)):
                _print_line(Text(INDENT).append_text(part), console)


def say_whole(text: str, style: str = "") -> None:
    """A sentence on standard output, broken between words where the terminal ends."""
    _output().print(Text(inert(text)), style=style)


def with_interval(value: float, low: float, high: float, number: str = ".3g") -> str:
    """A value, its interval where it has one; a dash where it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:{number}}" + ("" if math.isnan(low) else f" [{low:{number}}, {high:{number}}]")


def with_intervals(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """A copy in which the ends of an interval stand beside the value, not in columns of theirs."""
    table = table.copy()
    for name in names:
        ends = (table.pop(f"{name}_{end}") for end in ("low", "high"))
        table[name] = list(map(with_interval, table[name], *ends))
    return table


@contextlib.contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on standard error; gives a callback for the share that is done, 0 to 1."""
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _output() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=NO_LIMIT)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return inert(" ".join(str(value).split()))


def _widths(cells: Sequence[Mapping[str, str]], width: int) -> dict[str, int]:
    """Column -> letters, of the columns that fit beside each other."""
    texts = {name: [name, *(row[name] for row in cells)] for name in cells[0]}
    whole = {name: max(map(cell_len, column)) for name, column in texts.items()}
    words = {name: max(map(cell_len, " ".join(column).split())) for name, column in texts.items()}
    least = {name: min(width, max(words[name], min(whole[name], READABLE))) for name in texts}
    others = list(least)[1:]
    while others and _together(least) > width:
        others.remove(widest := max(reversed(others), key=least.__getitem__))
        del least[widest]
    for name in least:  # the rest is for sentences
        least[name] = min(whole[name], width - _together(least) + least[name])
    return least


def _together(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _filled(parts: Iterator[str], width: int) -> list[str]:
    """Lines of as many parts as go into them."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1] + GAP + part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(part)
    return lines


def _print_line(line: Text, console: Console) -> None:
    line.rstrip()
    console.print(line, soft_wrap=True)
