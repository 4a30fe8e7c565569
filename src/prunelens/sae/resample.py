"""Restarting dead latents (methods §5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers

_ENCODER_SCALE = 0.2  # of the living latents' mean encoder norm


@torch.no_grad()
def restart_dead(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, " latents"],
    pool: Int[Tensor, " inputs"],
    rows: Callable[[Tensor], Tensor],
    *,
    batch_tokens: int,
    generator: torch.Generator,
) -> Bool[Tensor, " latents"]:
    """Restart dead latents at badly reconstructed inputs, in place.

    Inputs are drawn from the pool without replacement, with probability proportional to squared
    error. The decoder row becomes (x_hat - b_dec) at unit norm: that is what the input asks of the
    dictionary. The encoder row is the same direction at 0.2 x the mean encoder norm of the living,
    the bias 0.

    Args:
        sae: the SAE to change.
        dead: latents that did not fire since the last check.
        pool: distinct token indices to draw from.
        rows: token indices -> normalised inputs [tokens, d_model].
        batch_tokens: inputs encoded at a time.
        generator: a CPU generator for the draw.
    Returns: the latents restarted; fewer than `dead` where too few inputs have any error.
    """
    latents = dead.nonzero().flatten()
    buffers = Buffers()
    errors = [_squared_error(sae, rows(batch), buffers) for batch in pool.split(batch_tokens)]
    chosen = pool[draw_by_weight(torch.cat(errors).cpu(), len(latents), generator=generator)]
    latents = latents[: len(chosen)]
    restarted = torch.zeros_like(dead)
    restarted[latents] = True
    if len(latents) == 0:
        return restarted
    directions = rows(chosen) - sae.decoder_bias
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    living = torch.linalg.vector_norm(sae.encoder_weight[~dead], dim=1)
    norm = living.mean() if len(living) else 1.0  # none lives: the norm of initialisation
    sae.decoder_weight[latents] = directions
    sae.encoder_weight[latents] = directions * (_ENCODER_SCALE * norm)
    sae.encoder_bias[latents] = 0
    return restarted


def draw_by_weight(
    weight: Float[Tensor, " items"], count: int, *, generator: torch.Generator
) -> Int[Tensor, " chosen"]:
    """Up to `count` distinct items of positive weight, drawn one after another by weight.

    Give each item an exponential clock whose rate is its weight; the order in which clocks ring is
    such a draw.
    """
    weight = weight.double()
    waits = torch.empty_like(weight).exponential_(generator=generator)
    count = min(count, int((weight > 0).sum()))
    return (weight / waits).topk(count).indices


def _squared_error(
    sae: SparseAutoencoder, x_hat: Float[Tensor, "tokens d_model"], buffers: Buffers
) -> Float[Tensor, " tokens"]:
    """Per token; 0 for an input at b_dec, which has no direction to restart at."""
    has_direction = (x_hat != sae.decoder_bias).any(1)
    rebuilt = sae.decode(sae.encode(x_hat, buffers=buffers))
    return (rebuilt - x_hat).square().sum(1) * has_direction
