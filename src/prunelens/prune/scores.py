"""Pruning criteria: how much each weight of a matrix is worth. The lowest scores go first."""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor


def magnitude(weight: Float[Tensor, "output input"]) -> Float32[Tensor, "output input"]:
    """|W| (methods §3)."""
    return weight.abs().float()


def wanda(
    weight: Float[Tensor, "output input"], input_norm: Float[Tensor, " input"]
) -> Float32[Tensor, "output input"]:
    """|W_ij| * ||X_j||_2 (methods §3; Sun et al. 2023), the product rounded to float32.

    Args:
        weight: rows are outputs.
        input_norm: the Euclidean norm of each input over all calibration tokens, not divided by
            their number (which would change no order).
    """
    return weight.abs().float() * input_norm.to(weight.device).float()
