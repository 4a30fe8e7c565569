"""May everything that a study names be read: models, checkpoints, data sets, SAEs of others?"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from prunelens import hub
from prunelens.checkpoint import is_local
from prunelens.config import CheckpointConfig, StudyConfig
from prunelens.study.preflight.finding import Finding


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


def access_checks(study: StudyConfig) -> Iterator[Finding]:
    """Ask the hub about every repository, with the user's token; nothing is fetched.

    Where the hub cannot be asked that is said once, as a warning; weights in the cache are enough.
    """
    unknown: list[str] = []
    why = ""
    for repository in repositories(study):
        found = hub.access(**repository._asdict(), ask=not unknown)
        if found.state == "unknown":
            unknown.append(repository.name)
            why = why or found.problem
        elif found.state == "refused":
            what, _, fix = found.problem.rpartition("; ")
            yield Finding("error", "access", what, fix)
        else:
            there = "is in the cache" if found.state == "cached" else "can be read"
            yield Finding("ok", "access", f"{repository.name} {there}")
    if unknown:
        yield Finding(
            "warning",
            "access",
            f"the hub cannot be asked ({why}), so access is not known to {', '.join(unknown)}",
            "plan again with a connection",
        )


def repositories(study: StudyConfig) -> list[Repository]:
    """Everything on the hub that a study names, each once."""
    found: list[Repository] = []
    for model in study.models:
        if not model.is_planted and not is_local(model.name):
            found.append(Repository(model.name, "models.name", "model", model.revision))
        releases = {sae.release: None for sae in model.pretrained if sae.release is not None}
        found.extend(
            Repository(name, "models.pretrained.release", "model", None)
            for name in map(_repository_of, releases)
            if name is not None
        )
    for condition in study.conditions():
        if isinstance(condition, CheckpointConfig) and not is_local(condition.checkpoint):
            name, revision = condition.checkpoint, condition.revision
            found.append(Repository(name, "prunings.checkpoint", "model", revision))
    for field, corpus in (("corpus", study.corpus), ("perplexity.corpus", study.perplexity.corpus)):
        if corpus is not None and corpus.source == "hub":
            assert corpus.dataset is not None  # CorpusConfig sees to it
            if not pathlib.Path(corpus.dataset).is_dir():
                name = corpus.dataset
                found.append(Repository(name, f"{field}.dataset", "dataset", corpus.revision))
    return list(dict.fromkeys(found))


def _repository_of(release: str) -> str | None:
    """The hub repository of a release of SAELens; None where only SAELens would know.

    Its list is read line by line: importing SAELens takes many seconds.
    """
    spec = importlib.util.find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        listed = pathlib.Path(folder) / "pretrained_saes.yaml"
        if listed.is_file() and (name := _listed(release, listed.read_text(encoding="utf-8"))):
            return name
    return release if "/" in release else None


def _listed(release: str, text: str) -> str | None:
    """`repo_id` of one entry at the top level of a YAML file."""
    entry = re.search(rf"^{re.escape(release)}:\n((?: .*\n)*)", text, re.MULTILINE)
    found = re.search(r"^  repo_id: (\S+)$", entry[1], re.MULTILINE) if entry else None
    return found[1].strip("'\"") if found else None
