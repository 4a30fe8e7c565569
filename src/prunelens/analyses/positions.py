"""The three sets of positions that RQ3 is asked on, the same for every model (methods §1, §7)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

POSITIONS = ("all", "without_first", "norm_filtered")
FILTERED = POSITIONS.index("norm_filtered")


def token_norms(states: Tensor) -> Float[Tensor, "windows context"]:
    """|x| of every token, in float32 on the CPU."""
    return torch.linalg.vector_norm(states.float(), dim=-1).cpu()


def norm_limit(norms: Float[Tensor, "windows context"], multiple: float | None) -> float:
    """The largest norm of `norm_filtered`: a multiple of the median without the first position."""
    return math.inf if multiple is None else multiple * float(norms[:, 1:].median())


def members_of(
    norms: Float[Tensor, "windows context"], limit: float
) -> Bool[Tensor, "sets tokens"]:
    """Which tokens are in which of POSITIONS, by their norms in the dense model."""
    later = torch.ones_like(norms, dtype=torch.bool)
    later[:, 0] = False
    sets = (torch.ones_like(later), later, later & (norms <= limit))
    return torch.stack([members.flatten() for members in sets])
