"""The command line. Exit codes: 0 done, 1 some runs failed, 2 the user's input is wrong."""

from __future__ import annotations

import json
import logging
import pathlib
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError
from prunelens.study_file import read_study, with_settings

INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(
    help="What did pruning do to a model's features, and can you trust the answer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The base of typer's usage errors, which typer itself does not export.
UsageError: Any = typer.BadParameter.__base__

Study = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped study.")]
Out = Annotated[
    pathlib.Path | None, typer.Option("--out", help="The study's folder; default runs/<name>.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a field: sae.steps=500. Repeatable.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes side by side; default: as cores and memory allow."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Folder = Annotated[pathlib.Path, typer.Argument(metavar="DIR", help="A study's folder.")]


def main() -> None:
    """Entry point: a UserError becomes one line on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _give_up(str(error))
    except UsageError as error:
        _give_up(f"{error.format_message()}; see prunelens --help")
    except OSError as error:
        _give_up(f"{error.filename or 'file'}: {error.strerror or error}; check the path")
    if code == INTERRUPTED:
        _give_up("stopped; the same command goes on from here", code=INTERRUPTED)
    sys.exit(code)


def _give_up(message: str, *, code: int = 2) -> NoReturn:
    print(f"prunelens: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    out: Out = None,
    settings: Settings = None,
    device: Device = "auto",
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The shipped study on the bundled model; the same as `run demo`."""
    run("demo", out, settings, device, workers, quiet, as_json)


@app.command()
def run(
    study: Study,
    out: Out = None,
    settings: Settings = None,
    device: Device = "auto",
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a study, or what is missing of it; write its tables and figures."""
    config = _study(study, settings)
    folder = out or pathlib.Path("runs") / config.name
    from prunelens.report.write import run_and_report

    outcome = run_and_report(config, folder, device=device, workers=workers, quiet=quiet or as_json)
    failed = [result for result in outcome.results if result.status == "failed"]
    if as_json:
        runs = {result.run.name: result.reason or "done" for result in outcome.results}
        _print_json({"out": str(folder), "executed": outcome.num_executed, "runs": runs})
    elif not quiet:
        print(f"{outcome.num_executed} stages executed; tables and figures are in {folder}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def plan(study: Study, settings: Settings = None, as_json: AsJson = False) -> None:
    """Show a study's runs and stages, and the disk that it needs, before anything runs."""
    from prunelens.study.preflight import preflight

    config = _study(study, settings)
    lines = preflight(config)
    if as_json:
        _print_json(lines._asdict())
        return
    table = Table("run", "stages", "SAEs", "shared with earlier runs")
    for row in lines.runs:
        table.add_row(row["run"], str(row["stages"]), str(row["saes"]), str(row["shared"]))
    console = Console()
    console.print(table)
    for name, count in lines.stages.items():
        console.print(f"  {count:4d} x {name}")
    console.print(
        f"activation stores: {lines.store_gigabytes:.2f} GB each, at most"
        f" {lines.peak_gigabytes:.2f} GB at a time with one worker;"
        f" kept at the end: {lines.kept_gigabytes:.2f} GB"
    )


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """How far a study is: which runs are done, failed or missing stages."""
    from prunelens.study.run import study_status

    rows = study_status(folder)
    if as_json:
        _print_json(rows)
        return
    table = Table("run", "status", "stages there", "reason")
    for row in rows:
        table.add_row(
            row["run"], row["status"], f"{row['present']}/{row['stages']}", escape(row["reason"])
        )
    Console().print(table)


@app.command()
def report(folder: Folder) -> None:
    """Write a study's tables and figures again from its artifacts, and print the summary."""
    from prunelens.report.summary import print_summary
    from prunelens.report.write import write_report
    from prunelens.study.run import read_runs

    print_summary(write_report(folder), read_runs(folder))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="bundled, a hub id or a local folder.")],
    out: Annotated[pathlib.Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    criterion: Annotated[str, typer.Option(help="magnitude or wanda")] = "wanda",
    scope: Annotated[str | None, typer.Option(help="global, matrix or row")] = None,
    sparsity: Annotated[float, typer.Option(help="share of the weights to zero")] = 0.5,
    calibration: Annotated[str, typer.Option(help="wanda's norms: dense or sequential")] = "dense",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Calibration text: corpus.source=files …")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it as a Hugging Face checkpoint."""
    from prunelens.study.single import prune_checkpoint

    data: dict[str, Any] = {
        "models": [{"name": model, "dtype": dtype}],
        "prunings": [
            {
                "criterion": criterion,
                "scope": scope or {"magnitude": "global"}.get(criterion, "row"),
                "calibration": calibration,
                "sparsities": [sparsity],
            }
        ],
    }
    if not 0 <= sparsity < 1:
        raise UserError(f"--sparsity: {sparsity} is outside [0, 1); give for example 0.5")
    if criterion not in ("magnitude", "wanda"):
        raise UserError(
            f"--criterion: {criterion!r} is neither magnitude nor wanda; give one of them"
        )
    config = _merged(data, settings)
    report = prune_checkpoint(config.models[0], config.conditions()[0], config.corpus, out, device)
    if as_json:
        _print_json({"out": str(out), "achieved_sparsity": report.achieved_sparsity})
    else:
        print(f"achieved sparsity {report.achieved_sparsity:.4f}; checkpoint saved in {out}")


@app.command()
def match(
    sae_a: Annotated[pathlib.Path, typer.Argument(help="Folder of an SAE.")],
    sae_b: Annotated[pathlib.Path, typer.Argument(help="Folder of an SAE.")],
    as_json: AsJson = False,
) -> None:
    """Match the features of two SAEs: one-way, mutual and greedy rates at every tau."""
    from prunelens.study.single import match_saes

    rates = match_saes(sae_a, sae_b)
    if as_json:
        _print_json([row._asdict() for row in rates])
        return
    table = Table("tau", "one-way", "MNN", "greedy", "one-way, B to A")
    for row in rates:
        table.add_row(f"{row.tau:g}", *(f"{value:.4f}" for value in row[1:]))
    Console().print(table)


def _study(source: str, settings: list[str] | None) -> StudyConfig:
    return read_study(source, _parsed(settings))


def _merged(data: dict[str, Any], settings: list[str] | None) -> StudyConfig:
    return study_from_data(with_settings(data, _parsed(settings)))


def _parsed(settings: list[str] | None) -> dict[str, str]:
    """`--set field=value` pairs."""
    pairs = {}
    for setting in settings or []:
        field, separator, value = setting.partition("=")
        if not separator or not field:
            raise UserError(f"--set: {setting!r} is not field=value, e.g. sae.steps=500")
        pairs[field] = value
    return pairs


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))
