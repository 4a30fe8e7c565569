"""The command line. Exit codes: 0 done, 1 some runs failed, 2 the user's input is wrong.

And as shells have them: 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import atexit
import gc
import sys

from prunelens.interruption import interruptible
from prunelens.terminal import say


def main() -> None:
    """Entry point; `prunelens.cli.app` has the commands."""
    code, became = 0, None
    atexit.register(gc.freeze)  # Python would end with a look at all that was imported: seconds
    with interruptible() as received:
        try:
            # Half a second and more, in which a signal may come already.
            from prunelens.cli.app import run_app

            code = run_app()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            if not received:
                raise
            code, became = 130, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if received and code:
        if became:
            say(f"prunelens: the interruption came out as {became}", error=True)
        say("prunelens: stopped; the same command goes on from here", error=True)
        code = 128 + received[0]
    sys.exit(code)
