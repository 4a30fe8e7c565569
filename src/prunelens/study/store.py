"""Content-addressed artifacts: written whole or not at all, verified when read.

An artifact is a folder `<stage>/<identity>/` with the stage's files and `meta.json`. It is written
to a temporary folder, flushed, and renamed into place.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prunelens.config import CorpusConfig, ModelConfig, PretrainedSaeConfig
from prunelens.errors import UserError
from prunelens.prune.checkpoint import flush

LIBRARIES = (
    *("prunelens", "torch", "transformers", "tokenizers", "numpy", "pandas", "safetensors"),
    *("scipy", "scikit-learn", "statsmodels"),
)


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
    """The kind of work, e.g. `sae`; names the function in `study.stages`."""
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
    cost: float = 1.0
    """Rough work in floating-point operations, for progress only."""
    together: str = ""
    """Stages of one name with the same key read the same inputs, and are best made in one go; ""
    for none. Not part of the identity: a stage is the same however it was made."""

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of name, version, config and the parents' identities."""
        parents = {role: parent.identity for role, parent in self.parents.items()}
        content = [self.name, self.version, self.config, parents]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class DamagedArtifactError(UserError):
    """A file of an artifact is missing or its content is not what was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"artifact {what} is missing or damaged; run the study again to mend it")


class Store:
    """The artifacts of one study folder."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self._verified: set[str] = set()

    def has(self, stage: Stage) -> bool:
        """Whether a finished artifact is there (not whether it is undamaged)."""
        return (self.folder(stage) / "meta.json").is_file()

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
        try:
            return json.loads((self.folder(stage) / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedArtifactError(
                f"{stage.name} {stage.identity[:12]}: meta.json: {error}"
            ) from None

    def read(self, stage: Stage) -> pathlib.Path:
        """The artifact's folder, once every file has been checked against its SHA-256."""
        folder = self.folder(stage)
        if stage.identity not in self._verified:
            for name, expected in self.meta(stage).get("files", {}).items():
                path = folder / name
                if not path.is_file() or sha256_of(path) != expected:
                    raise DamagedArtifactError(f"{stage.name} {stage.identity[:12]}: {name}")
            self._verified.add(stage.identity)
        return folder

    @contextlib.contextmanager
    def writing(self, stage: Stage, *, of: int = 1, **facts: Any) -> Iterator[pathlib.Path]:
        """A temporary folder that becomes the artifact if the block ends without an exception.

        Where the block makes several artifacts, `of` says how many, and each is booked its part of
        the time. `facts` are recorded in `meta.json` beside what is always there.
        """
        final = self.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        started, computed = time.monotonic(), time.process_time()
        try:
            yield temporary
            taken = {
                "wall_seconds": round((time.monotonic() - started) / of, 3),
                # Of all threads; on a machine that others use as well it says more.
                "cpu_seconds": round((time.process_time() - computed) / of, 3),
            }
            self._finish(stage, temporary, {**facts, **taken})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():  # left without meta.json by someone's hand
            shutil.rmtree(final)
        temporary.rename(final)
        flush(final.parent)
        shutil.rmtree(
            self.root / "unfinished" / f"{stage.name}-{stage.identity}", ignore_errors=True
        )

    def set_aside(self, stage: Stage) -> pathlib.Path:
        """Move a damaged artifact out of the way; returns where it went."""
        folder = self.folder(stage)
        target = self.root / "damaged" / f"{stage.name}-{stage.identity[:12]}-{os.urandom(3).hex()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return target

    def delete(self, stage: Stage) -> None:
        """Remove an artifact; it can be made again from its stage."""
        folder = self.folder(stage)
        if folder.exists():
            doomed = folder.with_name(f"{folder.name}.deleted.tmp")
            folder.rename(doomed)
            shutil.rmtree(doomed)
        self._verified.discard(stage.identity)

    def sweep_temporary(self) -> None:
        """Remove what killed processes left half-written. Only under the study's lock."""
        for folder in self.root.glob("*/*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, stage: Stage, folder: pathlib.Path, facts: dict[str, Any]) -> None:
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        for path in paths:
            flush(path)
        meta = {
            "stage": stage.name,
            "version": stage.version,
            "label": stage.label,
            "config": stage.config,
            "parents": {role: parent.identity for role, parent in stage.parents.items()},
            "libraries": library_versions(),
            "platform": platform.platform(),
            **facts,
            "files": {p.relative_to(folder).as_posix(): sha256_of(p) for p in paths},
        }
        path = folder / "meta.json"
        path.write_text(json.dumps(meta, indent=1), encoding="utf-8")
        flush(path)
        flush(folder)


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
