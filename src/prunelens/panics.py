"""Libraries written in Rust that give up in the middle of their work, told in one line.

A panic, of a tokenizer's regular expression for example, comes to Python as a `PanicException`,
which is no `Exception`, and Rust has written a report of its own to standard error by then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from prunelens.errors import UserError

TOKENIZER_FIX = "mend the regular expressions of its tokenizer.json, or name another model"
_STANDARD_ERROR = 2


def is_panic(error: BaseException) -> bool:
    """Whether it is one; every library has a class of its own, which cannot be imported."""
    return type(error).__module__ == "pyo3_runtime"


@contextlib.contextmanager
def panics_told(what: str, fix: str) -> Iterator[None]:
    """Turn a panic of the block into one line, in the place of Rust's report.

    Args:
        what: field, value and what went wrong.
        fix: what to do about it.
    Raises: UserError.
    """
    try:
        with _standard_error_held():
            yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(f"{what} ({str(error).splitlines()[0][:200]}); {fix}") from None


@contextlib.contextmanager
def _standard_error_held() -> Iterator[None]:
    """What the process writes to it, in any language, comes after the block; not after a panic."""
    try:
        before = os.dup(_STANDARD_ERROR)
    except OSError:  # it is closed
        yield
        return
    # Where the system has no files in memory it is not held but lost.
    named = os.memfd_create("stderr") if hasattr(os, "memfd_create") else None
    held = os.open(os.devnull, os.O_RDWR) if named is None else named
    os.dup2(held, _STANDARD_ERROR)
    told = True
    try:
        yield
    except BaseException as error:
        told = not is_panic(error)
        raise
    finally:
        os.dup2(before, _STANDARD_ERROR)
        os.lseek(held, 0, os.SEEK_SET)
        while told and (written := os.read(held, 1 << 16)):
            os.write(_STANDARD_ERROR, written)
        os.close(held)
        os.close(before)
