"""The command `selftest`: every measure asked about a world whose truth is known."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import typer

from prunelens.cli.options import AsJson, Out, Quiet, Settings, Workers, parsed
from prunelens.cli.printing import print_json, print_table, records, say_whole, with_interval
from prunelens.terminal import say

if TYPE_CHECKING:
    from prunelens.report.selftest import SelfTest

DEFAULT_OUT = pathlib.Path("runs/selftest")
NUMBERS = {  # heading -> column
    "defined": "share_defined",
    "AUC": "auc",
    "precision": "precision",
    "recall": "recall",
    "false survival": "false_survival",
    "bias, survived": "bias",
    "bias, rotated": "bias_rotated",
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

    for world, title in TITLES.items():
        rows = found.grades[found.grades["world"] == world]
        print_table(title, [_grade(row) for row in rows.to_dict("records")])
    print_table(
        "Where nothing is (noise in the place of what pruning did), what is found?",
        [_null(row) for row in found.nulls.to_dict("records")],
    )
    print_table(
        "Simulated: how often do 95 % intervals hold the truth, and are verdicts reached?",
        [_coverage(row) for row in found.coverage.to_dict("records")],
    )
    advice = [{"measure": name, "what to believe": told} for name, told in believe.items()]
    print_table("What to believe", advice)
    every = pd.concat([found.grades, found.nulls, found.coverage], ignore_index=True)
    marked, reached = every["mark"] != "", every["passed"].eq(True)
    say_whole(
        "defined: share of the living latents that were kept, rescaled, removed or rotated for"
        " which the measure has a value. bias: measure minus the planted cosine (scaling: minus the"
        " planted scale). rho: rank correlation with firing rate; true rho: that of the fates."
    )
    say_whole(
        f"{reached.sum()} of {marked.sum()} marked rows pass; {(~marked).sum()} rows (-) have no"
        " mark: their numbers say how far to trust them."
    )


def _grade(row: dict[str, Any]) -> dict[str, str]:
    """A measure in one world; what no mark covers has a dash."""
    from prunelens.report.selftest import row_name

    return {
        "measure": row_name(row["measure"], row["step"]),
        **{name: _number(row[column]) for name, column in NUMBERS.items()},
        "rho [95 %]": with_interval(row["rate_rho"], row["rate_low"], row["rate_high"], ".2f"),
        "true rho": _number(row["truth_rho"]),
        "mark": row["mark"] or "-",
        "result": _verdict(row),
    }


def _null(row: dict[str, Any]) -> dict[str, str]:
    """What is found where nothing is."""
    return {
        "world": row["world"],
        "measure": row["measure"],
        "of": row["source"],
        "what": row["statistic"],
        "value [95 %]": with_interval(row["value"], row["low"], row["high"], ".3f"),
        "should be": f"{row['nothing']:g}",
        "says nothing": "yes" if row["says_nothing"] is True else "no",
        "result": _verdict(row),
    }


def _coverage(row: dict[str, Any]) -> dict[str, str]:
    """How often an interval holds the truth, or a verdict is reached."""
    return {
        "interval or verdict": row["name"],
        "world": row["world"],
        "truth": _number(row["truth"]),
        "measured": f"{row['measured']:.1%}" if row["measured"] == row["measured"] else "-",
        "sets": f"{row['num_sets']:.0f}",
        "undefined": f"{row['num_undefined']:.0f}",
        "mark": row["mark"] or "-",
        "result": _verdict(row),
    }


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _verdict(row: dict[str, Any]) -> str:
    if not row["mark"]:
        return "-"
    return "passed" if row["passed"] is True else "MISSED"
