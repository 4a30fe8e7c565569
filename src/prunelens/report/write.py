"""A study folder -> its tables, figures and summary."""

from __future__ import annotations

import hashlib
import pathlib

import pandas as pd

from prunelens.config import StudyConfig
from prunelens.report.figures import write_figures
from prunelens.report.page import write_page
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.summary import print_summary
from prunelens.report.tables import write_tables
from prunelens.study.alone import alone_in
from prunelens.study.artifacts.disk import stopped_by_disk
from prunelens.study.artifacts.seal import sha256_of
from prunelens.study.artifacts.store import Store
from prunelens.study.folder import open_study, read_runs
from prunelens.study.matrix import Plan
from prunelens.study.results import study_results
from prunelens.study.run import run_study
from prunelens.study.schedule import Outcome

DRAWN = ".drawn"  # written last: SHA-256 of all results, those that are drawn among them
SHOWN = ("tables/*.csv", "figures/*.png", "figures/*.pdf", "runs.csv", "report.html")


def run_and_report(
    study: StudyConfig,
    out: pathlib.Path,
    *,
    device: str = "auto",
    workers: int | None = 1,
    executor: str = "local",
    address: str | None = None,
    quiet: bool = False,
    artifacts: str | None = None,
    track: str | None = None,
) -> Outcome:
    """Run what is missing of a study, then write its tables and figures and print the summary.

    Arguments, errors and result as `run_study`; also a UserError where another process works in
    the same folder, or its disk cannot be written to.
    """
    with alone_in(out) as still_alone, stopped_by_disk(out):
        outcome = run_study(
            study,
            out,
            device=device,
            workers=workers,
            executor=executor,
            address=address,
            quiet=quiet,
            artifacts=artifacts,
            track=track,
        )
        still_alone()
        tables = write_results(out, *open_study(out, artifacts), redraw=outcome.num_executed > 0)
    if not quiet:
        print_summary(tables, read_runs(out))
    return outcome


def write_report(
    out: pathlib.Path, *, redraw: bool = True, artifacts: str | None = None
) -> dict[str, pd.DataFrame]:
    """Write `tables/`, `latents.parquet`, `figures/` and `report.html` of a study folder.

    Args:
        out: the study's folder.
        redraw: draw figures and page also where they show these very tables.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
    Returns: the tables by name.
    Raises: UserError where another process works in the folder, or it holds no study.
    """
    opened = open_study(
        out, artifacts
    )  # says what is wrong before a lock is left in a folder of no study
    with alone_in(out), stopped_by_disk(out):
        return write_results(out, *opened, redraw=redraw)


def write_results(
    out: pathlib.Path, plan: Plan, store: Store, *, redraw: bool
) -> dict[str, pd.DataFrame]:
    """`write_report` for whoever holds the folder's lock: nobody changes what is being drawn."""
    tables = write_tables(study_results(plan, store), out)
    paper = write_paper_tables(tables, plan.study, out)
    if redraw or not _is_drawn(out):
        mark = out / DRAWN
        mark.unlink(missing_ok=True)
        write_figures(tables, out)
        write_page(out, tables, read_runs(out), plan.study)
        mark.write_text(_sha256_of_results(out), encoding="utf-8")
    return tables | paper


def _is_drawn(out: pathlib.Path) -> bool:
    """Whether figures and page are there, all and whole, and of the tables that are there now.

    Not told by their times: a clock may be set, and a copy may have new ones.
    """
    mark = out / DRAWN
    return (
        (out / "report.html").is_file()
        and mark.is_file()
        and mark.read_text(encoding="utf-8", errors="replace") == _sha256_of_results(out)
    )


def _sha256_of_results(out: pathlib.Path) -> str:
    """Of the names and contents of everything that is shown and shows it."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in SHOWN for path in out.glob(pattern)):
        if path.is_file():
            total.update(f"{path.relative_to(out)} {sha256_of(path)} ".encode())
    return total.hexdigest()
