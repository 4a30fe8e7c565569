"""Artifacts in an object store, with a cache on this machine's disk.

The layout is that of a folder of artifacts: `<stage>/<identity>/`, so either can be copied to the
other. There is no renaming in an object store: `meta.json` is written last, and what has none is
no artifact. Two processes that make the same one write the same bytes; the second to come finds
`meta.json` and keeps its own to itself.
"""

from __future__ import annotations

import logging
import pathlib
import shutil

from prunelens.study.artifacts.bucket import Bucket
from prunelens.study.artifacts.store import (
    DamagedArtifactError,
    Stage,
    Store,
    damaged,
    files_of,
    named_files,
    parsed_meta,
)
from prunelens.study.matrix import STORES
from prunelens.temporary import remove, temporary_beside

log = logging.getLogger(__name__)


class ObjectStore(Store):
    """A study's artifacts in a bucket, and what this machine has read or made of them.

    The bucket decides what is there. A copy in the cache is used if it has the bucket's
    `meta.json` and the content that this names.
    """

    def __init__(self, bucket: Bucket, cache: pathlib.Path) -> None:
        """The folder `cache` may be shared by processes, also of several machines."""
        super().__init__(cache)
        self._bucket = bucket
        self._complete: set[str] = set()

    @property
    def address(self) -> str:
        """The bucket's URL."""
        return self._bucket.address

    @property
    def place(self) -> None:
        """A bucket fills by itself."""
        return None

    def has(self, stage: Stage) -> bool:
        """Whether a finished artifact is there; asks the store."""
        return self._bucket.has(f"{_key(stage)}/meta.json")

    def finished(self, kind: str) -> set[str]:
        """Identities of the finished artifacts of a kind of stage, by one listing."""
        paths = [key.split("/") for key in self._bucket.keys(kind)]
        return {parts[1] for parts in paths if len(parts) == 3 and parts[2] == "meta.json"}

    def forget(self, stage: Stage) -> None:
        """Look at the artifact anew when it is next asked for."""
        super().forget(stage)
        self._complete.discard(stage.identity)

    def read(self, stage: Stage) -> pathlib.Path:
        """The artifact's folder in the cache, once every file has been checked there."""
        if stage.identity not in self._verified:
            try:
                self._fetch(stage)
            except DamagedArtifactError:
                self._fetch(stage)  # someone may have replaced it while it was read
        return self.folder(stage)

    def at_hand(self, stage: Stage) -> pathlib.Path:
        """`read`; what is damaged is set aside, for nobody else may come to look at it."""
        try:
            return self.read(stage)
        except DamagedArtifactError as damage:
            self._mend(stage, damage)
            raise

    def check_usable(self) -> None:
        """Raises UserError where the store cannot be written to."""
        self._bucket.check_writable()

    def is_sound(self, stage: Stage) -> bool:
        """Whether the artifact is there and what was written; a damaged one is set aside.

        What this process has looked at is not asked for again. Activation stores that are not in
        the cache are not fetched for this: that all files are there must do, and who reads them
        verifies them.
        """
        if stage.identity in self._verified | self._complete:
            return True
        if not self.has(stage):
            self._drop_cached(stage)
            return False
        try:
            if stage.name in STORES and not self.folder(stage).is_dir():
                self._check_complete(stage)
            else:
                self.read(stage)
        except DamagedArtifactError as damage:
            self._mend(stage, damage)
            return False
        return True

    def set_aside(self, stage: Stage) -> pathlib.Path:
        """Copy a damaged artifact to `damaged/` in the store, then delete it."""
        target = self._place_aside(stage)
        name = target.relative_to(self.root).as_posix()
        for key in self._bucket.keys(_key(stage)):
            self._bucket.copy(key, f"{name}/{key.removeprefix(_key(stage) + '/')}")
        self.delete(stage)
        return target

    def delete(self, stage: Stage) -> None:
        """Remove an artifact from the store, `meta.json` first, and from the cache."""
        self.forget(stage)
        self._bucket.delete(f"{_key(stage)}/meta.json")
        for key in self._bucket.keys(_key(stage)):
            self._bucket.delete(key)
        self._drop_cached(stage)

    def sweep_temporary(self) -> None:
        """Remove what killed processes left in the cache, and activation stores that are gone."""
        super().sweep_temporary()
        self._sweep_gone()

    def _sweep_gone(self) -> None:
        """Cached activation stores, which are large, go when they have gone from the bucket."""
        for kind in STORES:
            cached = {path.name for path in (self.root / kind).glob("*") if "." not in path.name}
            for identity in cached - self.finished(kind) if cached else ():
                if self.locks.is_free(identity):
                    remove(self.root / kind / identity)

    def _read_meta(self, stage: Stage) -> bytes:
        found = self._bucket.get(f"{_key(stage)}/meta.json")
        if found is None:
            raise damaged(stage, "meta.json")
        return found

    def _publish(self, stage: Stage, temporary: pathlib.Path) -> None:
        """Upload the artifact, `meta.json` last, then keep it in the cache."""
        try:
            if not self.has(stage):
                names = [*files_of(temporary), "meta.json"]
                for name in names:
                    self._bucket.upload(temporary / name, f"{_key(stage)}/{name}")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._keep(stage, temporary)

    def _fetch(self, stage: Stage) -> None:
        """Have the bucket's artifact in the cache, verified."""
        content = self._read_meta(stage)
        folder = self.folder(stage)
        if (folder / "meta.json").is_file() and (folder / "meta.json").read_bytes() == content:
            try:
                super().read(stage)
            except DamagedArtifactError:  # of the copy
                pass
            else:
                return
        self._download(stage, content)
        self._verified.add(stage.identity)

    def _download(self, stage: Stage, content: bytes) -> None:
        """Replace the copy in the cache."""
        if stage.name in STORES:
            self._sweep_gone()
        meta = parsed_meta(stage, content)
        files = named_files(stage, meta)
        folder = self.folder(stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(folder)
        temporary.mkdir()
        try:
            for name in files:
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if not self._bucket.download(f"{_key(stage)}/{name}", path):
                    raise damaged(stage, name)
            (temporary / "meta.json").write_bytes(content)
            self._verify(stage, temporary, meta)
            self._keep(stage, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check_complete(self, stage: Stage) -> None:
        """Raises DamagedArtifactError where `meta.json` is not as written, or a file lacks."""
        there = self._bucket.keys(_key(stage))
        for name in named_files(stage, self.meta(stage)):
            if f"{_key(stage)}/{name}" not in there:
                raise damaged(stage, name)
        self._complete.add(stage.identity)

    def _keep(self, stage: Stage, temporary: pathlib.Path) -> None:
        """Let a folder be the copy in the cache."""
        self._drop_cached(stage)
        super()._publish(stage, temporary)

    def _drop_cached(self, stage: Stage) -> None:
        self._verified.discard(stage.identity)
        remove(self.folder(stage))


def _key(stage: Stage) -> str:
    return f"{stage.name}/{stage.identity}"
