"""Pruning criteria (methods §3), each told once: what a weight is worth, the lowest going first.

Study files, plans, calibration, pruning, cards and documentation read them from here. Nothing here
imports torch: a score is made of a tensor's own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from prunelens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Needs: TypeAlias = Literal["weights", "lots", "norms", "products"]
Score: TypeAlias = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Criterion:
    """How weights are scored, and what has to be known for that."""

    name: str
    """As in study files, run names and tables."""
    means: str
    """Its score, in signs or words."""
    score: Score | None
    """Some rows of a matrix [rows, input], and what it needs -> scores, none negative.

    Scores of the weights' own 16 bits are told apart in half the time of float32, which all others
    become. None: there are no weights.
    """
    needs: Needs = "weights"
    """What a score is made from beside the weights, and so how the model is calibrated.

    `weights`: nothing, and the score gets the weights once more. `lots`: numbers drawn by
    `random_seed` [rows, input], of which only the order means anything. `norms`: of every input
    over the calibration text [input]. `products`: of the inputs with each other; the weights that
    stay are updated as SparseGPT does, and the score gets the diagonal of its factor [input].
    """
    scopes: tuple[str, ...] = ("global", "matrix", "row")
    """Which it goes with; the usual one first."""
    rises: bool = False
    """No score is negative, or above that of the largest weight with the largest norm or lot, which
    then tells whether all are finite. If not, each is looked at before any weight goes."""
    work: float = 10.0
    """Operations for each weight, to score and to count it; beside those, a calibration's passes
    over the text are counted."""
    version: int = 1
    """Raise it when the same pruning would zero other weights."""

    @property
    def reads_weights_alone(self) -> bool:
        """Whether it can be asked of a matrix whose inputs nobody saw."""
        return self.score is not None and self.needs in ("weights", "lots")

    @property
    def is_calibrated(self) -> bool:
        """Whether it reads text."""
        return self.needs in ("norms", "products")

    @property
    def updates_weights(self) -> bool:
        """Whether what stays is changed as well, so that masks alone do not give the model."""
        return self.needs == "products"


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", "|W|", lambda weight, _: weight.abs(), rises=True),
        Criterion(
            "wanda",
            "|W_ij| * ‖X_j‖, the Euclidean norm of its input over all calibration tokens",
            lambda weight, norms: weight.abs().float() * norms,
            needs="norms",
            scopes=("row", "matrix", "global"),
            rises=True,
        ),
        Criterion(
            "sparsegpt",
            "W_ij² / [H⁻¹]_jj, with the remaining weights updated",
            lambda weight, diagonal: weight.square() / diagonal.square(),
            needs="products",
            scopes=("matrix", "row"),
        ),
        Criterion("random", "by lot", lambda _, lots: lots, needs="lots", rises=True),
        Criterion(
            "planted",
            "changes the directions of the planted world",
            None,
            scopes=("independent", "by_rate", "none"),
        ),
    )
}


def register(criterion: Criterion) -> None:
    """Let study files and `PruningConfig` name one more criterion.

    For what lives outside this package, from Python: in a script that prunes or runs the study
    itself. The command line and workers in other processes know nothing of it.
    Raises: UserError where the name is taken, or is none that run names and tables can hold.
    """
    if criterion.name in (*CRITERIA, "checkpoint", "dense") or not criterion.name.isidentifier():
        raise UserError(
            f"criterion: {criterion.name!r} is taken or no plain name; name it otherwise"
        )
    CRITERIA[criterion.name] = criterion


def named(question: Callable[[Criterion], bool], joined: str = " or ") -> str:
    """The criteria of which something is true, for a message."""
    return joined.join(criterion.name for criterion in CRITERIA.values() if question(criterion))
