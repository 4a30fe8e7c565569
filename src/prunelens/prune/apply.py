"""A model in, a pruned model and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunelens.config import PruningConfig
from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.prune import calibrate
from prunelens.prune.masks import keep_masks
from prunelens.prune.matrices import as_matrix, prunable_matrices
from prunelens.prune.scores import magnitude, wanda


class MatrixSparsity(NamedTuple):
    """How much of one matrix was pruned."""

    name: str
    """As in `model.named_modules()`."""
    num_weights: int
    """Weights of the matrix."""
    num_zeroed: int
    """Weights that were set to zero, counting those that were zero already and were chosen."""
    achieved: float
    """num_zeroed / num_weights."""


class Pruned(NamedTuple):
    """What a pruning did."""

    masks: dict[str, Bool[Tensor, "_output _input"]]
    """By matrix, True where a weight was kept; on the CPU."""
    report: tuple[MatrixSparsity, ...]
    """One line per matrix, in the order of the masks."""

    @property
    def achieved_sparsity(self) -> float:
        """Share of all prunable weights that was zeroed."""
        return sum(m.num_zeroed for m in self.report) / sum(m.num_weights for m in self.report)


@torch.no_grad()
def prune_model(
    lm: LanguageModel,
    pruning: PruningConfig,
    *,
    calibration: Int[Tensor, "windows context"] | None = None,
    input_norms: Mapping[str, Float[Tensor, " _input"]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Zero weights of `lm` in place (methods §3).

    Args:
        lm: the model; an error under `calibration: dense` leaves it as it was, under `sequential`
            its lower blocks may be pruned already.
        pruning: criterion, scope, sparsity, calibration.
        calibration: token windows; Wanda needs them, unless `input_norms` is given.
        input_norms: what `input_norms` gave for the dense model, to be used for many sparsities.
        progress: called with the number of calibration windows done.
    Raises: UserError where Wanda's norms are missing or of another model, where scores are NaN
        or infinite, and as `prunable_matrices`.
    """
    _check(pruning, calibration, input_norms)
    masks: dict[str, Tensor] = {}
    scope = pruning.scope
    assert scope in ("global", "matrix", "row"), "the planted world has no weights"
    for scores in _scores(lm, pruning, calibration, input_norms, progress):
        new = keep_masks(scores, scope=scope, sparsity=pruning.fraction)
        _zero(prunable_matrices(lm), new)
        masks |= {name: mask.cpu() for name, mask in new.items()}
    return Pruned(masks, tuple(_line(name, mask) for name, mask in masks.items()))


@torch.no_grad()
def apply_masks(lm: LanguageModel, masks: Mapping[str, Bool[Tensor, "_output _input"]]) -> None:
    """Zero the weights of `lm`, in place, where the masks are False.

    Raises: UserError, before any change, where names or shapes are not those of the model.
    """
    matrices = prunable_matrices(lm)
    if odd := sorted(set(masks) ^ set(matrices)):
        whose = "the masks" if odd[0] in masks else lm.label
        raise UserError(
            f"masks: {len(odd)} matrices differ, first {odd[0]!r}, which only {whose} has;"
            " use masks of this model"
        )
    for name, mask in masks.items():
        shape = as_matrix(matrices[name]).shape
        if mask.shape != shape:
            raise UserError(
                f"masks: {name} has shape {list(mask.shape)}, the model's is {list(shape)};"
                " use masks of this model"
            )
    _zero(matrices, masks)


def _check(
    pruning: PruningConfig, calibration: Tensor | None, input_norms: Mapping[str, Tensor] | None
) -> None:
    """Refuse what the configuration alone cannot: see there for the rest."""
    if pruning.calibration == "sequential" and input_norms is not None:
        raise UserError(
            "pruning.calibration: 'sequential' measures its own norms; give calibration windows"
            " instead of input_norms"
        )
    if pruning.criterion == "wanda" and calibration is None and input_norms is None:
        raise UserError("pruning.criterion: 'wanda' needs calibration windows or input_norms")


def _scores(
    lm: LanguageModel,
    pruning: PruningConfig,
    calibration: Tensor | None,
    norms: Mapping[str, Tensor] | None,
    progress: Callable[[int], None] | None,
) -> Iterator[_Scores]:
    """The scores of matrices that are masked together, then those of the next block, if any."""
    matrices = prunable_matrices(lm)
    if pruning.criterion == "magnitude":
        yield _Scores(matrices, None)
    elif pruning.calibration == "sequential":
        assert calibration is not None
        for block_norms in calibrate.norms_upwards(lm, calibration, progress):
            yield _Scores({name: matrices[name] for name in block_norms}, block_norms)
    else:
        if norms is None:
            assert calibration is not None
            norms = calibrate.input_norms(lm, calibration, progress)
        _check_norms(matrices, norms)
        yield _Scores(matrices, norms)


class _Scores(Mapping[str, Tensor]):
    """Scores by matrix, computed on look-up, so that a large model's are never held together."""

    def __init__(
        self, matrices: Mapping[str, nn.Module], norms: Mapping[str, Tensor] | None
    ) -> None:
        self._matrices = matrices
        self._norms = norms

    def __getitem__(self, name: str) -> Tensor:
        weight = as_matrix(self._matrices[name])
        return magnitude(weight) if self._norms is None else wanda(weight, self._norms[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def _check_norms(matrices: Mapping[str, nn.Module], norms: Mapping[str, Tensor]) -> None:
    for name, module in matrices.items():
        num_inputs = as_matrix(module).shape[1]
        if name not in norms or norms[name].shape != (num_inputs,):
            raise UserError(
                f"input_norms: {name} needs {num_inputs} norms; use what input_norms gives for"
                " this model"
            )


def _zero(matrices: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = as_matrix(matrices[name])
        weight.masked_fill_(~mask.to(weight.device), 0)


def _line(name: str, mask: Tensor) -> MatrixSparsity:
    num_zeroed = mask.numel() - int(mask.sum())
    return MatrixSparsity(name, mask.numel(), num_zeroed, num_zeroed / mask.numel())
