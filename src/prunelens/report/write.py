"""A study folder -> its tables, figures and summary."""

from __future__ import annotations

import pathlib

import pandas as pd

from prunelens.config import StudyConfig
from prunelens.report.figures import write_figures
from prunelens.report.summary import print_summary
from prunelens.report.tables import write_tables
from prunelens.study.local import Outcome
from prunelens.study.run import alone_in, open_study, read_runs, run_study


def run_and_report(
    study: StudyConfig,
    out: pathlib.Path,
    *,
    device: str = "auto",
    workers: int | None = 1,
    quiet: bool = False,
) -> Outcome:
    """Run what is missing of a study, then write its tables and figures and print the summary.

    Arguments, errors and result as `run_study`; also a UserError where another process works in
    the same folder.
    """
    with alone_in(out):
        outcome = run_study(study, out, device=device, workers=workers, quiet=quiet)
        tables = write_report(out)
    if not quiet:
        print_summary(tables, read_runs(out))
    return outcome


def write_report(out: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Write `tables/`, `latents.parquet` and `figures/` of a study folder; returns the tables."""
    plan, store = open_study(out)
    tables = write_tables(plan, store, out)
    write_figures(tables, out)
    return tables
