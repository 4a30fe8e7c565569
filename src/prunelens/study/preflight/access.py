"""May everything that a study names be read: models, checkpoints, data sets, SAEs of others?"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterator

from prunelens import hub
from prunelens.config import StudyConfig
from prunelens.study.pinning import Repository, repositories_of
from prunelens.study.preflight.finding import Finding


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
    found = repositories_of(study)
    releases = [s.release for model in study.models for s in model.pretrained if s.release]
    names = filter(None, map(_repository_of, dict.fromkeys(releases)))
    found += [Repository(name, "models.pretrained.release", "model", None) for name in names]
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
