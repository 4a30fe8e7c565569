"""Where a study keeps its artifacts: in its folder, in another one, or in an object store."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shlex
import tempfile
import urllib.parse

from prunelens.errors import UserError
from prunelens.study.artifacts.store import Store
from prunelens.study.work import read_json, write_json

PLACE_FILE = "artifacts.json"  # in a study's folder, where its artifacts are not beside it
REMOTE = ("s3", "gs")


def open_store(address: str, cache: pathlib.Path | None = None) -> Store:
    """The artifacts at an address.

    Args:
        address: a folder (a path or `file://…`) or a prefix in a bucket (`s3://bucket/prefix`,
            `gs://bucket/prefix`), with the options that `pyarrow.fs` takes behind a `?`.
        cache: of an object store, the folder for what is read from it; None: one of this user on
            this machine's disk for temporary files.
    Raises: UserError for an address of another kind, or a bucket that cannot be reached.
    """
    plain = checked(address)
    if not _is_remote(plain):
        return Store(pathlib.Path(plain))
    from prunelens.study.artifacts.bucket import Bucket  # pyarrow.fs, which only few need
    from prunelens.study.artifacts.object_store import ObjectStore

    return ObjectStore(Bucket(plain), cache or _cache_here(plain))


def artifacts_of(out: pathlib.Path, address: str | None = None, *, to_write: bool = False) -> Store:
    """The store of the study folder `out`: at `address`, else where the folder remembers it.

    The folder may come from someone else, who would choose where this user's rights are used. So
    the address has to be given to write there, and to read where the remembered one says more than
    a folder, or a bucket and a prefix: how a bucket is reached is for this user's settings to say.

    Raises: UserError where the folder's artifacts are elsewhere already, the address has to be
        given, or as `open_store`.
    """
    known, beside = remembered_place(out), out / "artifacts"
    given = None if address is None else checked(address)
    if given == str(beside.absolute()):
        given = None if known is None else given
    if known is None and given and any(beside.glob("*/*/meta.json")):
        known = str(beside.absolute())
    if known and given and _without_options(known) != _without_options(given):
        raise UserError(
            f"--artifacts: {given!r}, but the artifacts of {str(out)!r} are in {known!r}; give"
            " that, or another --out"
        )
    if to_write and known not in (None, given, str(beside.absolute())):
        raise UserError(
            f"--artifacts: {str(out)!r} has its artifacts in {known!r}; to go on there, give"
            f" --artifacts {shlex.quote(known)}"
        )
    if known and not given and not _is_plain(known):
        raise UserError(
            f"artifacts: {str(out)!r} remembers {known!r}, which says how to reach a server, and"
            f" was not contacted; if you trust it, give --artifacts {shlex.quote(known)}"
        )
    place = given or known
    return Store(beside) if place is None else open_store(place, beside)


def remember_artifacts(out: pathlib.Path, store: Store) -> None:
    """Note in the study folder `out` where its artifacts are, unless they are beside it."""
    if store.address != str((out / "artifacts").absolute()):
        write_json(out / PLACE_FILE, {"artifacts": store.address})


def checked(address: str) -> str:
    """The address as it is compared: a folder's absolute path, or a URL without a `/` behind it."""
    parts = _parts(address)
    if len(parts.scheme) < 2:  # none, or the letter of a drive
        if not address.strip():
            raise UserError("--artifacts: it is empty; give a folder or s3://bucket/prefix")
        return str(_folder(address))
    if parts.scheme == "file":
        return str(pathlib.Path(urllib.parse.unquote(parts.path)).absolute())
    shown = f"{parts.scheme}://…@{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme not in REMOTE:
        raise UserError(
            f"--artifacts: {parts.scheme}:// is not known; give a folder, s3://bucket/prefix or"
            " gs://bucket/prefix"
        )
    if parts.password is not None:
        raise UserError(
            f"--artifacts: {shown!r} holds a secret, and addresses are written down; give it by the"
            " environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    names = parts.path.strip("/").split("/")
    if not parts.netloc or parts.fragment or {"", ".", ".."} & set(names):
        raise UserError(
            f"--artifacts: {address!r} names no place in a bucket; give {parts.scheme}://bucket/"
            "prefix"
        )
    return urllib.parse.urlunsplit(parts._replace(path=f"/{'/'.join(names)}"))


def _parts(address: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(address)
    except ValueError as error:  # a bracket without its other half
        shown = re.sub("//.*@", "//…@", address)  # what may be a secret
        raise UserError(
            f"--artifacts: {shown!r} cannot be read ({error}); give a folder, s3://bucket/prefix or"
            " gs://bucket/prefix"
        ) from None


def _folder(path: str) -> pathlib.Path:
    try:
        return pathlib.Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(
            f"--artifacts: {path!r} is the home of nobody who is known here; give the whole path"
        ) from None


def remembered_place(out: pathlib.Path) -> str | None:
    """Where the study folder `out` says that its artifacts are; None: beside it."""
    path = out / PLACE_FILE
    if not path.is_file():
        return None
    try:
        return checked(read_json(path)["artifacts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'artifacts: {str(path)!r} is damaged; write {{"artifacts": "ADDRESS"}} into it'
        ) from None


def _without_options(address: str) -> str:
    """A folder, or bucket and prefix alone: what two addresses of one place have in common."""
    if not _is_remote(address):
        return address
    parts = urllib.parse.urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_plain(address: str) -> bool:
    """Whether it names no server: neither options or a user for a bucket, nor a network share."""
    if not _is_remote(address):
        return not address.startswith(("//", "\\\\"))
    return _without_options(address) == address and ":" not in urllib.parse.urlsplit(address).netloc


def _is_remote(address: str) -> bool:
    return address.startswith(tuple(f"{scheme}://" for scheme in REMOTE))


def _cache_here(address: str) -> pathlib.Path:
    """A folder that only this user can write to, the same for all processes of this machine."""
    owner = str(os.getuid()) if hasattr(os, "getuid") else "user"
    above = pathlib.Path(tempfile.gettempdir()) / f"prunelens-{owner}"
    above.mkdir(mode=0o700, exist_ok=True)
    if above.is_symlink() or (hasattr(os, "getuid") and above.stat().st_uid != os.getuid()):
        raise UserError(
            f"artifacts: {str(above)!r} belongs to someone else; set TMPDIR to another folder"
        )
    return above / hashlib.sha256(json.dumps(address).encode()).hexdigest()[:16]
