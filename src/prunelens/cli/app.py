"""The commands, and what becomes of a user's mistake: one line and exit code 2."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from prunelens.cli import explorer, export, selftest, steps, studies
from prunelens.console import Console
from prunelens.errors import UserError, is_out_of_memory
from prunelens.panics import is_panic
from prunelens.terminal import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    studies.demo,
    studies.run,
    studies.plan,
    studies.status,
    studies.report,
    studies.predict,
    studies.clean,
    explorer.view,
    steps.prune,
    steps.match,
    steps.transfer,
    export.export,
    selftest.selftest,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print it and exit.")] = False,
) -> None:
    """What did pruning do to a model's features, and can you trust the answer?"""
    if version:
        say(f"prunelens {importlib.metadata.version('prunelens')}")
        raise typer.Exit


# The base of typer's usage errors, which typer itself does not export.
UsageError: Any = typer.BadParameter.__base__


def run_app() -> int:
    """Run the command that `sys.argv` names. Returns: its exit code, 130 after Ctrl-C."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        return app(standalone_mode=False) or 0
    except UserError as error:
        return _mistake(str(error))
    except UsageError as error:
        if not error.format_message():  # no arguments: the help has been shown
            return 2
        return _mistake(f"{error.format_message()}; see prunelens --help")
    except BaseException as error:
        if (said := _told(error)) is None:
            raise
        return _mistake(said)


def _told(error: BaseException) -> str | None:
    """What becomes of an error of the machine's or a library's; None of one of our own."""
    first = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory ({first}); free some, or take a smaller model or less text"
    if isinstance(error, OSError):
        place = "TMPDIR" if "temporary directory" in first else error.filename or "file"
        return f"{place}: {error.strerror or error}; check the path"
    if is_panic(error):
        return f"a library gave up ({first}); check the files of the model"
    return None


def _mistake(message: str) -> int:
    say(f"prunelens: {' '.join(message.split())}", error=True)
    return 2
