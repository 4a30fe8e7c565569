"""One stage about to be executed: its config, its parents' folders, where to write."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelens.study.artifacts.store import Stage
from prunelens.study.parents import Of, Sae, saes_among
from prunelens.study.tracking import Tracker
from prunelens.temporary import replacing


@dataclass(frozen=True)
class Work:
    """One stage about to be executed."""

    stage: Stage
    parents: Mapping[str, pathlib.Path]
    """Role -> verified artifact folder."""
    out: pathlib.Path
    """The folder to write to."""
    partial: Callable[[], pathlib.Path]
    """Makes a folder that survives a kill, for checkpoints."""
    device: str
    progress: Callable[[float], None]
    """Told the share of the stage that is done, 0 to 1."""
    track: Callable[[], Tracker]
    """Opens the stage's run in the tracking service, where there is one."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What `meta.json` is to say of how the artifact was made, beside what is always there."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The stage's config."""
        return self.stage.config

    def saes(self, of: Of) -> dict[Sae, pathlib.Path]:
        """The folders of the parents that are SAEs of that kind."""
        return saes_among(self.parents, of)

    def share(self, total: float, *, before: float = 0.0) -> Callable[[float], None]:
        """A callback for units done so far of `total`, where `before` were done earlier."""
        return lambda done: self.progress(min(1.0, (before + done) / total))


def share_of_all(
    works: Sequence[Work], total: float, *, before: float = 0.0
) -> Callable[[float], None]:
    """`Work.share` of stages that are made in one go: every one of them is told."""
    shares = [work.share(total, before=before) for work in works]

    def tell(done: float) -> None:
        for share in shares:
            share(done)

    return tell


def read_json(path: pathlib.Path) -> Any:
    """Plain data from a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Replace a JSON file whole."""
    with replacing(path) as file:
        file.write_text(json.dumps(content), encoding="utf-8")
