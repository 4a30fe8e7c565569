"""Content-addressed artifacts: written whole or not at all, verified when read.

An artifact is a folder `<stage>/<identity>/` with the stage's files and `meta.json`. It is written
to a temporary folder, flushed, and renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prunelens.config import CorpusConfig, ModelConfig, PretrainedSaeConfig
from prunelens.errors import UserError
from prunelens.study.artifacts.links import is_plain
from prunelens.study.artifacts.locks import Locks
from prunelens.study.artifacts.seal import (
    identity_of,
    library_versions,
    sealed,
    sha256_of,
    unsealed,
)
from prunelens.temporary import flush, is_left, remove, temporary_beside

CLAIMS_FILE = ".claims"  # empty; stages are locked on its bytes
# The disk cannot read it, or what lies in its place is no file.
LOST = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
log = logging.getLogger(__name__)


class Source(NamedTuple):
    """What a stage needs to do its work but what may not change its result."""

    model: ModelConfig
    """Where the model is."""
    corpus: CorpusConfig | None
    """Where the text is, for the stages that read text."""
    checkpoint_every: int
    """How often an SAE in training is saved."""
    pretrained: PretrainedSaeConfig | None = None
    """Where the SAE of others is, for the stage that tries it."""
    checkpoint: ModelConfig | None = None
    """Of the stage `prune`: the checkpoint that takes the model's place, where one does."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of work: what goes into its identity, and what is only needed to do it."""

    name: str
    """The kind of work, e.g. `sae`: of a `StageKind` in `study.stages`."""
    version: int
    """Raised when the same config would give other numbers."""
    config: Mapping[str, Any]
    """JSON data; every field is part of the identity."""
    parents: Mapping[str, Stage]
    """Role -> the stage whose artifact is read."""
    label: str = ""
    """What a person calls it; not part of the identity."""
    source: Source | None = None
    """Where to find models and text; not part of the identity."""
    estimate: Callable[[], float] = lambda: 1.0
    """Gives `cost`; asked only where work is done, for it may have to look into the model."""
    together: str = ""
    """Stages of one name with the same key read the same inputs, and are best made in one go; ""
    for none. Not part of the identity: a stage is the same however it was made."""

    @functools.cached_property
    def cost(self) -> float:
        """Rough work in floating-point operations, for progress only."""
        return self.estimate()

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of name, version, config and the parents' identities."""
        parents = {role: parent.identity for role, parent in self.parents.items()}
        return identity_of(self.name, self.version, self.config, parents)


class DamagedArtifactError(UserError):
    """A file of an artifact is missing or its content is not what was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"artifact {what} is missing or damaged; run the study again to mend it")
        self.what = what


class Store:
    """The artifacts in one folder, which several machines may share."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        self.locks = Locks(root / CLAIMS_FILE)

    @property
    def address(self) -> str:
        """Where the artifacts are, as `open_store` takes it."""
        return str(self.root.absolute())

    @property
    def place(self) -> pathlib.Path | None:
        """The folder of a disk that artifacts fill; None where that is no disk of this machine."""
        return self.root

    def check_usable(self) -> None:
        """Raises UserError where nothing can be written; a folder's disk tells by itself."""

    def has(self, stage: Stage) -> bool:
        """Whether a finished artifact is there (not whether it is undamaged)."""
        return (self.folder(stage) / "meta.json").is_file()

    def finished(self, kind: str) -> set[str]:
        """Identities of the finished artifacts of a kind of stage."""
        return {path.parent.name for path in (self.root / kind).glob("*/meta.json")}

    def folder(self, stage: Stage) -> pathlib.Path:
        """Where the artifact of `stage` is or would be."""
        return self.root / stage.name / stage.identity

    def partial(self, stage: Stage) -> pathlib.Path:
        """A folder for checkpoints of unfinished work; it goes when the artifact is published."""
        folder = self.root / "unfinished" / f"{stage.name}-{stage.identity}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def meta(self, stage: Stage) -> dict[str, Any]:
        """The artifact's `meta.json`."""
        with _lost_is_damaged(stage, "meta.json"):
            return parsed_meta(stage, self._read_meta(stage))

    def forget(self, stage: Stage) -> None:
        """Look at the artifact anew when it is next asked for."""
        self._verified.discard(stage.identity)

    def at_hand(self, stage: Stage) -> pathlib.Path:
        """The folder of an artifact that whoever orders the work has found to be sound."""
        return self.folder(stage)

    def read(self, stage: Stage) -> pathlib.Path:
        """The artifact's folder, once every file has been checked against its SHA-256."""
        folder = self.folder(stage)
        if stage.identity not in self._verified:
            if folder.is_symlink():
                raise damaged(stage, "it is a link")
            self._verify(stage, folder, self.meta(stage))
            self._verified.add(stage.identity)
        return folder

    def found(self, stage: Stage | None) -> pathlib.Path | None:
        """`read`; None where there is no such stage, or its artifact is not there."""
        return self.read(stage) if stage and self.has(stage) else None

    def needed(self, stage: Stage, what: str) -> pathlib.Path:
        """`read`. Raises UserError where the artifact, which is called `what`, is not there."""
        if not self.has(stage):
            raise UserError(f"STUDY: {what} is not there; run the study first")
        return self.read(stage)

    @contextlib.contextmanager
    def writing(
        self, stage: Stage, *, of: int = 1, facts: Mapping[str, Any] | None = None
    ) -> Iterator[pathlib.Path]:
        """A temporary folder that becomes the artifact if the block ends without an exception.

        Where the block makes several artifacts, `of` says how many, and each is booked its part of
        the time. `facts`, as they are once the block has ended, are recorded in `meta.json` beside
        what is always there.
        """
        final = self.folder(stage)
        if final.parent.is_symlink():
            raise UserError(f"artifacts: {stage.name!r} is a link; put its content in its place")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(final)
        temporary.mkdir()
        started = time.monotonic()  # which no clock that is set can turn back
        computed = time.process_time()
        try:
            yield temporary
            taken = {
                "wall_seconds": round((time.monotonic() - started) / of, 3),
                # Of all threads; on a machine that others use as well it says more.
                "cpu_seconds": round((time.process_time() - computed) / of, 3),
            }
            self._finish(stage, temporary, {**(facts or {}), **taken})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._publish(stage, temporary)
        shutil.rmtree(
            self.root / "unfinished" / f"{stage.name}-{stage.identity}", ignore_errors=True
        )

    def _publish(self, stage: Stage, temporary: pathlib.Path) -> None:
        """Give the artifact its name; one that another process has given it meanwhile stays."""
        final = self.folder(stage)
        if final.exists() and not _is_whole(final):  # left without meta.json by someone's hand
            self._mend(stage, damaged(stage, "without meta.json"))
        try:
            temporary.rename(final)
        except OSError:
            if not _is_whole(final):
                raise
            shutil.rmtree(temporary)
        flush(final.parent)

    def is_sound(self, stage: Stage) -> bool:
        """Whether the artifact is there and what was written; a damaged one is set aside."""
        folder = self.folder(stage)
        if not folder.exists() and not folder.is_symlink():
            return False
        try:
            self.read(stage)
        except DamagedArtifactError as damage:
            self._mend(stage, damage)
            return False
        return True

    def _mend(self, stage: Stage, damage: DamagedArtifactError) -> None:
        """Set the artifact aside, and say so; whoever needs it makes it again."""
        where = self.set_aside(stage)
        log.warning("damaged artifact %s: moved to %s and made again", damage.what, where.name)

    def set_aside(self, stage: Stage) -> pathlib.Path:
        """Move a damaged artifact out of the way; returns where it went."""
        target = self._place_aside(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has been quicker
            self.folder(stage).rename(target)
        self.forget(stage)
        return target

    def delete(self, stage: Stage) -> None:
        """Remove an artifact; it can be made again from its stage."""
        remove(self.folder(stage))
        self.forget(stage)

    def sweep_temporary(self) -> None:
        """Remove what killed processes left half-written, but not what one is writing.

        Checkpoints too, of what was published in the moment before its process was killed.
        """
        for folder in self.left_half_written():
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.root / "unfinished").glob("*-*"):
            kind, _, identity = folder.name.rpartition("-")
            if identity in self.finished(kind) and self.locks.is_free(identity):
                shutil.rmtree(folder, ignore_errors=True)

    def left_half_written(self) -> Iterator[pathlib.Path]:
        """What killed processes left half-written.

        Where the file system has no locks, nobody's claim can be seen: a folder then counts as
        written to while the process in its name runs, and one of another machine for a day.
        """
        for folder in self.root.glob("*/*.tmp"):
            if folder.parent.is_symlink():  # what it leads to is not ours
                continue
            if self.locks.is_free(folder.name.split(".")[0]) and is_left(folder):
                yield folder

    def _place_aside(self, stage: Stage) -> pathlib.Path:
        name = f"{stage.name}-{stage.identity[:12]}-{os.urandom(3).hex()}"
        return self.root / "damaged" / name

    def _read_meta(self, stage: Stage) -> bytes:
        if not is_plain(self.folder(stage), "meta.json"):
            raise damaged(stage, "meta.json")
        return (self.folder(stage) / "meta.json").read_bytes()

    def _verify(self, stage: Stage, folder: pathlib.Path, meta: dict[str, Any]) -> None:
        """Raises DamagedArtifactError unless `folder` holds what `meta` says, and it is `stage`."""
        for name, expected in named_files(stage, meta).items():
            with _lost_is_damaged(stage, name):
                if not is_plain(folder, name) or sha256_of(folder / name) != expected:
                    raise damaged(stage, name)

    def _finish(self, stage: Stage, folder: pathlib.Path, facts: dict[str, Any]) -> None:
        names = files_of(folder)
        for name in names:
            flush(folder / name)
        meta = {
            "stage": stage.name,
            "version": stage.version,
            "label": stage.label,
            "config": stage.config,
            "parents": {role: parent.identity for role, parent in stage.parents.items()},
            "libraries": library_versions(),
            "platform": platform.platform(),
            **facts,
            "files": {name: sha256_of(folder / name) for name in names},
        }
        path = folder / "meta.json"
        path.write_text(sealed(meta), encoding="utf-8")
        flush(path)
        flush(folder)


def parsed_meta(stage: Stage, content: bytes) -> dict[str, Any]:
    """What an artifact's `meta.json` says. Raises DamagedArtifactError where it was changed."""
    try:
        return unsealed(content.decode())
    except (ValueError, RecursionError) as error:
        raise damaged(stage, f"meta.json: {error}") from None


def named_files(stage: Stage, meta: dict[str, Any]) -> dict[str, str]:
    """Name -> SHA-256 of an artifact's files.

    Raises: DamagedArtifactError where `meta` is another stage's, or names what is in no artifact.
    """
    what = [meta.get(field) for field in ("stage", "version", "config", "parents")]
    if identity_of(*what) != stage.identity:
        raise damaged(stage, "it is another one by its meta.json")
    files = meta.get("files")
    if not isinstance(files, dict):
        raise damaged(stage, "meta.json")
    for name in files:
        if {"", ".", ".."} & set(name.split("/")) or re.search(r"[\\:\0]", name):
            raise damaged(stage, name)
    return files


def damaged(stage: Stage, why: str) -> DamagedArtifactError:
    """That an artifact is damaged, and what of it."""
    return DamagedArtifactError(f"{stage.name} {stage.identity[:12]}: {why}")


@contextlib.contextmanager
def _lost_is_damaged(stage: Stage, name: str) -> Iterator[None]:
    """A file that the disk does not give back is damage; that others cannot be read may pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise damaged(stage, f"{name}: {error.strerror}") from None


def files_of(folder: pathlib.Path) -> list[str]:
    """Names of an artifact's files but `meta.json`, with `/` between folders."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in names if name != "meta.json"]


def _is_whole(folder: pathlib.Path) -> bool:
    return (folder / "meta.json").is_file()
