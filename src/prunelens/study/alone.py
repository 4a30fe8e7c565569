"""One prunelens at a time in a study folder."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator

import filelock

from prunelens.errors import UserError
from prunelens.study.artifacts.links import refuse_links_out
from prunelens.study.artifacts.locks import NO_LOCKS, warn_of_no_locks
from prunelens.study.artifacts.store import CLAIMS_FILE


@contextlib.contextmanager
def alone_in(out: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock; folders that this call made and left empty are removed again.

    Gives a function that raises UserError where somebody has removed the lock meanwhile.
    Raises: UserError where another process holds it, or the folder cannot be written to.
    """
    refuse_links_out(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # deepest first
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _locked(out / ".lock")
    except filelock.Timeout:
        raise UserError(
            f"--out: another prunelens works in {str(out)!r}; wait for it or choose another folder"
        ) from None
    except OSError as error:
        why = f"cannot write to {str(out)!r} ({error.strerror})"
        raise UserError(f"--out: {why}; name a folder that you can write to") from None
    try:
        yield functools.partial(_check_lock, out, (out / ".lock").stat().st_ino)
    except UserError:
        if out in made and not any(_contents(out)):
            shutil.rmtree(out)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # someone else put something in it
                    folder.rmdir()
        raise
    finally:
        if lock is not None:
            lock.release()


def _locked(path: pathlib.Path) -> filelock.BaseFileLock | None:
    """The lock, held; None, with a warning, where the file system has none.

    Tried by hand first: without locks filelock takes the file itself for one (or fails, by its
    version), and the file of a killed process would shut out everybody for ever.
    """
    if sys.platform != "win32":
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warn_of_no_locks()
                return None
        finally:
            os.close(handle)
    lock = filelock.FileLock(path, blocking=False)
    lock.acquire()
    return lock


def _check_lock(out: pathlib.Path, held: int) -> None:
    """Artifacts bear two processes; tables and figures, which are written in place, do not."""
    lock = out / ".lock"
    if not lock.exists() or lock.stat().st_ino != held:
        raise UserError(
            f"--out: the file {str(lock)!r} was removed while this worked, so another prunelens may"
            " write there; what was made is kept: run the same command again once it has ended"
        )


def _contents(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a study folder but for its locks."""
    locks = (".lock", CLAIMS_FILE)
    return (path for path in out.rglob("*") if path.is_file() and path.name not in locks)
