"""What is being written or removed: no two makers share a name, and a dead one's is known.

What is written takes its place whole; what a killed process left beside it goes with the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator

import psutil

_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag, as Linux numbers them
_OURS = re.compile(r".+\.[A-Za-z0-9]*-\d+-[0-9a-f]{8}\.tmp")
FORGOTTEN_SECONDS = 86_400.0  # age at which what another machine left unfinished is nobody's


def temporary_beside(path: pathlib.Path) -> pathlib.Path:
    """A name for what is to become `path`, or was it: no other process of any machine has it."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    return path.with_name(f"{path.name}.{host}-{os.getpid()}-{os.urandom(4).hex()}.tmp")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write, which takes the place of `path` whole once the block ends well."""
    temporary = temporary_beside(path.with_name(f".{path.name}"))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sweep(path)


@contextlib.contextmanager
def new_folder(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `final`, flushed to disk, once the block ends."""
    temporary = temporary_beside(final.with_name(f".{final.name}"))
    temporary.mkdir()
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        _exchange(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sweep(final)


def flush(path: pathlib.Path) -> None:
    """Have the operating system write a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Give a folder its name; one that has it gets the other's, in one step where that is known."""
    if not final.exists():
        temporary.rename(final)
        return
    names, at_once = (os.fsencode(temporary), os.fsencode(final)), -1
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library before 2018
            exchange = ctypes.CDLL(None).renameat2
            at_once = exchange(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE)
    if at_once != 0:  # nor does every file system
        old = temporary_beside(temporary)
        final.rename(old)
        temporary.rename(final)
        old.rename(temporary)


def left_beside(folder: pathlib.Path, name: str = "*") -> Iterator[pathlib.Path]:
    """What killed processes left of the files and folders of some name (a glob) in a folder.

    The folder may be anybody's: what is not called as `temporary_beside` does is not ours.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        if _OURS.fullmatch(path.name) and is_left(path):
            yield path


def _sweep(final: pathlib.Path) -> None:
    for left in left_beside(final.parent, glob.escape(final.name)):
        remove(left)


def remove(path: pathlib.Path) -> None:
    """Rename a folder before it is emptied, so that a kill leaves no half of it under its name."""
    if path.is_symlink() or path.is_file():  # what a link leads to is not ours
        path.unlink(missing_ok=True)
        return
    doomed = temporary_beside(path)
    with contextlib.suppress(FileNotFoundError):  # not there, or another has been quicker
        path.rename(doomed)
        shutil.rmtree(doomed)


def is_left(temporary: pathlib.Path) -> bool:
    """Whether whoever wrote it (a folder or a file) is gone, as far as can be told from here."""
    parts = temporary.name.split(".")[-2].split("-")
    try:
        age = time.time() - temporary.stat().st_mtime
        if len(parts) != 3 or not parts[1].isdecimal() or age > FORGOTTEN_SECONDS:
            return True
        host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
        return parts[0] == host and not _is_running(int(parts[1]))
    except FileNotFoundError:
        return False


def _is_running(pid: int) -> bool:
    """A zombie is not: in a container nobody may ever ask how an orphan ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
