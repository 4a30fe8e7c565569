"""Objects under one address of an object store (`s3://`, `gs://`), by key."""

from __future__ import annotations

import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

from pyarrow import ArrowException, fs

from prunelens.errors import UserError, one_line
from prunelens.study.artifacts.disk import DiskError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WAITS = (1.0, 4.0)  # seconds before it is tried again; the client below has tried thrice by then
CHUNK = 8 * 2**20  # bytes that are read at once
PENDING = 8  # chunks that may wait to be sent
LARGEST_COPY = 5 * 10**9  # bytes; what S3 copies in one request
MARK = ".prunelens"
# What the services say when trying again is of no use.
_REFUSALS = ("ACCESS_DENIED", "ACCESS DENIED", "FORBIDDEN", "INVALID_ACCESS_KEY", "SIGNATURE_DOES",
             "INVALID_CLIENT_TOKEN", "NO_SUCH_BUCKET", "NOSUCHBUCKET", "PERMISSION_DENIED",
             "UNAUTHENTICATED", "UNAUTHORIZED", "BUCKET NOT FOUND")  # fmt: skip


class UnreachableError(DiskError):
    """The object store does not answer, or refuses: every other stage would fail as well."""


class Bucket:
    """What lies under one address.

    Keys are relative, with `/` between their parts. All methods raise UnreachableError where the
    store does not answer after some attempts, or refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._fs, path = self._trying(lambda: fs.FileSystem.from_uri(_with_options(address)))
        self._root = path.rstrip("/")

    def check_writable(self) -> None:
        """Write a small mark, so that what stands in the way is known before any work is done."""
        self._trying(lambda: self._put_bytes(MARK, b"artifacts of prunelens\n"))

    def has(self, key: str) -> bool:
        """Whether the object is there."""
        found = self._trying(lambda: self._fs.get_file_info(self._path(key)))
        return found.type == fs.FileType.File

    def get(self, key: str) -> bytes | None:
        """A small object's content, or None where there is none."""

        def read() -> bytes:
            with self._fs.open_input_stream(self._path(key)) as stream:
                return stream.read()

        return self._if_there(read)

    def download(self, key: str, path: pathlib.Path) -> bool:
        """Write an object to a file; False where there is none.

        Raises: OSError, as it is, where the file cannot be written: the store is not to blame.
        """
        source = self._if_there(lambda: self._fs.open_input_file(self._path(key)))
        if source is None:
            return False
        written = 0
        with source, path.open("wb") as to:
            while part := self._if_there(functools.partial(source.read_at, CHUNK, written)):
                to.write(part)
                written += len(part)
        return part is not None

    def upload(self, path: pathlib.Path, key: str) -> None:
        """Write a file to an object, replacing what is there.

        Raises: OSError, as it is, where the file cannot be opened.
        """
        with path.open("rb") as source:

            def copy() -> None:
                source.seek(0)
                with self._fs.open_output_stream(self._path(key)) as to:
                    for number, part in enumerate(iter(lambda: source.read(CHUNK), b""), 1):
                        to.write(part)
                        if number % PENDING == 0:
                            to.flush()  # parts wait in memory, as many as there are, to be sent

            self._trying(copy)

    def keys(self, folder: str) -> dict[str, int]:
        """Key, with `folder` in front, -> size in bytes, of all objects below `folder`."""
        return self._trying(lambda: self._names(folder, recursive=True))

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the store; one that is too large for that is left out, with a word.

        The bytes do not pass through this machine.
        """
        if self._trying(lambda: self._fs.get_file_info(self._path(key))).size > LARGEST_COPY:
            log.warning("%s is too large to be kept aside and is lost", key)
            return
        self._trying(lambda: self._fs.copy_file(self._path(key), self._path(to)))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

        self._if_there(lambda: self._fs.delete_file(self._path(key)))

    def _put_bytes(self, key: str, content: bytes) -> None:
        with self._fs.open_output_stream(self._path(key)) as stream:
            stream.write(content)

    def _names(self, folder: str, *, recursive: bool) -> dict[str, int]:
        base = self._path(folder) if folder else self._root
        selector = fs.FileSelector(base, recursive=recursive, allow_not_found="/" in base)
        return {
            entry.path.removeprefix(f"{self._root}/"): entry.size
            for entry in self._fs.get_file_info(selector)
            if entry.type == fs.FileType.File
        }

    def _path(self, key: str) -> str:
        parts = key.split("/")
        assert not {"", ".", ".."} & set(parts), f"{key!r} is no key of ours"
        return f"{self._root}/{key}"

    def _if_there(self, ask: Callable[[], Result]) -> Result | None:
        """What `ask` returns of an object; None where there is no such object."""

        def asked() -> Result | None:
            try:
                return ask()
            except FileNotFoundError:
                return None

        return self._trying(asked)

    def _trying(self, ask: Callable[[], Result]) -> Result:
        """What `ask` returns, which may fail a few times."""
        for wait in (*WAITS, None):
            try:
                return ask()
            except FileNotFoundError as error:  # of a bucket: objects that lack are dealt with
                raise self._given_up(error) from error
            except (OSError, ArrowException) as error:
                said = str(error).upper()
                if wait is None or any(word in said for word in _REFUSALS):
                    raise self._given_up(error) from error
                log.warning("%s: %s; trying again", self.address, one_line(str(error))[:200])
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _given_up(self, error: Exception) -> UserError:
        return UnreachableError(
            f"--artifacts: {self.address!r} cannot be used ({one_line(str(error))[:300]}); see that"
            " the bucket exists, that the network is up, and the credentials (for s3 AWS_PROFILE or"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL); then run the same"
            " command again"
        )


def _with_options(address: str) -> str:
    """Let small objects be written to S3 by one request instead of three."""
    if not address.startswith("s3://") or "allow_delayed_open=" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}allow_delayed_open=true"
