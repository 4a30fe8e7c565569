"""Which weights go, or which checkpoint stands in the model's place."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from prunelens.config.frozen import Frozen
from prunelens.config.names import Place, last_part, refuse_as_name
from prunelens.criteria import CRITERIA, Criterion, named

CHECKPOINT = "checkpoint"  # what tables call the method of a condition that is a checkpoint
_READ_BY_YAML = {124: "2:4", 248: "4:8"}  # YAML 1.1 takes 2:4 without quotes for minutes:seconds


def _known(criterion: str) -> str:
    if criterion not in CRITERIA:
        raise ValueError(f"{criterion[:80]!r} is no criterion; there are {', '.join(CRITERIA)}")
    return criterion


class _Pruning(Frozen):
    """Criterion x scope x pattern: a pruning but for its sparsity (methods §3)."""

    criterion: Annotated[str, AfterValidator(_known)]
    """What a weight is worth; see below."""
    scope: Literal["global", "matrix", "row", "independent", "by_rate", "none"]
    """Which weights compete: all, those of one matrix, those of one output row.

    Of the planted world: a direction's fate is independent of its firing rate, goes by it, or none
    changes.
    """
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """Which weights of a scope group may go; `2:4`: exactly two of every four neighbours in a row.

    An n:m pattern needs scope `row` and sparsity n/m.
    """
    calibration: Literal["dense", "sequential"] = "dense"
    """Inputs of a criterion that reads some: the dense model's, or block by block the pruned one's.

    sparsegpt is always `sequential`.
    """
    random_seed: int | None = Field(None, ge=0)
    """Of criterion `random`, which has 0 where none is given; null with the others."""
    lm_head: bool = Field(False, exclude_if=operator.not_)
    """Whether the output head may be pruned beside the linear layers of the decoder blocks.

    Where the head is tied to the token embedding, that loses the same weights. For `magnitude` and
    `random`; the others would need the head's inputs. Named in run names (`-head`).
    """

    @model_validator(mode="before")
    @classmethod
    def _as_the_criterion_has_it(cls, data: Any) -> Any:
        """What there is only one of need not be written."""
        if not isinstance(data, dict):
            return data
        given = dict(data)
        name = given.get("criterion")
        criterion = CRITERIA.get(name) if isinstance(name, str) else None
        if criterion and criterion.updates_weights:
            given.setdefault("calibration", "sequential")
        if criterion and criterion.needs == "lots" and given.get("random_seed") is None:
            given["random_seed"] = 0
        return given

    @field_validator("pattern", mode="before")
    @classmethod
    def _without_quotes(cls, pattern: Any) -> Any:
        is_number = isinstance(pattern, int) and not isinstance(pattern, bool)
        return _READ_BY_YAML.get(pattern, pattern) if is_number else pattern

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        if self.scope not in self.entry.scopes:
            raise ValueError(
                f"scope: {self.scope!r} does not go with criterion {self.criterion!r}; use"
                f" {' or '.join(self.entry.scopes)}"
            )
        return self

    @model_validator(mode="after")
    def _pattern_fits(self) -> Self:
        if self.group is None:
            return self
        if self.entry.score is None:
            raise ValueError(f"pattern: {self.pattern!r} means nothing in the planted world")
        if self.scope != "row":
            raise ValueError(
                f"scope: {self.scope!r} does not go with pattern {self.pattern!r}, where"
                f" {self.group[1]} neighbours in a row compete; use row"
            )
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        if self.lm_head and not self.entry.reads_weights_alone:
            raise ValueError(
                f"lm_head: true does not go with {self.criterion!r}, which would need the head's"
                f" inputs; use {named(lambda c: c.reads_weights_alone)}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _calibration_fits(self) -> Self:
        sequential = self.calibration == "sequential"
        if self.entry.updates_weights and not sequential:
            raise ValueError(
                f"calibration: 'dense' does not go with {self.criterion}, which updates weights"
                " block by block; leave it out"
            )
        if sequential and not self.entry.is_calibrated:
            raise ValueError(
                f"calibration: 'sequential' is for {named(lambda c: c.is_calibrated, ' and ')}, not"
                f" {self.criterion!r}"
            )
        if sequential and self.scope == "global":
            raise ValueError(
                "calibration: 'sequential' needs scope 'matrix' or 'row', not 'global'"
            )
        if self.random_seed is not None and self.entry.needs != "lots":
            raise ValueError(
                f"random_seed: {self.random_seed} is for criterion"
                f" {named(lambda c: c.needs == 'lots')}, not {self.criterion!r}; leave it out"
            )
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """n and m of a pattern n:m: of m neighbours in a row n go. None where unstructured."""
        if self.pattern == "unstructured":
            return None
        zeroed, size = map(int, self.pattern.split(":"))
        return zeroed, size

    @property
    def entry(self) -> Criterion:
        """The criterion itself."""
        return CRITERIA[self.criterion]

    @property
    def is_calibrated(self) -> bool:
        """Whether the criterion reads text."""
        return self.entry.is_calibrated

    def _check_share(self, sparsity: float) -> None:
        """Raises ValueError where a pattern fixes another share."""
        if self.group and Fraction(str(sparsity)) != Fraction(*self.group):
            zeroed, size = self.group
            raise ValueError(
                f"sparsity: {sparsity} does not go with pattern {self.pattern!r}, which zeroes"
                f" {zeroed} of {size}; use {zeroed / size:g}"
            )


class PruningConfig(_Pruning):
    """One pruned condition."""

    sparsity: float = Field(ge=0, lt=1)
    """Share of the weights of every scope group that is zeroed, read as an exact decimal."""

    @model_validator(mode="after")
    def _share_fits(self) -> Self:
        self._check_share(self.sparsity)
        return self

    @property
    def fraction(self) -> Fraction:
        """The sparsity as the decimal that was written, so that floor(s * n) is exact."""
        return Fraction(str(self.sparsity))

    @property
    def label(self) -> str:
        """As in run names: `wanda-row-0.30`, `magnitude-row-2of4-0.50`, `random-row-0.50-seed1`.

        Sequential calibration is named where there is a choice; `magnitude-global-0.30-head`.
        """
        decimals = max(2, len(str(self.sparsity).partition(".")[2]))
        group = "-{}of{}".format(*self.group) if self.group else ""
        tail = f"-seed{self.random_seed}" if self.random_seed is not None else ""
        if self.calibration == "sequential" and not self.entry.updates_weights:
            tail += "-sequential"
        if self.lm_head:
            tail += "-head"
        return f"{self.criterion}-{self.scope}{group}-{self.sparsity:.{decimals}f}{tail}"


class PruningGrid(_Pruning):
    """A pruning at several sparsities."""

    sparsities: tuple[float, ...] = Field(min_length=1)
    """Each in (0, 1); the dense condition is always run."""
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    """SAE seeds of these conditions, some of `sae.seeds`; null: all of them."""

    @field_validator("sparsities")
    @classmethod
    def _in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"{value} is outside (0, 1); the dense condition is always run")
        return values

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        for sparsity in self.sparsities:
            self._check_share(sparsity)
        return self

    def prunings(self) -> Iterator[PruningConfig]:
        """One PruningConfig per sparsity."""
        shared = self.model_dump(exclude={"sparsities", "seeds"})
        for sparsity in self.sparsities:
            yield PruningConfig(**shared, sparsity=sparsity)


class CheckpointConfig(Frozen):
    """A condition that someone else made: pruned elsewhere, fine-tuned or quantised."""

    checkpoint: Place
    """The local folder or hub id of a checkpoint that takes the model's place; safetensors only."""
    revision: Place | None = None
    """A hub commit, branch or tag; null means the default branch."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What run names and tables call it; null: the last part of `checkpoint`."""

    @model_validator(mode="after")
    def _has_a_label(self) -> Self:
        refuse_as_name(self.label, field="name", fix="add a name")
        if self.label == "dense":
            raise ValueError(f"name: {self.checkpoint!r} gives no name for tables; add a name")
        return self

    @property
    def label(self) -> str:
        """As in run names."""
        return self.name or last_part(self.checkpoint)

    @property
    def criterion(self) -> str:
        """What tables call the method."""
        return CHECKPOINT

    @property
    def scope(self) -> str:
        """Nobody here chose it."""
        return ""

    @property
    def pattern(self) -> str:
        """Nobody here chose it."""
        return ""

    @property
    def sparsity(self) -> float:
        """NaN: it is measured, not asked for (the artifact of the stage `prune` has it)."""
        return math.nan


class CheckpointEntry(CheckpointConfig):
    """A checkpoint in the model's place; an entry of `prunings` with `checkpoint` is one."""

    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    """SAE seeds of this condition, some of `sae.seeds`; null: all of them."""

    def prunings(self) -> Iterator[CheckpointConfig]:
        """The one condition."""
        yield CheckpointConfig(**self.model_dump(exclude={"seeds"}))


Condition: TypeAlias = PruningConfig | CheckpointConfig
"""What is done to a model."""

ENTRIES: dict[str, type[PruningGrid] | type[CheckpointEntry]] = {
    "a pruning": PruningGrid,
    "a checkpoint": CheckpointEntry,
}
"""What `prunings` lists, by the word that pydantic puts into the place of an error."""


def _entry(data: Any) -> str:
    has_one = "checkpoint" in data if isinstance(data, dict) else hasattr(data, "checkpoint")
    return "a checkpoint" if has_one else "a pruning"


PruningEntry: TypeAlias = Annotated[
    Annotated[PruningGrid, Tag("a pruning")] | Annotated[CheckpointEntry, Tag("a checkpoint")],
    Discriminator(_entry),
]
"""One entry of `prunings`."""
