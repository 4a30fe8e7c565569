"""Random SAEs and activations on so coarse a grid that float32 makes no rounding error.

Weights are multiples of 1/16 up to 1, activations multiples of 1/8 up to 2: every product and
every sum of a TopK SAE of width 16 or less is then a number that float32 holds exactly, in whatever
order it is summed. What must not change does then not change in a single bit. Tokens whose k-th
and (k+1)-th latent tie are left out: there the definition does not say which one is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from prunelens.sae.topk import TopKSAE

NEVER = -64.0  # a bias that no input reaches


class World(NamedTuple):
    """An SAE with activations and the same tokens disturbed, both in normalised space."""

    sae: TopKSAE
    x_hat: torch.Tensor
    disturbed: torch.Tensor


def worlds(*, widths=(1, 2, 3, 5, 8, 12, 16), most_latents=40):
    """Of all sizes, with dead latents and with tokens that occur twice.

    One seed decides everything, so that few examples differ in all respects.
    """

    def sized(seed):
        generator = np.random.default_rng(seed)
        d_model, num_latents = generator.choice(widths), generator.integers(1, most_latents + 1)
        k = generator.integers(1, min(num_latents, 8) + 1)
        num_tokens = generator.choice([1, 2, 20, 70, 150, 150])
        num_dead = generator.integers(0, min(num_latents, 5) + 1)
        found = world(int(d_model), int(num_latents), int(k), num_tokens, num_dead, seed=seed)
        assume(len(found.x_hat))
        return found

    return st.integers(0, 10**6).map(sized)


def world(d_model, num_latents, k, num_tokens, num_dead=2, *, seed):
    """Of up to `num_tokens` tokens: those without a tie."""
    generator = np.random.default_rng(seed)
    sae = TopKSAE(d_model, num_latents, k)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(on_grid(generator, tuple(parameter.shape), 1, 16))
        dead = generator.permutation(num_latents)[:num_dead]
        sae.encoder_bias[torch.from_numpy(dead)] = NEVER
    x_hat = on_grid(generator, (num_tokens, d_model), 2, 8)
    x_hat[num_tokens // 2 :: 7] = x_hat[0].clone()
    changes = torch.from_numpy(generator.random((num_tokens, 1)) < 0.7)
    disturbed = x_hat + on_grid(generator, (num_tokens, d_model), 1, 8) * changes
    clear = ~(tied(sae, x_hat) | tied(sae, disturbed))
    return World(sae, x_hat[clear], disturbed[clear])


def on_grid(generator, shape, limit, steps_per_unit):
    """Multiples of 1 / steps_per_unit within +-limit, float32."""
    steps = limit * steps_per_unit
    return torch.from_numpy(generator.integers(-steps, steps + 1, shape) / steps_per_unit).float()


def tied(sae, x_hat):
    """Whether the last latent that is kept fires as strongly as one that is not."""
    pre = (x_hat @ sae.encoder_weight.T + sae.encoder_bias).detach()
    if sae.k == sae.num_latents:
        return torch.zeros(len(x_hat), dtype=torch.bool)
    ordered = pre.sort(dim=1, descending=True).values
    return (ordered[:, sae.k - 1] == ordered[:, sae.k]) & (ordered[:, sae.k] > 0)


def exact_rotation(generator, d_model):
    """A random orthogonal matrix of multiples of 1/4 that mixes coordinates four by four.

    Twice: swap coordinates, change signs, then H / 2 (Hadamard, 4 x 4) on every four of them.
    """
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    rotation = torch.eye(d_model)
    for _ in range(2):
        mixed = torch.eye(d_model)
        for first in range(0, d_model - 3, 4):
            mixed[first : first + 4, first : first + 4] = hadamard
        rotation = rotation @ signed_permutation(generator, d_model) @ mixed
    return rotation


def signed_permutation(generator, d_model):
    """Coordinates in another order, some with the other sign."""
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], d_model)).float()
    return torch.eye(d_model)[torch.from_numpy(generator.permutation(d_model))] * signs


def with_weights(sae, *, encoder, encoder_bias, decoder, decoder_bias):
    """An SAE of the same k with these weights."""
    other = TopKSAE(encoder.shape[1], len(encoder), sae.k)
    given = (encoder, encoder_bias, decoder, decoder_bias)
    with torch.no_grad():
        for parameter, tensor in zip(other.weights, given, strict=True):
            parameter.copy_(tensor)
    return other


def permuted(sae, order):
    """Latent i of the result is latent order[i] of `sae`."""
    encoder, encoder_bias, decoder, decoder_bias = sae.weights
    return with_weights(
        sae,
        encoder=encoder[order],
        encoder_bias=encoder_bias[order],
        decoder=decoder[order],
        decoder_bias=decoder_bias,
    )


def rotated(sae, rotation):
    """The SAE of the space x -> x rotation."""
    encoder, encoder_bias, decoder, decoder_bias = sae.weights
    return with_weights(
        sae,
        encoder=encoder @ rotation,
        encoder_bias=encoder_bias,
        decoder=decoder @ rotation,
        decoder_bias=decoder_bias @ rotation,
    )


def with_unused(sae, number):
    """`number` more latents that never fire: no encoder row, no decoder row, bias -1."""
    encoder, encoder_bias, decoder, decoder_bias = sae.weights
    rows = torch.zeros(number, sae.d_model)
    return with_weights(
        sae,
        encoder=torch.cat([encoder, rows]),
        encoder_bias=torch.cat([encoder_bias, torch.full((number,), -1.0)]),
        decoder=torch.cat([decoder, rows]),
        decoder_bias=decoder_bias,
    )
