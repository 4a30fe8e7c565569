"""The command `selftest`: every measure asked about a world whose truth is known."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from prunelens.cli.options import AsJson, Out, Quiet, Settings, Workers, parsed
from prunelens.cli.printing import print_json, records

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
    if as_json:
        rows = {"rows": records(found.grades), "believe": what_to_believe(found.grades)}
        print_json({"passed": found.passed, "failures": found.failures, **rows})
    elif not quiet:
        _show(found, what_to_believe(found.grades))
        print(f"The rest of the study: {folder / 'report.html'}")
    if not as_json:
        for failure in found.failures:
            print(f"prunelens: {failure}", file=sys.stderr)
    raise typer.Exit(0 if found.passed else 1)


def _show(found: SelfTest, believe: dict[str, str]) -> None:
    console = Console() if Console().width >= WIDE else Console(width=WIDE)
    for world, title in TITLES.items():
        rows = found.grades[found.grades["world"] == world]
        if len(rows):
            console.print(_grades_table(rows, title))
    advice = Table("measure", "what to believe", title="What to believe", title_style="bold")
    for measure, sentence in believe.items():
        advice.add_row(measure, sentence)
    console.print(advice)
    marked = found.grades["mark"] != ""
    reached = found.grades["passed"].eq(True)
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

    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("measure", no_wrap=True)
    for name in (*NUMBERS, "rho with firing\nrate [95 %]", "true\nrho"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mark", max_width=31)
    table.add_column("result", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            row_name(row["measure"], row["step"]),
            *(_number(row[column]) for column in NUMBERS.values()),
            _interval(row),
            _number(row["truth_rho"]),
            row["mark"].replace("; ", "\n") or "-",
            _verdict(row),
        )
    return table


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _interval(row: dict[str, Any]) -> str:
    rho, low, high = (row[name] for name in ("rate_rho", "rate_low", "rate_high"))
    return "-" if rho != rho else f"{rho:.2f} \\[{low:.2f}, {high:.2f}]"


def _verdict(row: dict[str, Any]) -> str:
    if not row["mark"]:
        return "-"
    return "[green]passed[/]" if row["passed"] is True else "[bold red]MISSED[/]"
