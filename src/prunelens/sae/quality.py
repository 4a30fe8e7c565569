"""How good an SAE is: the three FVUs, L0, alive latents and firing rates (methods §5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.errors import UserError
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers
from prunelens.sae.state import TokenActivations

_BATCH_TOKENS = 4096


class SaeQuality(NamedTuple):
    """Measured over all tokens of the evaluation set; sums in float64."""

    fvu: float
    """sum |x - x_rec|^2 / sum |x - mean(x)|^2 in normalised space; NaN where x never varies."""
    fvu_raw: float
    """The same in raw space, x_rec_raw = sigma * x_rec + mu."""
    fvu_dense_var: float
    """Raw error over the dense condition's raw variance; NaN where that is not positive."""
    l0: float
    """Mean number of latents that fire on a token."""
    alive: int
    """Latents that fire on at least one token."""
    firing_rate: Float[Tensor, " latents"]
    """float64: share of the tokens on which a latent fires."""
    mean_activation: Float[Tensor, " latents"]
    """float64: mean over the tokens on which it fires; NaN where it never does."""
    firing_rate_first: Float[Tensor, " latents"]
    """float64: share of the first `first_tokens` tokens on which it fires; NaN where that is 0."""


def evaluate_sae(
    sae: SparseAutoencoder,
    data: TokenActivations,
    *,
    dense_variance: float,
    first_tokens: int = 0,
    batch_tokens: int = _BATCH_TOKENS,
) -> SaeQuality:
    """Encode and decode every token once, in order.

    Raw error is sigma times normalised error, dimension by dimension, so per-dimension sums give
    all three FVUs in one pass.

    Args:
        sae: the SAE, on the device of `data`.
        data: activations with their own mu and sigma.
        dense_variance: sum over tokens of |x - mean(x)|^2 of the dense condition, raw.
        first_tokens: how many of the first tokens `firing_rate_first` is about.
        batch_tokens: tokens encoded at a time.
    Raises: UserError where there are no tokens, the widths differ or weights are no numbers.
    """
    if data.d_model != sae.d_model:
        raise UserError(
            f"sae: made for d_model {sae.d_model}, but the activations have {data.d_model}"
        )
    if data.num_tokens == 0:
        raise UserError("corpus.eval_tokens: no activations to evaluate on; raise it")
    sae.refuse_non_finite()
    sums = _add_up(sae, data, first_tokens, batch_tokens)
    raw = data.sigma.to(sums.error).square()
    raw_error = float((raw * sums.error).sum())
    # Shifted sums: sum (y - mean y)^2 = sum y^2 - (sum y)^2 / n, y near 0 loses no digits.
    variance = sums.squares - sums.total.square() / data.num_tokens
    return SaeQuality(
        fvu=_ratio(float(sums.error.sum()), float(variance.sum())),
        fvu_raw=_ratio(raw_error, float((raw * variance).sum())),
        fvu_dense_var=_ratio(raw_error, dense_variance),
        l0=float(sums.fires.sum()) / data.num_tokens,
        alive=int((sums.fires > 0).sum()),
        firing_rate=(sums.fires / data.num_tokens).cpu(),
        mean_activation=(sums.activation / sums.fires).cpu(),  # 0 / 0 is NaN
        firing_rate_first=(sums.fires_first / first_tokens).cpu(),
    )


class _Sums(NamedTuple):
    error: Float[Tensor, " d_model"]
    total: Float[Tensor, " d_model"]
    squares: Float[Tensor, " d_model"]
    fires: Float[Tensor, " latents"]
    activation: Float[Tensor, " latents"]
    fires_first: Float[Tensor, " latents"]


@torch.no_grad()
def _add_up(
    sae: SparseAutoencoder, data: TokenActivations, first_tokens: int, batch_tokens: int
) -> _Sums:
    """Squared error, shifted values and their squares per dimension; firings per latent."""
    device, num_latents = sae.decoder_bias.device, sae.num_latents
    error, total, squares = torch.zeros(3, sae.d_model, dtype=torch.float64, device=device)
    fires, activation, first = torch.zeros(3, num_latents, dtype=torch.float64, device=device)
    shift, buffers, left = None, Buffers(), first_tokens
    for x_hat in data.batches(batch_tokens):
        latents = sae.encode(x_hat, buffers=buffers)
        exact = x_hat.double()
        shift = exact.mean(0) if shift is None else shift
        error += (exact - sae.decode(latents)).square_().sum(0)
        exact -= shift
        total += exact.sum(0)
        squares += exact.square_().sum(0)
        fired = (latents.values > 0).double()
        fires += _per_latent(latents.indices, fired, num_latents)
        activation += _per_latent(latents.indices, latents.values.double(), num_latents)
        if left > 0:
            first += _per_latent(latents.indices[:left], fired[:left], num_latents)
            left -= len(x_hat)
    return _Sums(error, total, squares, fires, activation, first)


def _per_latent(indices: Tensor, values: Tensor, num_latents: int) -> Float[Tensor, " latents"]:
    return torch.bincount(indices.flatten(), values.flatten(), minlength=num_latents)


def _ratio(error: float, variance: float) -> float:
    return error / variance if variance > 0 else math.nan
