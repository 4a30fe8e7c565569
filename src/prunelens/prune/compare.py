"""Another checkpoint in a model's place: does it fit, what share is zero, how far it has moved."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.offload import weight_of
from prunelens.panics import panics_told
from prunelens.prune.matrices import as_matrix, kind_of, linear_matrices

PROBE = "def greet(name):\n    return 'hello ' + name\n\nThe quick brown fox, 3.14 µm.\n"
ROWS_AT_ONCE = 1024
"""Rows that are compared at a time; bounds the memory."""


class MatrixDifference(NamedTuple):
    """One matrix of another checkpoint beside the dense model's."""

    name: str
    """As in `model.named_modules()`."""
    num_weights: int
    """Weights of the matrix."""
    num_zeroed: int
    """Zeros among the other's weights."""
    achieved: float
    """num_zeroed / num_weights."""
    squared_difference: float
    """||W' - W||² (Frobenius)."""
    squared_norm: float
    """||W||² of the dense model."""
    weight_difference: float
    """||W' - W|| / ||W||; NaN where the dense matrix is 0."""


class WeightComparison(NamedTuple):
    """All prunable matrices of two models."""

    matrices: tuple[MatrixDifference, ...]
    """In the order of `prunable_matrices` of the dense model."""
    quantised: str
    """How the other's weights are stored (`quant_method` of its config); "" for plain floats."""

    def as_json(self) -> dict[str, Any]:
        """Zeros and relative differences, overall and by kind of matrix (`mlp.down_proj`)."""
        kinds: dict[str, list[MatrixDifference]] = {}
        for matrix in self.matrices:
            kinds.setdefault(kind_of(matrix.name), []).append(matrix)
        return {
            **_summary(self.matrices),
            "quantised": self.quantised,
            "by_kind": {kind: _summary(found) for kind, found in kinds.items()},
        }


def check_takes_place(dense: LanguageModel, other: LanguageModel) -> None:
    """Whether windows, layers and SAEs of one model mean the same in the other.

    Compared are the class, the blocks, the width, the vocabulary, the prunable matrices, and the
    tokenizer, where the other checkpoint comes with one.
    Raises: UserError that names the first thing that differs.
    """
    whose = f"prunings.checkpoint: {other.label!r}"
    fix = f"name a checkpoint that was made from {dense.label!r}"
    for what, ours, theirs in (
        ("architecture", type(dense.model).__name__, type(other.model).__name__),
        ("number of blocks", len(dense.blocks), len(other.blocks)),
        ("d_model", dense.d_model, other.d_model),
        ("vocabulary size", dense.vocabulary_size, other.vocabulary_size),
    ):
        if ours != theirs:
            raise UserError(f"{whose}: its {what} is {theirs}, the model's is {ours}; {fix}")
    shapes, others = (
        {name: _shape(module) for name, module in linear_matrices(lm).items()}
        for lm in (dense, other)
    )
    for name in sorted(set(shapes) | set(others)):
        if shapes.get(name) != others.get(name):
            raise UserError(
                f"{whose}: its matrix {name} is {_told(others.get(name))}, the model's is"
                f" {_told(shapes.get(name))}; {fix}"
            )
    if dense.tokenizer is not None and other.tokenizer is not None:
        same = dense.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        with panics_told(f"{whose}: its tokenizer or the model's gives up", fix):
            same = same and dense.tokenizer.encode(PROBE) == other.tokenizer.encode(PROBE)
        if not same:
            raise UserError(f"{whose}: it has another tokenizer than the model; {fix}")


@torch.no_grad()
def compare_weights(dense: LanguageModel, other: LanguageModel) -> WeightComparison:
    """Zeros and Frobenius differences of every prunable matrix, in float32, summed in float64.

    Quantised weights count as what they stand for.
    Raises: UserError where weights of `other` cannot be read as numbers, or are NaN or infinite.
    """
    found = []
    others = linear_matrices(other)
    for name, module in linear_matrices(dense).items():
        theirs = _numbers(name, others[name])
        difference, norm, zeros = 0.0, 0.0, 0
        pairs = zip(as_matrix(module).split(ROWS_AT_ONCE), theirs.split(ROWS_AT_ONCE), strict=True)
        for own, their in pairs:
            own, their = own.to(their.device).float(), their.float()
            difference += float((their - own).double().square().sum())
            norm += float(own.double().square().sum())
            zeros += int((their == 0).sum())
        if not math.isfinite(difference):
            raise UserError(
                f"prunings.checkpoint: weights of {name} are NaN or infinite in {other.label!r} or"
                f" {dense.label!r}; mend the checkpoint"
            )
        count = theirs.numel()
        distance = _relative(difference, norm)
        found.append(
            MatrixDifference(name, count, zeros, zeros / count, difference, norm, distance)
        )
    return WeightComparison(tuple(found), quantisation_of(other))


def quantisation_of(lm: LanguageModel) -> str:
    """`quant_method` of the model's config; "" where its weights are plain floats."""
    config = getattr(lm.model.config, "quantization_config", None) or {}
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method) or "")


def _numbers(name: str, module: nn.Module) -> Float[Tensor, "output input"]:
    """The weights as [output, input], taken out of what bitsandbytes or torchao keep them in."""
    weight: Any = weight_of(module)
    if hasattr(weight, "quant_state") and weight.quant_state is not None:
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "CB") and hasattr(weight, "SCB"):
        functional = importlib.import_module("bitsandbytes.functional")
        rows = weight.CB if weight.CB is not None else weight.data
        return functional.int8_vectorwise_dequant(rows, weight.SCB)
    if hasattr(weight, "dequantize") and type(weight.data) is not Tensor:
        return weight.dequantize()
    if not weight.is_floating_point() or weight.is_meta:
        raise UserError(
            f"prunings.checkpoint: weights of {name} cannot be read ({weight.dtype} on"
            f" {weight.device}); give a checkpoint of torchao, bitsandbytes or plain floats"
        )
    return as_matrix(module)


def _summary(matrices: Iterable[MatrixDifference]) -> dict[str, float]:
    found = list(matrices)
    weights = sum(matrix.num_weights for matrix in found)
    return {
        "achieved_sparsity": sum(matrix.num_zeroed for matrix in found) / weights,
        "weight_difference": _relative(
            math.fsum(matrix.squared_difference for matrix in found),
            math.fsum(matrix.squared_norm for matrix in found),
        ),
    }


def _relative(squared_difference: float, squared_norm: float) -> float:
    return math.sqrt(squared_difference / squared_norm) if squared_norm > 0 else math.nan


def _shape(module: Any) -> tuple[int, int]:
    """[output, input], whatever the weight is stored as."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    return int(module.weight.shape[1]), int(module.weight.shape[0])  # Conv1D


def _told(shape: tuple[int, int] | None) -> str:
    return "absent" if shape is None else f"{shape[0]} x {shape[1]}"
