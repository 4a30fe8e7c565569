"""A study keeps the commits of the hub that it began with.

What a study file leaves open (`revision: null`) is resolved when the study is first run, and the
commit goes into study.yaml of its folder. The same file run again in that folder has the same
commit, whatever the hub has by then.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from prunelens import hub
from prunelens.checkpoint import is_local
from prunelens.config import (
    CheckpointEntry,
    CorpusConfig,
    ModelConfig,
    StudyConfig,
    study_from_data,
)
from prunelens.errors import UserError
from prunelens.study_file import parse_yaml, read_text

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")


class Repository(NamedTuple):
    """What a study names on the hub."""

    name: str
    """Its id."""
    field: str
    """The study's field that names it."""
    kind: hub.Kind
    """A model (SAEs too) or a data set."""
    revision: str | None
    """As the study has it."""


def pinned(study: StudyConfig, out: pathlib.Path) -> StudyConfig:
    """The study with a commit in the place of every `revision: null` of something on the hub.

    One that the folder's study.yaml has for the same repository is used again, and told; the others
    are asked for.

    Args:
        study: as the user wrote it.
        out: the study's folder, which need not be there.
    Raises: UserError where the hub refuses, or is out of reach and there is nothing in the cache.
    """
    if all(place.revision for place in repositories_of(study)):
        return study
    known = _commits(_recorded(out / "study.yaml"))
    named = _commits(repositories_of(study))  # another entry's, where a repository is listed twice
    used: dict[str, str] = {}

    def commit(place: Repository) -> str:
        if place.revision is not None:
            return place.revision
        left = known.get(place[:3], set()) - named.get(place[:3], set())
        if len(left) != 1:
            return hub.commit(**place._asdict())
        (used[place.name],) = left
        return used[place.name]

    result = _walk(study, commit)
    if used:
        names = ", ".join(f"{name}@{revision[:12]}" for name, revision in used.items())
        log.warning(
            "%s: as this folder's study.yaml has it; for what the hub has now name a revision or"
            " another folder",
            names,
        )
    return result


def _recorded(path: pathlib.Path) -> list[Repository]:
    """Those of a folder's study.yaml; none where it is missing or damaged, which is told."""
    if not path.is_file():
        return []
    try:
        return repositories_of(study_from_data(parse_yaml(read_text(path), where=str(path))))
    except UserError as error:
        log.warning("%s; commits are asked for anew", error)
        return []


def _commits(places: Iterable[Repository]) -> dict[tuple[str, str, str], set[str]]:
    """The full commits of each place."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for place in places:
        if place.revision is not None and COMMIT.fullmatch(place.revision):
            found.setdefault(place[:3], set()).add(place.revision)
    return found


def repositories_of(study: StudyConfig) -> list[Repository]:
    """Everything on the hub that has a revision in the study."""
    found: list[Repository] = []
    _walk(study, found.append)
    return found


def _walk(study: StudyConfig, revise: Callable[[Repository], Any]) -> StudyConfig:
    """The study with `revise` asked for the revision of everything on the hub."""

    def model(config: ModelConfig) -> ModelConfig:
        if config.is_planted or is_local(config.name):
            return config
        place = Repository(config.name, "models.name", "model", config.revision)
        return config.model_copy(update={"revision": revise(place)})

    def text(config: CorpusConfig, field: str) -> CorpusConfig:
        if config.source != "hub" or pathlib.Path(config.dataset or "").is_dir():
            return config
        name = config.dataset or ""
        place = Repository(name, f"{field}.dataset", "dataset", config.revision)
        return config.model_copy(update={"revision": revise(place)})

    def entry(config: Any) -> Any:
        if not isinstance(config, CheckpointEntry) or is_local(config.checkpoint):
            return config
        name, field = config.checkpoint, "prunings.checkpoint"
        place = Repository(name, field, "model", config.revision)
        return config.model_copy(update={"revision": revise(place)})

    update: dict[str, Any] = {
        "models": tuple(map(model, study.models)),
        "prunings": tuple(map(entry, study.prunings)),
        "corpus": text(study.corpus, "corpus"),
    }
    for part in ("perplexity", "probes"):
        if (own := getattr(study, part).corpus) is not None:
            own = text(own, f"{part}.corpus")
            update[part] = getattr(study, part).model_copy(update={"corpus": own})
    return study.model_copy(update=update)
