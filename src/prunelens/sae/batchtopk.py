"""BatchTopK: a training batch keeps its k x tokens largest latents (methods §5)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.errors import UserError
from prunelens.sae import kernels
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.kernels import SparseLatents

FOLLOWED = 0.1
"""How much of a step's smallest kept activation enters the threshold. Its running mean reaches back
some ten steps, which is little beside any training and averages over 10 k x tokens activations."""

_WIDER = 4  # times k: latents of a token that are looked at first


class BatchTopKSAE(SparseAutoencoder):
    """Trained on the k x tokens largest latents of each batch, read with a fixed threshold.

    So tokens may have different numbers of latents, k in the mean, and what is made of a token does
    not depend on the batch that it is in (Bussmann et al. 2024, arXiv:2412.06410).
    """

    architecture, title = "batchtopk", "BatchTopK"
    threshold: Tensor
    """The running mean of the smallest activation that a training step kept; 0 before the first."""

    def __init__(self, d_model: int, num_latents: int, k: int) -> None:
        super().__init__(d_model, num_latents, k)
        self.threshold = torch.zeros(())

    def read(self, pre: Float[Tensor, "tokens latents"]) -> SparseLatents:
        """Those above the threshold; as many entries per token as the token with the most has."""
        above = (pre > self.threshold).sum(1)
        found = kernels.top_k(pre, max(1, int(above.max()) if len(above) else 1))
        return found._replace(values=found.values * (found.values > self.threshold))

    @torch.no_grad()
    def keep(self, pre: Float[Tensor, "tokens latents"]) -> SparseLatents:
        """The k x tokens largest; the threshold follows the smallest of them."""
        kept = batch_top_k(pre, self.k)
        positive = kept.values[kept.values > 0]
        if len(positive):
            smallest = positive.min()
            share = FOLLOWED if self.threshold > 0 else 1.0
            self.threshold += share * (smallest - self.threshold)
        return kept

    def refuse_non_finite(self) -> None:
        """See SparseAutoencoder; also a threshold below 0, which no training leaves."""
        super().refuse_non_finite()
        if self.threshold < 0:
            raise UserError(
                f"sae: threshold {float(self.threshold):g} is below 0; train or export it again"
            )


def batch_top_k(pre: Float[Tensor, "tokens latents"], k: int) -> SparseLatents:
    """The k x tokens largest of ReLU(pre) over the whole batch; the others are 0.

    As many entries per token as the token with the most has. Ties are broken arbitrarily.
    """
    tokens, latents = pre.shape
    width, enough = _WIDER * k, False
    while not enough:
        width = min(width, latents)
        found = kernels.top_k(pre, width)
        largest = found.values.flatten().topk(k * tokens, sorted=False)
        # What was not looked at is no larger than a token's last, so it is not missed where that
        # is 0 or was not kept.
        last = found.values.amin(1)
        enough = width == latents or not bool(((last > 0) & (last >= largest.values.min())).any())
        width *= 2
    kept = torch.zeros_like(found.values.flatten())
    kept[largest.indices] = largest.values
    values, order = kept.view_as(found.values).sort(1, descending=True)
    most = max(1, int((values > 0).sum(1).max()))
    return SparseLatents(values[:, :most], found.indices.gather(1, order[:, :most]))
