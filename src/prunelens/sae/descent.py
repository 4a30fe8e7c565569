"""One training step's arithmetic: latents, gradients, Adam, decoder rows of unit norm (§5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.adam import adam

from prunelens.sae import kernels
from prunelens.sae.kernels import Buffers, Weights


class Descended(NamedTuple):
    """What one step saw of its batch."""

    loss: Float[Tensor, ""]
    """Mean squared error per token, summed over d_model, before the step."""
    fires: Bool[Tensor, " latents"]
    """The latent fired on some token of the batch."""


class Descent:
    """Adam on an SAE's weights, in place: its moments, its precision, and buffers used again."""

    def __init__(
        self, weights: Weights, k: int, *, dtype: torch.dtype, buffers: Buffers | None = None
    ) -> None:
        self.weights = Weights(*(w.detach() for w in weights))
        self.mean = Weights(*(torch.zeros_like(w) for w in self.weights))
        self.mean_square = Weights(*(torch.zeros_like(w) for w in self.weights))
        self._k, self._dtype = k, dtype
        self._buffers = buffers or Buffers()

    @torch.no_grad()
    def step(self, x_hat: Float[Tensor, "batch d_model"], *, rate: float, number: int) -> Descended:
        """Step `number` (from 1) at this learning rate.

        The gradient along a decoder row is left in; scaling the row back to unit norm undoes its
        effect.
        """
        encoder, bias = self.weights[:2]
        dtype, buffers = self._dtype, self._buffers
        latents = kernels.encode(x_hat, encoder, bias, self._k, dtype=dtype, buffers=buffers)
        found = kernels.gradients(x_hat, self.weights, latents, dtype=dtype, buffers=buffers)
        self._update(found.weights, rate, number)
        rows = self.weights.decoder_weight
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        return Descended(found.loss, found.fires)

    def forget(self, latents: Bool[Tensor, " latents"]) -> None:
        """Zero the moments of some latents; the decoder bias belongs to none."""
        for moments in (self.mean, self.mean_square):
            for tensor in moments[:3]:
                tensor[latents] = 0

    def _update(self, gradients: Weights, rate: float, number: int) -> None:
        # Adam's functional form: the class would import PyTorch's compiler, seconds per process.
        adam(
            list(self.weights),
            list(gradients),
            list(self.mean),
            list(self.mean_square),
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(number - 1.0, device=w.device) for w in self.weights],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            lr=rate,
            weight_decay=0.0,
            maximize=False,
        )
