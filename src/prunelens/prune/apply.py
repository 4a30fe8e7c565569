"""A model in, a pruned model and a report out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunelens.config import PruningConfig
from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.offload import make_editable
from prunelens.prune import calibrate, sparsegpt
from prunelens.prune.masks import PackedMasks
from prunelens.prune.matrices import (
    as_matrix,
    head_names,
    linear_matrices,
    matrix_shape,
    prunable_matrices,
)
from prunelens.prune.scores import INTEGERS, Scored, in_their_dtype
from prunelens.prune.selection import Kept, check_groups, select

log = logging.getLogger(__name__)


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
    num_zero_inputs: int = 0
    """Inputs that calibration reached and that were always 0, where the criterion looked."""


class Pruned(NamedTuple):
    """What a pruning did."""

    masks: PackedMasks
    """By matrix, True where a weight was kept; one bit per weight, or empty where not asked for."""
    report: tuple[MatrixSparsity, ...]
    """One line per matrix, in the order of `prunable_matrices`."""
    updates_weights: bool = False
    """Remaining weights were changed too, so that masks alone do not give the model again."""

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
    with_masks: bool = True,
    rounded_to: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Zero weights of `lm` in place (methods §3); some criteria also change the others.

    With `lm_head` the output head's too; one that is tied is the token embedding, which loses the
    same weights.

    Weights are scored, chosen and zeroed a block of rows at a time, so that the memory taken
    beside the model and the masks (one bit per weight) is a few MiB, however large the model;
    what block by block calibration takes is told by `norms_upwards` and `products_upwards`.

    Args:
        lm: the model; an error under `calibration: dense` leaves it as it was, under `sequential`
            its lower blocks may be pruned already.
        pruning: criterion, scope, pattern, sparsity, calibration.
        calibration: token windows, for a criterion that needs products, or norms where no
            `input_norms` are given.
        input_norms: what `input_norms` gave for the dense model, to be used for many sparsities.
        with_masks: False where only the pruned model is wanted; saves the masks' memory.
        rounded_to: what weights that are changed become numbers of, where the model's own dtype
            is wider than its files' will be; None: the model's.
        progress: called with the number of calibration windows done.
    Raises: UserError where windows or norms are missing or of another model, where scores
        are NaN or infinite, where a pattern divides no row, and as `prunable_matrices`.
    """
    _check(pruning, calibration, input_norms)
    check_prunable(lm, pruning)
    matrices = prunable_matrices(lm, lm_head=pruning.lm_head)
    shapes = {name: matrix_shape(module) for name, module in matrices.items()}
    _make_editable(lm, matrices)
    masks, num_zeroed = PackedMasks(), dict.fromkeys(shapes, 0)
    updates = pruning.entry.updates_weights
    if updates:
        assert calibration is not None
        pruned = sparsegpt.prune_upwards(lm, pruning, calibration, rounded_to, progress)
    else:
        pruned = _zeroed(_scored(lm, pruning, calibration, input_norms, progress), pruning)
    zero_inputs = dict.fromkeys(shapes, 0)
    for kept in pruned:
        zero_inputs[kept.name] = kept.num_zero_inputs
        num_zeroed[kept.name] += kept.keep.numel() - int(kept.keep.count_nonzero())
        if with_masks:
            masks.write(kept, shapes[kept.name])
    lines = ((name, math.prod(shapes[name]), gone) for name, gone in num_zeroed.items())
    report = tuple(MatrixSparsity(*line, line[2] / line[1], zero_inputs[line[0]]) for line in lines)
    blind = [name for name, shape in shapes.items() if zero_inputs[name] == shape[1]]
    if blind:
        _tell_of_zero_inputs(lm.label, pruning, blind, len(shapes))
    return Pruned(masks, report, updates)


def check_prunable(lm: LanguageModel, pruning: PruningConfig) -> None:
    """Refuse what the model's architecture does not allow; its weights are not looked at.

    Raises: UserError as `linear_matrices`, and where a pattern divides no row.
    """
    for name, module in linear_matrices(lm, lm_head=pruning.lm_head).items():
        check_groups(name, matrix_shape(module)[1], pruning.group)


@torch.no_grad()
def apply_masks(lm: LanguageModel, masks: Mapping[str, Bool[Tensor, "_output _input"]]) -> None:
    """Zero the weights of `lm`, in place, where the masks are False.

    Raises: UserError, before any change, where names or shapes are not those of the model.
    """
    matrices = prunable_matrices(lm, lm_head=not masks.keys().isdisjoint(head_names(lm)))
    if odd := sorted(set(masks) ^ set(matrices)):
        whose = "the masks" if odd[0] in masks else lm.label
        raise UserError(
            f"masks: {len(odd)} matrices differ, first {odd[0]!r}, which only {whose} has;"
            " use masks of this model"
        )
    for name, mask in masks.items():
        shape = matrix_shape(matrices[name])
        if mask.shape != shape:
            raise UserError(
                f"masks: {name} has shape {list(mask.shape)}, the model's is {list(shape)};"
                " use masks of this model"
            )
    _make_editable(lm, matrices)
    for name, mask in masks.items():
        weight = as_matrix(matrices[name])
        _zero(weight, mask.to(weight.device))


def _make_editable(lm: LanguageModel, matrices: Mapping[str, nn.Module]) -> None:
    """The matrices, and the embedding that is one weight with a head among them."""
    head = head_names(lm)
    tied = [] if matrices.keys().isdisjoint(head) else head[1:]
    make_editable(lm.model, [*matrices, *tied])


def _check(
    pruning: PruningConfig, calibration: Tensor | None, input_norms: Mapping[str, Tensor] | None
) -> None:
    """Refuse what the configuration alone cannot: see there for the rest."""
    if pruning.calibration == "sequential" and input_norms is not None:
        raise UserError(
            "pruning.calibration: 'sequential' measures its own inputs; give calibration windows"
            " instead of input_norms"
        )
    if calibration is None and pruning.entry.needs == "products":
        raise UserError(f"pruning.criterion: {pruning.criterion!r} needs calibration windows")
    if calibration is None and input_norms is None and pruning.is_calibrated:
        raise UserError(
            f"pruning.criterion: {pruning.criterion!r} needs calibration windows or input_norms"
        )


def _zeroed(scored: Iterator[dict[str, Scored]], pruning: PruningConfig) -> Iterator[Kept]:
    """What stays, once the rest is zeroed."""
    scope = pruning.scope
    assert scope in ("global", "matrix", "row"), "the planted world has no weights"
    for matrices in map(in_their_dtype, scored):
        for kept in select(matrices, scope=scope, sparsity=pruning.fraction, group=pruning.group):
            matrix = matrices[kept.name]
            _zero(matrix.weight[kept.rows], kept.keep)
            yield kept._replace(num_zero_inputs=matrix.num_zero_inputs)


def _tell_of_zero_inputs(label: str, pruning: PruningConfig, names: list[str], total: int) -> None:
    """Of such matrices calibration says nothing."""
    log.warning(
        "%s: calibration reached %d of %d matrices with nothing but zeros (first %s); their weights"
        " go %s",
        *(label, len(names), total, names[0]),
        "before all others" if pruning.scope == "global" else "by magnitude",
    )


def _scored(
    lm: LanguageModel,
    pruning: PruningConfig,
    calibration: Tensor | None,
    norms: Mapping[str, Tensor] | None,
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Scored]]:
    """The matrices that are masked together, then those of the next block, if any."""
    matrices = prunable_matrices(lm, lm_head=pruning.lm_head)
    weights = {name: as_matrix(module) for name, module in matrices.items()}
    if not pruning.is_calibrated:
        seed = pruning.random_seed
        lots = {name: None if seed is None else (seed, name) for name in weights}
        yield {n: Scored(w, criterion=pruning.entry, lot=lots[n]) for n, w in weights.items()}
    elif pruning.calibration == "sequential":
        assert calibration is not None
        for block_norms in calibrate.norms_upwards(lm, calibration, progress):
            yield {n: _by_norm(weights[n], norm, pruning) for n, norm in block_norms.items()}
    else:
        if norms is None:
            assert calibration is not None
            norms = calibrate.input_norms(lm, calibration, progress)
        _check_norms(weights, norms)
        yield {n: _by_norm(weight, norms[n], pruning) for n, weight in weights.items()}


def _by_norm(weight: Tensor, norm: Tensor, pruning: PruningConfig) -> Scored:
    """Where all norms are 0 and so all weights alike, those of the matrix compete by magnitude."""
    num_zero = int((norm == 0).count_nonzero())
    if num_zero == len(norm) and pruning.scope != "global":
        return Scored(weight, num_zero_inputs=num_zero)
    return Scored(weight, criterion=pruning.entry, norms=norm, num_zero_inputs=num_zero)


def _check_norms(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        num_inputs = weight.shape[1]
        if name not in norms or norms[name].shape != (num_inputs,):
            raise UserError(
                f"input_norms: {name} needs {num_inputs} norms; use what input_norms gives for"
                " this model"
            )


def _zero(weight: Tensor, keep: Tensor) -> None:
    """Zero the weights that do not stay; as integers, in a quarter of the time of masked_fill_."""
    weight.view(INTEGERS[weight.dtype.itemsize]).mul_(keep)
