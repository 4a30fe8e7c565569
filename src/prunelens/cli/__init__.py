"""The command line. Exit codes: 0 done, 1 some runs failed, 2 the user's input is wrong.

And as shells have them: 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from prunelens.cli import explorer, export, selftest, steps, studies
from prunelens.errors import UserError

INTERRUPTED = 130  # what typer returns after Ctrl-C
TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    help="What did pruning do to a model's features, and can you trust the answer?",
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
    explorer.view,
    steps.prune,
    steps.match,
    steps.transfer,
    export.export,
    selftest.selftest,
):
    app.command()(command)

# The base of typer's usage errors, which typer itself does not export.
UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point: a UserError becomes one line on standard error and exit code 2.

    SIGTERM, with which batch systems end a job, ends the work as Ctrl-C does.
    """
    is_terminated = False

    def terminate(*_: object) -> None:
        nonlocal is_terminated
        is_terminated = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:  # before typer has got hold of it
        code = INTERRUPTED
    except UserError as error:
        _give_up(str(error))
    except UsageError as error:
        if not error.format_message():  # no arguments: the help has been shown
            sys.exit(2)
        _give_up(f"{error.format_message()}; see prunelens --help")
    except OSError as error:
        _give_up(f"{error.filename or 'file'}: {error.strerror or error}; check the path")
    if code == INTERRUPTED:
        code = TERMINATED if is_terminated else INTERRUPTED
        _give_up("stopped; the same command goes on from here", code=code)
    sys.exit(code)


def _give_up(message: str, *, code: int = 2) -> NoReturn:
    print(f"prunelens: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
