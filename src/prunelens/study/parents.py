"""Which SAE is which, among those of a condition and among the parents of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Training = Literal["own", "warm", "doubled"]
Of = Literal["dense", "pruned", "own", "sae"]
ParentT = TypeVar("ParentT")


@dataclass(frozen=True)
class Sae:
    """Which SAE of a condition: its start, its data order, its space and its training."""

    init_seed: int
    data_seed: int
    rotated: bool = False
    training: Training = "own"
    """`warm`: begun from the dense SAE of that start, not from a random one; `doubled`: as the
    condition's own, but twice as long."""

    def __str__(self) -> str:
        tail = "-rotated" if self.rotated else ""
        tail += f"-{self.training}" if self.training != "own" else ""
        return f"{self.init_seed}-{self.data_seed}{tail}"

    @property
    def is_plain(self) -> bool:
        """One of the condition's own SAEs, not a control."""
        own = self.training == "own" and not self.rotated
        return own and self.init_seed == self.data_seed


class SaeRole(str):
    """The role of an SAE among a stage's parents: text in its identity, and it knows which SAE."""

    of: Of
    """Whose it is: the dense condition's, the pruned one's, or the run's own; or `sae`, where all
    are of one condition."""
    sae: Sae


def sae_role(of: Of, sae: Sae, *, plain: bool = False) -> str:
    """A SaeRole, e.g. `dense-0-1-rotated-warm`, or of `plain` SAEs alone `dense-0`."""
    role = SaeRole(f"{of}-{sae.init_seed if plain else sae}")
    role.of, role.sae = of, sae
    return role


def saes_among(parents: Mapping[str, ParentT], of: Of) -> dict[Sae, ParentT]:
    """The SAEs of one kind among a stage's parents, in their order."""
    return {
        role.sae: parent
        for role, parent in parents.items()
        if isinstance(role, SaeRole) and role.of == of
    }
