"""Commands about whole studies: demo, run, plan, status, report, predict, clean."""

from __future__ import annotations

import collections
import pathlib
import shlex
from typing import Annotated

import typer

from prunelens.cli.explorer import what_is_done
from prunelens.cli.options import (
    Address,
    Artifacts,
    AsJson,
    Device,
    Executor,
    Folder,
    Out,
    Quiet,
    Remembered,
    Settings,
    Study,
    Track,
    Workers,
    numbers,
    parsed,
    workers_to_simulate,
)
from prunelens.cli.printing import (
    print_json,
    print_table,
    records,
    say_whole,
    with_intervals,
)
from prunelens.errors import UserError
from prunelens.study_file import read_study
from prunelens.terminal import say


def demo(
    out: Out = None,
    settings: Settings = None,
    device: Device = "auto",
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    artifacts: Artifacts = None,
    track: Track = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The shipped study on the bundled model; the same as `run demo`."""
    run("demo", out, settings, device, workers, executor, address, artifacts, track, quiet, as_json)


def run(
    study: Study,
    out: Out = None,
    settings: Settings = None,
    device: Device = "auto",
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    artifacts: Artifacts = None,
    track: Track = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a study, or what is missing of it; write its tables and figures."""
    config = read_study(study, parsed(settings))
    folder = out or pathlib.Path("runs") / config.name
    from prunelens.report.write import run_and_report

    outcome = run_and_report(
        config,
        folder,
        device=device,
        workers=workers,
        executor=executor,
        address=address,
        quiet=quiet or as_json,
        artifacts=artifacts,
        track=track,
    )
    failed = [result for result in outcome.results if result.status == "failed"]
    if as_json:
        runs = {result.run.name: result.reason or "done" for result in outcome.results}
        told = {"out": str(folder), "executed": outcome.num_executed, "runs": runs}
        print_json({**told, "answers": _answers(folder)})
    elif not quiet:
        say(f"{outcome.num_executed} stages executed; read {folder / 'report.html'}")
    raise typer.Exit(1 if failed or outcome.failures else 0)


def plan(
    study: Study,
    out: Out = None,
    settings: Settings = None,
    device: Device = "auto",
    no_calibration: Annotated[
        bool,
        typer.Option(
            "--no-calibration",
            help="Do not time this device, tell no hours, and load no model to check it.",
        ),
    ] = False,
    rates: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Rates of another device instead: YAML, or what plan --json printed there."
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Simulate the schedule with so many workers each, e.g. 1,8,64."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a study, and show its runs and the work, disk, memory and hours they take.

    Nothing runs. Exit code 2 where a check found an error.
    """
    from prunelens.cli.plan_view import show_preflight
    from prunelens.study.preflight.hours import read_rates
    from prunelens.study.preflight.preview import CALIBRATION_SECONDS, preflight

    config = read_study(study, parsed(settings))
    numbers_of_workers = workers_to_simulate(workers)
    if numbers_of_workers and no_calibration and rates is None:
        raise UserError("--workers: hours are needed; leave --no-calibration out or give --rates")
    found = preflight(
        config,
        settings=parsed(settings),
        device=device,
        calibration_seconds=0.0 if no_calibration else CALIBRATION_SECONDS,
        rates=read_rates(rates, [model.label for model in config.models]) if rates else None,
        workers=numbers_of_workers,
        out=out,
    )
    if as_json:
        print_json(found._asdict())
    else:
        show_preflight(config.name, found)
    raise typer.Exit(2 if any(check["level"] == "error" for check in found.checks) else 0)


def status(folder: Folder, artifacts: Remembered = None, as_json: AsJson = False) -> None:
    """How far a study is: which runs are done, failed or missing stages."""
    from prunelens.study.folder import study_status

    answers = _answers(folder)
    rows = [
        {**row, "answer": answers.get(row["run"], "")} for row in study_status(folder, artifacts)
    ]
    if as_json:
        print_json(rows)
        return
    counts = collections.Counter(row["status"] for row in rows)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print_table(
        f"Runs of {folder}: {told}",
        [
            {
                "run": row["run"],
                "status": row["status"],
                "stages there": f"{row['present']}/{row['stages']}",
                "reason": row["reason"],
            }
            for row in rows
        ],
    )
    for run, answer in answers.items():
        say_whole(f"\n{run}: {answer}")


def _answers(folder: pathlib.Path) -> dict[str, str]:
    """Run -> its answer in sentences, of a study that has any yet."""
    if not (folder / "tables" / "answers.csv").is_file():
        return {}
    from prunelens.study.finished import Study

    answers = Study(folder).answers
    return dict(zip(answers["run"], answers["answer"], strict=True))


def report(
    folder: Folder,
    explorer: Annotated[
        bool, typer.Option("--explorer", help="Also write DIR/explorer, a page to share.")
    ] = False,
    artifacts: Remembered = None,
) -> None:
    """Write a study's tables and figures again from its artifacts, and print the summary."""
    from prunelens.report.summary import print_summary
    from prunelens.report.write import write_report
    from prunelens.study.folder import read_runs

    print_summary(write_report(folder, artifacts=artifacts), read_runs(folder))
    if explorer:
        from prunelens.report.explorer.study import write_study_explorer

        with what_is_done() as tell:
            written = write_study_explorer(folder, artifacts=artifacts, tell=tell)
        say(f"open {written / 'index.html'}, or copy the folder and open it anywhere")


def predict(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="STUDY", help="A study's folder.")],
    sparsity: Annotated[float, typer.Option(help="of the pruning that you consider")],
    latents: Annotated[
        str | None, typer.Option(help="Only these, e.g. 3,17,200; default: all.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="The dense run, if the study has several.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the dense SAE; default: the first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the most endangered to show.")] = 20,
    artifacts: Remembered = None,
    as_json: AsJson = False,
) -> None:
    """Before pruning: how likely is each latent to survive, and which are most endangered?"""
    from prunelens.study.predict import TARGETS, predict_latents

    table = predict_latents(
        folder,
        sparsity=sparsity,
        latents=numbers(latents),
        run=run,
        seed=seed,
        artifacts=artifacts,
    )
    if as_json:
        print_json(records(table))
        return
    shown = table if latents else table.head(top)
    print_table(
        f"How likely {len(shown)} of {len(table)} latents are to survive a pruning to sparsity"
        f" {sparsity:g}, the most endangered first",
        with_intervals(shown, TARGETS).to_dict("records"),
    )
    say_whole(
        "persistence: chance that the latent's activations keep a correlation above 0.7;"
        " shared_init: chance to be matched as published (inflated by the shared start)."
        " The study's pruning methods are pooled. Intervals, where the fit has any:"
        " 95 %, conditions as clusters."
    )


def clean(
    folder: Folder,
    yes: Annotated[
        bool, typer.Option("--yes", help="Free it; without, nothing is changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a study does not need, and what killed commands left; or free it."""
    from prunelens.study.clean import clean_study, leftovers

    found = clean_study(folder) if yes else leftovers(folder)
    if as_json:
        print_json({"freed": yes, "leftovers": [leftover._asdict() for leftover in found]})
        return
    folders = "1 folder" if len(found) == 1 else f"{len(found)} folders"
    total = f"{sum(one.num_bytes for one in found) / 1e6:.1f} MB in {folders}"
    print_table(
        f"What {folder} does not need: {total}",
        [
            {
                "made by": one.label or "-",
                "MB": f"{one.num_bytes / 1e6:.1f}",
                "why": one.why,
                "folder": one.path,
            }
            for one in found
        ],
    )
    if yes or not found:
        say(f"freed {total}" if found else "nothing to free")
    else:
        say(f"{total}; free them with: prunelens clean {shlex.quote(str(folder))} --yes")
