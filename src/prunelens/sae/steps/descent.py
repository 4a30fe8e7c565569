"""One training step's arithmetic: latents, gradients, Adam, decoder rows of unit norm (§5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.adam import adam

from prunelens.sae import kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents, Weights

BETA_MEAN, BETA_SQUARE, EPSILON = 0.9, 0.999, 1e-8
"""Adam's: how much of its two moments stays, and what is added to the root of the second."""

BIASES = ("encoder_bias", "decoder_bias")

_CACHED = 2**19  # weights of a block: their gradients are used up while they are in the cache
_MATRICES = ("encoder_weight", "decoder_weight")


class Descended(NamedTuple):
    """What one step saw of its batch."""

    loss: Float[Tensor, ""]
    """Mean squared error per token, summed over d_model, before the step."""
    fires: Bool[Tensor, " latents"]
    """The latent fired on some token of the batch."""


class Descent:
    """Adam on an SAE's weights, in place: its moments, its precision, and buffers used again."""

    def __init__(
        self,
        weights: Weights,
        k: int,
        *,
        dtype: torch.dtype,
        buffers: Buffers | None = None,
        keep: Callable[[Tensor], SparseLatents] | None = None,
    ) -> None:
        """`keep` says which latents of a batch's pre-activations are kept; None: k per token."""
        self.weights = Weights(*(w.detach() for w in weights))
        self.mean = Weights(*(torch.zeros_like(w) for w in self.weights))
        self.mean_square = Weights(*(torch.zeros_like(w) for w in self.weights))
        self._k, self.dtype = k, dtype
        self._buffers = buffers or Buffers()
        self._keep = keep or functools.partial(kernels.top_k, k=k)

    @torch.no_grad()
    def step(self, x_hat: Float[Tensor, "batch d_model"], *, rate: float, number: int) -> Descended:
        """Step `number` (from 1) at this learning rate.

        The gradient along a decoder row is left in; scaling the row back to unit norm undoes its
        effect.
        """
        encoder, bias = self.weights[:2]
        dtype, buffers = self.dtype, self._buffers
        pre = kernels.pre_activations(x_hat, encoder, bias, dtype=dtype, buffers=buffers)
        latents = self._keep(pre)
        found = kernels.gradients(x_hat, self.weights, latents, dtype=dtype, buffers=buffers)
        for some in self._blocks(x_hat.device):
            self.adam(_MATRICES, found.of_latents(some.start, some.stop), rate, number, some)
            rows = self.weights.decoder_weight[some]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        self.adam(BIASES, found.biases, rate, number, slice(None))
        return Descended(found.loss, found.fires)

    def forget(self, latents: Bool[Tensor, " latents"]) -> None:
        """Zero the moments of some latents; the decoder bias belongs to none."""
        for moments in (self.mean, self.mean_square):
            for tensor in moments[:3]:
                tensor[latents] = 0

    def _blocks(self, device: torch.device) -> Iterator[slice]:
        """Latents whose gradients are taken and used up at a time."""
        num_latents, d_model = self.weights.encoder_weight.shape
        at_once = max(1, _CACHED // d_model) if device.type == "cpu" else num_latents
        for first in range(0, num_latents, at_once):
            yield slice(first, min(first + at_once, num_latents))

    def adam(
        self,
        names: tuple[str, str],
        gradients: tuple[Tensor, Tensor],
        rate: float,
        number: int,
        some: slice,
    ) -> None:
        """Adam on some rows of two of the weights.

        Its functional form: the class would import PyTorch's compiler, seconds per process.
        """
        groups = (self.weights, self.mean, self.mean_square)
        weights, mean, mean_square = ([getattr(g, name)[some] for name in names] for g in groups)
        adam(
            weights,
            list(gradients),
            mean,
            mean_square,
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(number - 1.0, device=w.device) for w in weights],
            fused=True,
            amsgrad=False,
            beta1=BETA_MEAN,
            beta2=BETA_SQUARE,
            eps=EPSILON,
            lr=rate,
            weight_decay=0.0,
            maximize=False,
        )
