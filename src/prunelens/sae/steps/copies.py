"""An SAE's two matrices rounded to bfloat16, for steps that keep them up to date themselves."""

from __future__ import annotations

import torch

from prunelens.sae.kernels import Weights


class RoundedCopies:
    """Both weight matrices in bfloat16, the encoder's with its bias as one more column.

    A product of the encoder's with inputs that have a column of ones adds the bias.
    """

    def __init__(
        self, weights: Weights, *, width: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """The encoder's copy has `width` columns, and may be held in another precision."""
        (F, D), device = weights.encoder_weight.shape, weights.encoder_weight.device
        self._weights = weights
        self.encoder = torch.zeros(F, width, dtype=dtype, device=device)
        """[latents, width], zeros after the bias."""
        self.decoder = torch.zeros(F, D, dtype=torch.bfloat16, device=device)
        """[latents, d_model]"""
        self._versions: list[int] = []

    def renew(self) -> None:
        """Where another hand wrote to the weights (restarts, a checkpoint), copy them anew.

        PyTorch counts its own writes to a tensor; those of our kernels it does not see.
        """
        if self._versions != [weight._version for weight in self._weights]:
            D = len(self._weights.decoder_bias)
            self.encoder[:, :D] = self._weights.encoder_weight.bfloat16()
            self.decoder.copy_(self._weights.decoder_weight)
            self.renew_bias()

    def renew_bias(self) -> None:
        """Copy the encoder's bias alone: all else is as it should be."""
        D = len(self._weights.decoder_bias)
        self.encoder[:, D] = self._weights.encoder_bias.bfloat16()
        self._versions = [weight._version for weight in self._weights]
