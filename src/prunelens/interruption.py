"""Ctrl-C and SIGTERM, with which batch systems end a job, as one interruption that is not lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

AGAIN_AFTER = 0.05  # seconds
LEFT_ALONE = (signal.SIG_IGN, None)

_current: list[int] = []  # what the block that runs now has received


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside, both signals raise KeyboardInterrupt. Yields: the numbers of those that came.

    What is raised can come out as something else (from the compiled code of a library that is
    being imported, say), so whoever goes on after an error asks `is_interrupted`. And it is dropped
    where Python cannot raise, as in what a garbage collector or an import's lock calls back: there
    the signal is sent again, as long as the block runs.
    """
    global _current
    received: list[int] = []
    again: list[threading.Timer] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def unraisable(dropped: Any) -> None:
        if received and issubclass(dropped.exc_type, KeyboardInterrupt):
            # To the main thread: a signal that another one takes does not end what it waits for.
            main = threading.main_thread().ident, received[-1]
            again.append(threading.Timer(AGAIN_AFTER, signal.pthread_kill, main))
            again[-1].daemon = True
            again[-1].start()
        else:
            hook(dropped)

    before, _current = _current, received
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Not what is ignored: so a shell starts work in the background. None was not set by Python.
    handlers = {n: handler for n, handler in handlers.items() if handler not in LEFT_ALONE}
    try:
        for number in handlers:
            signal.signal(number, interrupt)
        yield received
    finally:
        for timer in again:
            timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _current = before


def is_interrupted() -> bool:
    """Whether an interruption has come that the work goes on in spite of."""
    return bool(_current)
