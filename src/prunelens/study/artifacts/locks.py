"""Who makes which stage: locks on single bytes of one empty file, which end with their process.

A study folder has one lock for the whole (`run.alone_in`). These are for where that is of no help:
somebody removed its file, or a worker of a killed run has not noticed yet.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator

log = logging.getLogger(__name__)

LOCKABLE = 2**62  # bytes; a lock may lie far behind the end of its file
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # the file system has none


class Locks:
    """The locks on the stages of one folder of artifacts, for all processes that see the file.

    A process holds each once: threads are not kept apart.
    """

    _open: dict[str, int] = {}  # noqa: RUF012
    """Path -> handle, never closed: that would end all locks that this process has there."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def holding(self, identity: str) -> Iterator[None]:
        """Wait until no other process makes the stage, and keep others from it in this block."""
        held = self._lock(identity, wait=True)
        try:
            yield
        finally:
            if held:
                self._unlock(identity)

    def is_free(self, identity: str) -> bool:
        """Whether no other process makes the stage; this one must not be making it."""
        if not self._path.exists():
            return True
        if free := self._lock(identity, wait=False):
            self._unlock(identity)
        return free

    if sys.platform == "win32":  # which has no such locks: the folder's lock is all there is

        def _lock(self, identity: str, *, wait: bool) -> bool:
            return True

        def _unlock(self, identity: str) -> None:
            pass

    else:

        def _lock(self, identity: str, *, wait: bool) -> bool:
            """Whether it is ours now."""
            import fcntl

            how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            try:
                fcntl.lockf(self._handle(), how, 1, _byte(identity))
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                if error.errno not in NO_LOCKS:
                    raise
                warn_of_no_locks()
            return True

        def _unlock(self, identity: str) -> None:
            import fcntl

            with contextlib.suppress(OSError):  # it was not locked, see above
                fcntl.lockf(self._handle(), fcntl.LOCK_UN, 1, _byte(identity))

    def _handle(self) -> int:
        key = str(self._path.absolute())
        if key not in self._open:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open[key] = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._open[key]


@functools.cache
def warn_of_no_locks() -> None:
    """Said once by a process, which looks for a lock at every stage."""
    log.warning("the study folder cannot be locked: run one prunelens there at a time")


def _byte(identity: str) -> int:
    """Where a stage's lock lies: two stages share one as rarely as their identities agree."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) % LOCKABLE
