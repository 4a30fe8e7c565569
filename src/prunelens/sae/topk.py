"""TopK: every token keeps its k largest latents (methods §5)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prunelens.sae import kernels
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.kernels import SparseLatents


class TopKSAE(SparseAutoencoder):
    """z = TopK(ReLU(W_enc x_hat + b_enc), k), in training as everywhere."""

    architecture, title = "topk", "TopK"

    def read(self, pre: Float[Tensor, "tokens latents"]) -> SparseLatents:
        """The k largest of each token, and 0 where fewer are positive."""
        return kernels.top_k(pre, self.k)
