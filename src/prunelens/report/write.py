"""A study folder -> its tables, figures and summary."""

from __future__ import annotations

import pathlib

import pandas as pd

from prunelens.config import StudyConfig
from prunelens.report.figures import write_figures
from prunelens.report.page import write_page
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.summary import print_summary
from prunelens.report.tables import write_tables
from prunelens.study.local import Outcome
from prunelens.study.results import study_results
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
        tables = write_report(out, redraw=outcome.num_executed > 0)
    if not quiet:
        print_summary(tables, read_runs(out))
    return outcome


def write_report(out: pathlib.Path, *, redraw: bool = True) -> dict[str, pd.DataFrame]:
    """Write `tables/`, `latents.parquet`, `figures/` and `report.html` of a study folder.

    Args:
        out: the study's folder.
        redraw: draw figures and page also where they are younger than every table.
    Returns: the tables by name.
    """
    plan, store = open_study(out)
    tables = write_tables(study_results(plan, store), out)
    paper = write_paper_tables(tables, plan.study, out)
    if redraw or not _is_drawn(out):
        write_figures(tables, out)
        write_page(out, tables, read_runs(out), plan.study)
    return tables | paper


def _is_drawn(out: pathlib.Path) -> bool:
    """Whether the page, which is written last, is there and younger than the tables."""
    page = out / "report.html"
    if not page.is_file():
        return False
    written = [path.stat().st_mtime_ns for path in (out / "tables").glob("*.csv")]
    return page.stat().st_mtime_ns > max(written, default=0)
