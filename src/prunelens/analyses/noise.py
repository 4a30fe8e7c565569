"""Disturbances of known kind and size, to hold a pruning's own disturbance against."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def other_token(num_tokens: int, generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """For every token a different one, each once: a random single cycle through all of them."""
    cycle = torch.randperm(num_tokens, generator=generator)
    partner = torch.empty_like(cycle)
    partner[cycle] = cycle.roll(-1)
    return partner


def isotropic_noise_like(
    difference: Float[Tensor, "tokens d_model"], generator: torch.Generator
) -> Float[Tensor, "tokens d_model"]:
    """Random directions, isotropic, each with the norm of that token's difference.

    Drawn on the CPU, so that the numbers do not depend on the device of `difference`.
    """
    noise = torch.randn(difference.shape, generator=generator).to(difference.device)
    size = difference.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return noise.mul_(size)
