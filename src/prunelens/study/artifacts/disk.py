"""A disk that cannot be written to stops a study at once, and says so in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from prunelens.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room left; the quota's room is used up
# Libraries that are not written in Python tell the system's error only in their message.
_MESSAGES = {os.strerror(number).lower(): number for number in (*FULL, errno.EROFS)}


class DiskError(UserError):
    """Nothing more can be written: every other stage would fail as well."""


@contextlib.contextmanager
def stopped_by_disk(folder: pathlib.Path) -> Iterator[None]:
    """Turn what the block raises because a disk is full or read-only into one clear error.

    Args:
        folder: what the block writes to, for the message.
    Raises: DiskError.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:  # of whichever library was writing; all others pass
        number = _system_error(error)
        if number is None:
            raise
        raise DiskError(_what_to_do(number, _place(error, folder))) from error


def _system_error(error: BaseException | None) -> int | None:
    """The number of the disk's error, where `error` or what it came from is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
            return error.errno
        said = str(error).lower()
        if number := next((number for text, number in _MESSAGES.items() if text in said), None):
            return number
        error = error.__cause__ or error.__context__
    return None


def _place(error: Exception, folder: pathlib.Path) -> pathlib.Path:
    """The folder that could not be written to; it may lie on another disk than the study."""
    name = getattr(error, "filename", None)
    path = pathlib.Path(name).parent if isinstance(name, str) else folder
    return folder if folder in path.parents else path


def _what_to_do(number: int, folder: pathlib.Path) -> str:
    where = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if number == errno.EROFS:
        return (
            f"--out: the disk of {str(folder)!r} can no longer be written to (it is mounted"
            " read-only); make it writable, then run the same command again: it goes on from here"
        )
    kind = "quota" if number == errno.EDQUOT else "disk"
    return (
        f"--out: the {kind} of {str(folder)!r} is full ({_amount(shutil.disk_usage(where).free)}"
        " free there); make room (`prunelens plan` tells how much a study needs), then run the"
        " same command again: it goes on from here"
    )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
