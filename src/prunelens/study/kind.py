"""What a kind of stage is, told once, beside the function that makes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pandas as pd

from prunelens.columns import meanings_of
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

WorkKind = Literal["language model", "SAE training", "SAE encoding", "matching"]
WORK_KINDS: tuple[WorkKind, ...] = get_args(WorkKind)
SPARSE = 4.0  # times as long as the language model's take operations on few latents (2 cores)
LEAST_COST = 1e7
CONDITION = ("run", "model", "layer", "method", "sparsity")  # whose rows they are


class Table(NamedTuple):
    """A table of the output contract."""

    name: str
    """Of `tables/<name>.csv`."""
    per: str
    """What it has one row of."""
    answers: str
    """What it is there for."""
    file: str
    """Of the artifact that has the rows of one run, where it has any; "" where they are put
    together from several."""
    columns: str
    """Names and meanings of those after `leading`, as `meanings_of` reads them."""
    leading: Sequence[str] = CONDITION

    @property
    def meanings(self) -> dict[str, str]:
        """What each column means, in their order."""
        return meanings_of("\n".join((*self.leading, inspect.cleandoc(self.columns))))


class Told(NamedTuple):
    """A column of latents as the explorer shows it."""

    label: str
    """With `{arm}` where there is a column of every arm, whose name ends in it."""
    help: str
    """One sentence; `({means})` is what the arm is."""


@dataclass(frozen=True)
class StageKind:
    """How stages of one name are made, and what they cost."""

    name: str
    version: int
    """Raise it when the same config would give other numbers."""
    make: Callable[[Work], None] | None = None
    """Reads the parents' folders, writes its own files."""
    make_together: Callable[[Sequence[Work]], None] | None = None
    """In its place, where stages that read the same are best made in one go."""
    one_each: bool = False
    """Of those that one worker makes in one go, several workers make one each."""
    cost: Callable[[Costed], Cost] = lambda _: Cost()
    """From its config alone; none for what takes minutes at most."""
    work_kind: WorkKind | None = None
    """The kind of work whose rate it runs at; None: it is no work worth counting."""
    has_logits: bool = False
    """It holds the scores of a batch over the whole vocabulary."""
    tables: tuple[Table, ...] = ()
    """What the study's tables get of it."""

    def made(self, works: Sequence[Work]) -> None:
        """Make one stage, or several that are best made in one go."""
        if self.make_together:
            self.make_together(works)
        else:
            assert self.make
            (work,) = works
            self.make(work)

    def progress_cost(self, cost: Cost) -> float:
        """Roughly in proportion to its seconds, for what a person sees of the progress."""
        sparse = self.work_kind in ("SAE training", "SAE encoding")
        return max(LEAST_COST, cost.flops * (SPARSE if sparse else 1.0))


@dataclass(frozen=True)
class Question(StageKind):
    """A kind of stage that is asked of runs: told once, and the plan is read off it."""

    asked: tuple[str, ...] = ()
    """Any of these `questions` of a study asks for it; none: every study does."""
    of: Literal["every", "pruned"] = "every"
    """The runs that it is asked of."""
    config: Callable[[LayerPlan], Mapping[str, Any]] = lambda _: {}
    """All that its numbers depend on but its parents."""
    parents: Callable[[LayerPlan], Mapping[str, Stage | None]] = lambda _: {}
    """Role -> what it reads."""
    by_latent: Callable[[pd.DataFrame, int, Sequence[int]], pd.DataFrame] | None = None
    """`latents.parquet` of its artifact, the seed of a dense SAE and all seeds -> what it says of
    each latent of that SAE, for the study's own `latents.parquet`."""
    told: Mapping[str, Told] = field(default_factory=dict)
    """The columns of `by_latent` that the explorer shows, those of arms without the arm."""
    latents: str = ""
    """What the other columns of `by_latent` mean, or these elsewhere; see `latent_meanings`."""
    plan: Callable[[LayerPlan], Mapping[str, Stage]] | None = None
    """Role -> stage, in the place of `config` and `parents`: of several stages, or of none."""

    def planned(self, run: LayerPlan) -> Mapping[str, Stage]:
        """Role -> stage of one run; none where it is not asked."""
        is_asked = not self.asked or set(self.asked).intersection(run.study.questions)
        if not is_asked or (self.of == "pruned" and run.pruning is None):
            return {}
        if self.plan:
            return self.plan(run)
        return {self.name: run.stage(self.name, self.config(run), self.parents(run))}

    @property
    def latent_meanings(self) -> dict[str, str]:
        """What its columns of `latents.parquet` mean; those of arms end in `_<arm>`."""
        told = {
            f"{name}_<arm>" if "{arm}" in told.label else name: told.help.replace(" ({means})", "")
            for name, told in self.told.items()
        }
        return told | meanings_of(self.latents)
