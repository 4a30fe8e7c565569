"""What a plan consists of: runs, their SAEs and stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from prunelens.config import PruningConfig, StudyConfig
from prunelens.study.store import Stage


@dataclass(frozen=True)
class Sae:
    """Which SAE of a condition: its start, its data order, and whether its space is rotated."""

    init_seed: int
    data_seed: int
    rotated: bool = False


@dataclass(frozen=True)
class Run:
    """Model x layer x condition."""

    name: str
    """For example `gemma-3-1b/L12/wanda-row-0.30`."""
    model: str
    layer: int
    pruning: PruningConfig | None
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
            if parent.name == "activations"
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
