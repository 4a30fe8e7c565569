"""What is being written or removed: no two makers share a name, and a dead one's is known."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterator

import psutil

from prunelens.study.artifacts.claims import Claims

FORGOTTEN_SECONDS = 86_400.0  # age at which what another machine left unfinished is nobody's


def temporary_beside(path: pathlib.Path) -> pathlib.Path:
    """A name for what is to become `path`, or was it: no other process of any machine has it."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    return path.with_name(f"{path.name}.{host}-{os.getpid()}-{os.urandom(4).hex()}.tmp")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write, which takes the place of `path` whole once the block ends well."""
    hidden = path.with_name(f".{path.name}")
    temporary = temporary_beside(hidden)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for left in path.parent.glob(f"{hidden.name}.*.tmp"):
        if is_left(left):
            left.unlink(missing_ok=True)


def remove_folder(folder: pathlib.Path) -> None:
    """Rename a folder before it is emptied, so that a kill leaves no half of it under its name."""
    if folder.is_symlink():  # what it leads to is not ours
        folder.unlink()
        return
    doomed = temporary_beside(folder)
    with contextlib.suppress(FileNotFoundError):  # not there, or another has been quicker
        folder.rename(doomed)
        shutil.rmtree(doomed)


def left_in(root: pathlib.Path, claims: Claims) -> Iterator[pathlib.Path]:
    """What killed processes left half-written below a folder of artifacts.

    Where the file system has no locks, nobody's claim can be seen: a folder then counts as written
    to while the process in its name runs, and one of another machine for a day.
    """
    for folder in root.glob("*/*.tmp"):
        if folder.parent.is_symlink():  # what it leads to is not ours
            continue
        if claims.is_free(folder.name.split(".")[0]) and is_left(folder):
            yield folder


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
