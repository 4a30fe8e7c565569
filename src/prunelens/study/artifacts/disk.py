"""A disk that cannot be written to stops a study or a command at once, and says so in one line.

So do a limit on the size of files, and folders of the system that several processes need.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from prunelens.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room left; the quota's room is used up
# Libraries that are not written in Python tell the system's error only in their message.
_STOPPING = (*FULL, errno.EROFS, errno.EFBIG)
_MESSAGES = {os.strerror(number).lower(): number for number in _STOPPING}


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
        raise DiskError(_what_to_do(number, _place(error, folder), folder)) from error


@contextlib.contextmanager
def processes_told() -> Iterator[None]:
    """Tell what several processes need of the system, where the block cannot start them.

    Raises: DiskError.
    """
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        raise DiskError(
            f"--workers: several processes need semaphores in /dev/shm and sockets in {folder!r}"
            f" ({error.strerror or error}); make both writable (TMPDIR names another folder than"
            " the second), or give --workers 1"
        ) from None


def _system_error(error: BaseException | None) -> int | None:
    """The number of the disk's error, where `error` or what it came from is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STOPPING:
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


def _what_to_do(number: int, place: pathlib.Path, folder: pathlib.Path) -> str:
    where = next(path for path in (place, *place.absolute().parents) if path.exists())
    temporary = pathlib.Path(tempfile.tempdir) if tempfile.tempdir else None
    elsewhere = "TMPDIR" if temporary in (place, *place.parents) else "disk"
    field, again = "--out" if place == folder else elsewhere, "run the same command again"
    if number == errno.EFBIG:
        return (
            f"{field}: a file in {str(place)!r} would be larger than {_most_of_file()}; raise that"
            f" limit, then {again}"
        )
    if number == errno.EROFS:
        return (
            f"{field}: the disk of {str(place)!r} can no longer be written to (it is mounted"
            f" read-only); make it writable, then {again}"
        )
    kind = "quota" if number == errno.EDQUOT else "disk"
    return (
        f"{field}: the {kind} of {str(place)!r} is full ({_amount(shutil.disk_usage(where).free)}"
        f" free there); make room (`prunelens plan` tells how much a study needs), then {again}"
    )


def _most_of_file() -> str:
    """What stops a file from growing."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if most != resource.RLIM_INFINITY:
            return f"the {most:,} bytes that this process may write (`ulimit -f`)"
    return "its file system takes"


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
