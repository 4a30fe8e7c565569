"""The command line. Exit codes: 0 done, 1 some runs failed, 2 the user's input is wrong.

And as shells have them: 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import sys

from prunelens.cli.interruption import interruptible


def main() -> None:
    """Entry point; `prunelens.cli.app` has the commands."""
    code = 0
    with interruptible() as received:
        try:
            # Half a second and more, in which a signal may come already.
            from prunelens.cli.app import run_app

            code = run_app()
        except BaseException:
            if not received:
                raise
            code = 128 + received[0]
    if received and code:
        print("prunelens: stopped; the same command goes on from here", file=sys.stderr)
        code = 128 + received[0]
    sys.exit(code)
