"""The command that shows a study's latents: view."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.markup import escape

from prunelens.cli.options import Folder, Remembered
from prunelens.console import Console
from prunelens.terminal import say


def view(
    folder: Folder,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the page's address; 0: a free one.")
    ] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address, open nothing.")
    ] = False,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Ask neuronpedia.org for labels of the latents you open."),
    ] = False,
    artifacts: Remembered = None,
) -> None:
    """Explore a study's latents on a page of this machine, until Ctrl-C: which were lost?"""
    from prunelens.report.explorer.study import view_study

    with what_is_done() as tell:

        def ready(address: str) -> None:
            tell("")
            say(f"{address}  (Ctrl-C ends it)", flush=True)

        view_study(
            folder,
            port=port,
            browser=not no_browser,
            labels=labels,
            artifacts=artifacts,
            tell=tell,
            ready=ready,
        )


@contextlib.contextmanager
def what_is_done() -> Iterator[Callable[[str], None]]:
    """Gives a callback that shows on standard error what is being done; "" ends it."""
    console = Console(stderr=True)
    status = console.status("")

    def tell(what: str) -> None:
        if not what:
            status.stop()
        elif console.is_terminal:
            status.update(escape(what))
            status.start()
        else:
            console.print(escape(what), soft_wrap=True)

    try:
        yield tell
    finally:
        status.stop()
