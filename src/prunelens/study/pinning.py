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
from typing import Any

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
Place = tuple[str, str, hub.Kind]
"""What a commit belongs to: the study's field, a repository's id and its kind."""


def pinned(study: StudyConfig, out: pathlib.Path) -> StudyConfig:
    """The study with a commit in the place of every `revision: null` of something on the hub.

    One that the folder's study.yaml has for the same repository is used again, and told; the others
    are asked for.

    Args:
        study: as the user wrote it.
        out: the study's folder, which need not be there.
    Raises: UserError where the hub refuses, or is out of reach and there is nothing in the cache.
    """
    if all(revision is not None for _, revision in hub_places(study)):
        return study
    known = _commits(_recorded(out / "study.yaml"))
    named = _commits(hub_places(study))  # another entry's, where a repository is listed twice
    used: dict[str, str] = {}

    def commit(place: Place) -> str:
        field, name, kind = place
        left = known.get(place, set()) - named.get(place, set())
        if len(left) != 1:
            return hub.commit(name, field=field, kind=kind, revision=None)
        (used[name],) = left
        return used[name]

    result = _walk(study, lambda place, revision: revision or commit(place))
    if used:
        names = ", ".join(f"{name}@{revision[:12]}" for name, revision in used.items())
        log.warning(
            "%s: as this folder's study.yaml has it; for what the hub has now name a revision or"
            " another folder",
            names,
        )
    return result


def _recorded(path: pathlib.Path) -> list[tuple[Place, str | None]]:
    """`hub_places` of a folder's study.yaml; none where it is missing or damaged, which is told."""
    if not path.is_file():
        return []
    try:
        return hub_places(study_from_data(parse_yaml(read_text(path), where=str(path))))
    except UserError as error:
        log.warning("%s; commits are asked for anew", error)
        return []


def _commits(places: Iterable[tuple[Place, str | None]]) -> dict[Place, set[str]]:
    """The full commits of each place."""
    found: dict[Place, set[str]] = {}
    for place, revision in places:
        if revision is not None and COMMIT.fullmatch(revision):
            found.setdefault(place, set()).add(revision)
    return found


def hub_places(study: StudyConfig) -> list[tuple[Place, str | None]]:
    """Everything on the hub that has a revision, and that revision."""
    found: list[tuple[Place, str | None]] = []
    _walk(study, lambda place, revision: found.append((place, revision)))
    return found


def _walk(study: StudyConfig, revise: Callable[[Place, str | None], Any]) -> StudyConfig:
    """The study with `revise` asked for the revision of everything on the hub."""

    def model(config: ModelConfig) -> ModelConfig:
        if config.is_planted or is_local(config.name):
            return config
        place: Place = ("models.name", config.name, "model")
        return config.model_copy(update={"revision": revise(place, config.revision)})

    def text(config: CorpusConfig, field: str) -> CorpusConfig:
        if config.source != "hub" or pathlib.Path(config.dataset or "").is_dir():
            return config
        place: Place = (f"{field}.dataset", config.dataset or "", "dataset")
        return config.model_copy(update={"revision": revise(place, config.revision)})

    def entry(config: Any) -> Any:
        if not isinstance(config, CheckpointEntry) or is_local(config.checkpoint):
            return config
        place: Place = ("prunings.checkpoint", config.checkpoint, "model")
        return config.model_copy(update={"revision": revise(place, config.revision)})

    update: dict[str, Any] = {
        "models": tuple(map(model, study.models)),
        "prunings": tuple(map(entry, study.prunings)),
        "corpus": text(study.corpus, "corpus"),
    }
    if (scored := study.perplexity.corpus) is not None:
        scored = text(scored, "perplexity.corpus")
        update["perplexity"] = study.perplexity.model_copy(update={"corpus": scored})
    return study.model_copy(update=update)
