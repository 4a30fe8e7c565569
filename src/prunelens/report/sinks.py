"""Sinks that only a compressed model has: what page and summary say of them."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from prunelens.report.panels.panel import Tables


class Sinks(NamedTuple):
    """A run with tokens whose norm passes the limit after compression alone."""

    run: str
    text: str
    """How many, and what the numbers are without them."""


def sinks_found(tables: Tables) -> list[Sinks]:
    """One entry per run that has some, of `tables/sinks.csv`."""
    rows = tables.get("sinks", pd.DataFrame(columns=["run", "num_sinks"]))
    found = []
    for run, part in rows.groupby("run", sort=False):
        if part["num_sinks"].any():
            found.append(Sinks(str(run), _in_words(part.set_index("split"))))
    return found


def _in_words(by_split: pd.DataFrame) -> str:
    """Of one run; FVU and participation ratio are of eval."""
    row = by_split.loc["eval"]
    counts = ", ".join(
        f"{each.num_sinks:,} of {each.num_tokens - each.num_left_out:,} {split} tokens"
        for split, each in by_split.iterrows()
    )
    numbers = ", ".join(
        f"{name} {row[column]:.3g} ({row[f'{column}_without']:.3g} without them)"
        for name, column in (("FVU", "fvu"), ("participation ratio", "participation_ratio"))
    )
    return (
        f"{counts} have a norm above the limit after compression alone, up to"
        f" {by_split['largest_norm'].max():.0f} dense medians; {numbers}"
    )
