"""What a plan consists of: runs, their SAEs and stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prunelens.config import Condition, StudyConfig
from prunelens.study.artifacts.store import Stage
from prunelens.study.parents import Sae

STORES = ("activations", "planted_activations")  # stages that make activation stores


@dataclass(frozen=True)
class Run:
    """Model x layer x condition."""

    name: str
    """For example `gemma-3-1b/L12/wanda-row-0.30`."""
    model: str
    layer: int
    pruning: Condition | None
    """None: the dense condition."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """Role -> stage whose artifact holds a result of this run: perplexity, prune, stability, …

    `transfer` is RQ3 of our own SAEs, `transfer <name>` of an SAE of others.
    """
    saes: dict[Sae, Stage] = field(default_factory=dict)
    """The run's SAEs."""

    def targets(self) -> Iterator[Stage]:
        """The stages that must be there for this run to be done."""
        yield from self.stages.values()
        yield from self.saes.values()

    def temporary(self) -> Iterator[Stage]:
        """The activation stores that the run reads: large, and easily made again."""
        stores = {
            parent.identity: parent
            for stage in self.targets()
            for parent in stage.parents.values()
            if parent.name in STORES
        }
        yield from stores.values()


@dataclass(frozen=True)
class Plan:
    """All runs of a study; dense runs come before the pruned ones that refer to them."""

    study: StudyConfig
    runs: list[Run]

    def targets(self) -> dict[str, Stage]:
        """Every run's targets by identity, in the order in which they should be made."""
        return {stage.identity: stage for run in self.runs for stage in run.targets()}


def parents_first(
    targets: Iterable[Stage], *, but: Callable[[Stage], bool] = lambda _: False
) -> Iterator[Stage]:
    """Every stage that the targets rest on, and they, once; the order of the executor.

    Not those for which `but` holds, nor what only they rest on.
    """
    seen: set[str] = set()

    def walk(stage: Stage) -> Iterator[Stage]:
        if stage.identity not in seen and not but(stage):
            seen.add(stage.identity)
            for parent in stage.parents.values():
                yield from walk(parent)
            yield stage

    for target in targets:
        yield from walk(target)
