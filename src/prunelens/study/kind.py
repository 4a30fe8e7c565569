"""What a kind of stage is, told once, beside the function that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prunelens.study.cost import Asked, Cost
from prunelens.study.work import Work

Rate = Literal["language model", "SAE training", "SAE encoding", "matching"]
RATES: tuple[Rate, ...] = get_args(Rate)
SPARSE = 4.0  # times as long as the language model's take operations on few latents (2 cores)
LEAST_COST = 1e7


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
    cost: Callable[[Asked], Cost] = lambda _: Cost()
    """From its config alone; none for what takes minutes at most."""
    rate: Rate | None = None
    """The kind of work whose rate it runs at; None: it is no work worth counting."""
    has_logits: bool = False
    """It holds the scores of a batch over the whole vocabulary."""

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
        sparse = self.rate in ("SAE training", "SAE encoding")
        return max(LEAST_COST, cost.flops * (SPARSE if sparse else 1.0))
