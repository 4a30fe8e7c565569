"""The command `selftest`: every measure asked about a world whose truth is known."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table

from prunelens.cli.options import AsJson, Out, Quiet, Settings, Workers, parsed
from prunelens.cli.printing import print_json, records
from prunelens.console import Console
from prunelens.terminal import say

if TYPE_CHECKING:
    import pandas as pd

    from prunelens.report.selftest import SelfTest

DEFAULT_OUT = pathlib.Path("runs/selftest")
WIDE = 140  # letters; a narrower terminal wraps lines, which reads better than cells cut short
NUMBERS = {  # heading -> column
    "de-\nfined": "share_defined",
    "AUC": "auc",
    "prec.": "precision",
    "recall": "recall",
    "false\nsurv.": "false_survival",
    "bias,\nsurvived": "bias",
    "bias,\nrotated": "bias_rotated",
}
TITLES = {
    "independent": "Pruning chose features without regard to their firing rate",
    "by_rate": "Pruning preferred rare features",
    "none": "Pruning did nothing to any feature",
}


def selftest(
    out: Out = None,
    settings: Settings = None,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do the measures tell the truth where it is known? Exit code 1 if one misses its mark."""
    from prunelens.report.selftest import run_selftest, what_to_believe

    folder = out or DEFAULT_OUT
    found = run_selftest(folder, settings=parsed(settings), workers=workers, quiet=quiet or as_json)
    believe = what_to_believe(found.grades, found.nulls)
    if as_json:
        tables = {"rows": found.grades, "nulls": found.nulls, "coverage": found.coverage}
        told = {name: records(table) for name, table in tables.items()}
        verdict = {"passed": found.passed, "failures": found.failures}
        print_json({**verdict, **told, "believe": believe})
    elif not quiet:
        _show(found, believe)
        say(f"The rest of the study: {folder / 'report.html'}")
    if not as_json:
        for failure in found.failures:
            say(f"prunelens: {failure}", error=True)
    raise typer.Exit(0 if found.passed else 1)


def _show(found: SelfTest, believe: dict[str, str]) -> None:
    import pandas as pd

    console = Console() if Console().width >= WIDE else Console(width=WIDE)
    for world, title in TITLES.items():
        rows = found.grades[found.grades["world"] == world]
        if len(rows):
            console.print(_grades_table(rows, title))
    console.print(_nulls_table(found.nulls))
    console.print(_coverage_table(found.coverage))
    advice = Table("measure", "what to believe", title="What to believe", title_style="bold")
    for measure, sentence in believe.items():
        advice.add_row(measure, sentence)
    console.print(advice)
    every = pd.concat([found.grades, found.nulls, found.coverage], ignore_index=True)
    marked, reached = every["mark"] != "", every["passed"].eq(True)
    for line in (
        "defined: share of the living latents that were kept, rescaled, removed or rotated for"
        " which the measure has a value. bias: measure minus the planted cosine (scaling: minus the"
        " planted scale). rho: rank correlation with firing rate; true rho: that of the fates.",
        f"{reached.sum()} of {marked.sum()} marked rows pass; {(~marked).sum()} rows (-) have no"
        " mark: their numbers say how far to trust them.",
    ):
        console.print(line, highlight=False)


def _grades_table(rows: pd.DataFrame, title: str) -> Table:
    """One world; what no mark covers has a dash."""
    from prunelens.report.selftest import row_name

    numbers = (*NUMBERS, "rho with firing\nrate [95 %]", "true\nrho")
    table = _table(title, ("measure",), numbers)
    table.add_column("mark", max_width=31)
    table.add_column("result", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            row_name(row["measure"], row["step"]),
            *(_number(row[column]) for column in NUMBERS.values()),
            _interval(row["rate_rho"], row["rate_low"], row["rate_high"], 2),
            _number(row["truth_rho"]),
            row["mark"].replace("; ", "\n") or "-",
            _verdict(row),
        )
    return table


def _nulls_table(rows: pd.DataFrame) -> Table:
    """What is found where nothing is."""
    title = "Where nothing is (noise in the place of what pruning did), what is found?"
    numbers = ("value [95 %]", "should\nbe", "says\nnothing")
    table = _table(title, ("world", "measure", "of", "what"), numbers)
    table.add_column("result", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            *(row[name] for name in ("world", "measure", "source", "statistic")),
            _interval(row["value"], row["low"], row["high"]),
            f"{row['nothing']:g}",
            "yes" if row["says_nothing"] is True else "no",
            _verdict(row),
        )
    return table


def _coverage_table(rows: pd.DataFrame) -> Table:
    """How often intervals hold the truth, and verdicts are reached."""
    title = "Simulated: how often do 95 % intervals hold the truth, and are verdicts reached?"
    numbers = ("truth", "measured", "sets", "of these\nundefined")
    table = _table(title, ("world", "interval or verdict"), numbers)
    table.columns[1].no_wrap = False  # the longest name takes two lines
    table.add_column("mark", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for row in rows.to_dict("records"):
        counts = (f"{row[name]:.0f}" for name in ("num_sets", "num_undefined"))
        measured = f"{row['measured']:.1%}" if row["measured"] == row["measured"] else "-"
        truth = _number(row["truth"])
        table.add_row(
            row["world"], row["name"], truth, measured, *counts, row["mark"] or "-", _verdict(row)
        )
    return table


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _interval(value: float, low: float, high: float, decimals: int = 3) -> str:
    if value != value:
        return "-"
    return f"{value:.{decimals}f} \\[{low:.{decimals}f}, {high:.{decimals}f}]"


def _verdict(row: dict[str, Any]) -> str:
    if not row["mark"]:
        return "-"
    return "[green]passed[/]" if row["passed"] is True else "[bold red]MISSED[/]"
