"""Which weights go."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from prunelens.config.frozen import Frozen
from prunelens.config.model import PLANTED

PLANTED_SCOPES = ("independent", "by_rate")


class _Pruning(Frozen):
    """Criterion x scope x pattern: a pruning but for its sparsity (methods §3)."""

    criterion: Literal["magnitude", "wanda", "planted"]
    """|W|, or |W_ij| * ||X_j||; `planted` changes the directions of the planted world."""
    scope: Literal["global", "matrix", "row", "independent", "by_rate"]
    """Which weights compete: all, those of one matrix, those of one output row.

    Of the planted world: whether a direction's fate is independent of its firing rate.
    """
    pattern: Literal["unstructured"] = "unstructured"
    """Which weights of a scope group may go."""
    calibration: Literal["dense", "sequential"] = "dense"
    """Wanda's norms: from the dense model, or block by block from the already pruned one."""

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        if (self.criterion == PLANTED) != (self.scope in PLANTED_SCOPES):
            raise ValueError(
                f"scope: {self.scope!r} does not go with criterion {self.criterion!r}; use"
                " independent or by_rate with planted; global, matrix or row with the others"
            )
        return self

    @model_validator(mode="after")
    def _sequential_fits(self) -> Self:
        if self.calibration == "sequential" and self.criterion != "wanda":
            raise ValueError(f"calibration: 'sequential' is for wanda, not {self.criterion!r}")
        if self.calibration == "sequential" and self.scope == "global":
            raise ValueError(
                "calibration: 'sequential' needs scope 'matrix' or 'row', not 'global'"
            )
        return self


class PruningConfig(_Pruning):
    """One pruned condition."""

    sparsity: float = Field(ge=0, lt=1)
    """Share of the weights of every scope group that is zeroed, read as an exact decimal."""

    @property
    def fraction(self) -> Fraction:
        """The sparsity as the decimal that was written, so that floor(s * n) is exact."""
        return Fraction(str(self.sparsity))

    @property
    def label(self) -> str:
        """As in run names: `wanda-row-0.30`; sequential calibration is named."""
        decimals = max(2, len(str(self.sparsity).partition(".")[2]))
        tail = "-sequential" if self.calibration == "sequential" else ""
        return f"{self.criterion}-{self.scope}-{self.sparsity:.{decimals}f}{tail}"


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

    def prunings(self) -> Iterator[PruningConfig]:
        """One PruningConfig per sparsity."""
        shared = self.model_dump(exclude={"sparsities", "seeds"})
        for sparsity in self.sparsities:
            yield PruningConfig(**shared, sparsity=sparsity)
