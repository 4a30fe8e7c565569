"""Where a batch's sparse latents are, latent by latent: products over a transposed pattern."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

_NUM_RADIX_KEYS = 2**16  # numpy sorts 16-bit integers by radix, about ten times faster than wider


class TransposedPattern:
    """Where a [tokens, latents] matrix of k entries per token has them, latent by latent.

    Entries are ordered by latent, then by token. In that order a pass over them reads the latents'
    rows once, from start to end, and only the tokens' (of which there are fewer) at random: on
    2 cores and the paper's shape in half the time of a pass by token.
    """

    def __init__(self, indices: Int[Tensor, "tokens k"], num_latents: int) -> None:
        flat = indices.flatten()
        self._order = order_by_latent(flat, num_latents)
        self._latents = flat[self._order]
        self._tokens = self._order // indices.shape[1]
        self._num_latents = num_latents
        self._starts = torch.zeros(num_latents + 1, dtype=torch.long, device=flat.device)
        torch.cumsum(torch.bincount(flat, minlength=num_latents), 0, out=self._starts[1:])

    def by_latent(self, entries: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """Entries given token by token, in the order by latent that the other methods take."""
        return entries[self._order]

    def product(
        self,
        entries: Float[Tensor, " entries"],
        rows: Float[Tensor, "tokens width"],
        first: int = 0,
        last: int | None = None,
    ) -> Float[Tensor, "some width"]:
        """Rows first..last-1 of the matrix with these entries, transposed, times `rows`.

        In the precision of `rows`.
        """
        starts = self._starts[first : self._num_latents + 1 if last is None else last + 1]
        inside = slice(int(starts[0]), int(starts[-1]))
        return embedding_bag(
            self._tokens[inside],
            rows,
            starts[:-1] - starts[0],
            mode="sum",
            per_sample_weights=entries[inside].to(rows.dtype),
        )

    def row_products(
        self, left: Float[Tensor, "latents width"], right: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, " entries"]:
        """left[latent] . right[token] of every entry: what `product` is to its entries, derived."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            left, right, self._tokens, self._starts[:-1], self._latents, 0
        )

    def sums(self, entries: Float[Tensor, " entries"]) -> Float[Tensor, " latents"]:
        """The entries of each latent, added up."""
        return torch.bincount(self._latents, weights=entries, minlength=self._num_latents)


def order_by_latent(flat: Int[Tensor, " entries"], num_latents: int) -> Int[Tensor, " entries"]:
    """The stable order that sorts entries by latent; numpy's on a CPU, where its keys suffice."""
    if flat.device.type != "cpu" or num_latents > _NUM_RADIX_KEYS:
        return flat.sort(stable=True).indices
    return torch.from_numpy(np.argsort(flat.numpy().astype(np.uint16), kind="stable"))
