"""Sparse latents of any SAE, ours or others': who gives them, and how dense ones become sparse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.sae import kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents


@runtime_checkable
class SparseEncoder(Protocol):
    """What gives latents: a `SparseAutoencoder` of normalised activations, a `GivenSae` of raw."""

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        ...

    def encode_sparse(
        self, x: Float[Tensor, "tokens d_model"], *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """The latents of every token that are not 0; `buffers` spare fresh memory per batch."""
        ...


def sparse_latents(dense: Iterable[Tensor]) -> SparseLatents:
    """What is not 0 in [tokens, latents] matrices, one matrix's tokens after another's.

    As many per token as the token with the most has; the others are filled up with latents at 0.
    """
    parts = [_nonzero(part) for part in dense]
    most = max(part.values.shape[1] for part in parts)
    values, indices = zip(*(_filled_up(part, most) for part in parts), strict=True)
    return SparseLatents(torch.cat(values), torch.cat(indices))


def _nonzero(dense: Float[Tensor, "tokens latents"]) -> SparseLatents:
    # Several times faster than (dense != 0).sum(1).
    counts = torch.linalg.vector_norm(dense, ord=0, dim=1, dtype=torch.float32)
    most = max(1, int(counts.amax())) if len(dense) else 1
    indices = kernels.top_k(dense.abs(), most).indices
    return SparseLatents(dense.gather(1, indices), indices)


def _filled_up(latents: SparseLatents, width: int) -> SparseLatents:
    """`width` entries per token, with the lowest latents that a token does not have yet."""
    missing = width - latents.indices.shape[1]
    if not missing:
        return latents
    # Of the latents below `width` a token has at most width - missing.
    taken = latents.indices.new_zeros(len(latents.indices), width + 1)
    taken.scatter_(1, latents.indices.clamp(max=width), 1)
    free = taken[:, :width].argsort(dim=1, stable=True)[:, :missing]
    zeros = latents.values.new_zeros(free.shape)
    return SparseLatents(
        torch.cat([latents.values, zeros], dim=1), torch.cat([latents.indices, free], dim=1)
    )
