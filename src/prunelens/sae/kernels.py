"""Sparse encode, decode and gradients of a TopK SAE: the short reference and the fast path.

Only k of the latents of a token are active, so all but the encoder product is sparse. On a CPU the
fast path is made of PyTorch's own operators: `embedding_bag` sums k decoder rows per token (and,
over the transposed pattern, tokens per latent, which gives both weight gradients), and
`sampled_addmm` takes the k inner products that the latents' gradients need. Elsewhere the dense
reference runs. `top_k` looks at group maxima first; it is exact.

Shapes: B tokens, D d_model, F latents, K active latents per token.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

_NUM_RADIX_KEYS = 2**16  # numpy sorts 16-bit integers by radix, about ten times faster than wider


class Weights(NamedTuple):
    """The four tensors of an SAE, or their gradients."""

    encoder_weight: Float[Tensor, "latents d_model"]
    encoder_bias: Float[Tensor, " latents"]
    decoder_weight: Float[Tensor, "latents d_model"]
    decoder_bias: Float[Tensor, " d_model"]


class SparseLatents(NamedTuple):
    """The k kept latents of each token, in no particular order; a latent fires where value > 0."""

    values: Float[Tensor, "tokens k"]
    """Activations after the ReLU, 0 where fewer than k latents were positive."""
    indices: Int[Tensor, "tokens k"]
    """Which latents; distinct within a token."""


class Gradients(NamedTuple):
    """One evaluation of the training loss and its gradients."""

    loss: Float[Tensor, ""]
    """Mean over tokens of the squared error summed over d_model."""
    weights: Weights
    """d loss / d weights."""
    fires: Tensor
    """[latents] bool: the latent fired on some token of the batch."""


def encode(
    x_hat: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " latents"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> SparseLatents:
    """TopK(ReLU(W_enc x_hat + b_enc), k) (methods §5), differentiable where `dtype` is float32.

    `dtype` is the precision of the product alone; the values come back as float32.
    """
    pre = torch.addmm(bias.to(dtype), x_hat.to(dtype), weight.to(dtype).T)
    values, indices = top_k(pre, k)
    return SparseLatents(values.float().clamp_min(0), indices)


def decode(
    latents: SparseLatents,
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """W_dec z + b_dec, as a weighted sum of k rows per token."""
    rows = embedding_bag(latents.indices, weight, per_sample_weights=latents.values, mode="sum")
    return rows + bias


def dense_latents(latents: SparseLatents, num_latents: int) -> Float[Tensor, "tokens latents"]:
    """z with its zeros written out."""
    zeros = latents.values.new_zeros(len(latents.values), num_latents)
    return zeros.scatter(1, latents.indices, latents.values)


def gradients(
    x_hat: Float[Tensor, "tokens d_model"], weights: Weights, latents: SparseLatents
) -> Gradients:
    """Loss and gradients, given the batch's latents: sparse on a CPU, dense elsewhere."""
    on_cpu = x_hat.device.type == "cpu"
    return (sparse_gradients if on_cpu else reference_gradients)(x_hat, weights, latents)


def reference_gradients(
    x_hat: Float[Tensor, "tokens d_model"], weights: Weights, latents: SparseLatents
) -> Gradients:
    """The chain rule through loss = mean_b |z W_dec + b_dec - x|^2, with z dense."""
    z = dense_latents(latents, len(weights.decoder_weight))  # [B, F]
    error = z @ weights.decoder_weight + weights.decoder_bias - x_hat  # [B, D]
    grad = error * (2 / len(x_hat))  # d loss / d x_rec
    grad_z = (grad @ weights.decoder_weight.T) * (z > 0)  # only active latents learn
    return Gradients(
        loss=error.square().sum(1).mean(),
        weights=Weights(grad_z.T @ x_hat, grad_z.sum(0), z.T @ grad, grad.sum(0)),
        fires=(z > 0).any(0),
    )


def sparse_gradients(
    x_hat: Float[Tensor, "tokens d_model"], weights: Weights, latents: SparseLatents
) -> Gradients:
    """`reference_gradients` at a cost of B K D instead of B F D; CPU only."""
    B, F = len(latents.indices), len(weights.decoder_weight)
    error = decode(latents, weights.decoder_weight, weights.decoder_bias) - x_hat  # [B, D]
    grad = error * (2 / B)
    active = (latents.values > 0).flatten().float()  # [B K]
    grad_z = _row_products(grad, weights.decoder_weight, latents.indices) * active  # [B K]
    flat, transposed = latents.indices.flatten(), TransposedPattern(latents.indices, F)
    return Gradients(
        loss=error.square().sum(1).mean(),
        weights=Weights(
            encoder_weight=transposed.product(grad_z, x_hat),
            encoder_bias=torch.bincount(flat, weights=grad_z, minlength=F),
            decoder_weight=transposed.product(latents.values.flatten(), grad),
            decoder_bias=grad.sum(0),
        ),
        fires=torch.bincount(flat, weights=active, minlength=F) > 0,
    )


class TransposedPattern:
    """Where a [tokens, latents] matrix of k entries per token has them, latent by latent."""

    def __init__(self, indices: Int[Tensor, "tokens k"], num_latents: int) -> None:
        flat = indices.flatten()
        self._order = _order_by_latent(flat, num_latents)
        self._starts = torch.bincount(flat, minlength=num_latents).cumsum(0).roll(1)
        self._starts[0] = 0
        self._tokens = self._order // indices.shape[1]

    def product(
        self, entries: Float[Tensor, " entries"], rows: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "latents width"]:
        """The matrix with these entries, transposed, times rows."""
        weights = entries[self._order]
        return embedding_bag(
            self._tokens, rows, self._starts, mode="sum", per_sample_weights=weights
        )


def top_k(pre: Float[Tensor, "tokens latents"], k: int) -> SparseLatents:
    """The k largest of each row, as `torch.topk` finds them, ties broken arbitrarily.

    On a CPU the latents are dealt into groups. The k largest lie in the k groups with the largest
    maxima (or tie with what lies there), so only those groups are searched. Values are gathered
    from `pre` and carry its gradient.
    """
    if pre.device.type != "cpu":
        return SparseLatents(*pre.topk(k, sorted=False))
    B, F = pre.shape
    # Cost is about F/size maxima to search plus k*size candidates: least at sqrt(F/k).
    size = max(s for s in range(1, math.isqrt(F // k) + 1) if F % s == 0)
    num_groups = F // size  # group g holds the latents g, g + num_groups, ...
    members = pre.detach().view(B, size, num_groups)
    groups = _largest(members.amax(1), k)  # [B, k]
    candidates = members.gather(2, groups[:, None, :].expand(B, size, k)).view(B, size * k)
    found = _largest(candidates, k)
    indices = found // k * num_groups + groups.gather(1, found % k)
    return SparseLatents(pre.gather(1, indices), indices)


def _largest(values: Float[Tensor, "tokens columns"], k: int) -> Int[Tensor, "tokens k"]:
    """Columns of the k largest values of each row; numpy selects with vector instructions."""
    columns = values.shape[1]
    if k == columns:
        return torch.arange(k).expand(len(values), k)
    found = np.argpartition(values.float().numpy(), columns - k, axis=1)[:, columns - k :]
    return torch.from_numpy(found)


def _row_products(
    left: Float[Tensor, "tokens d_model"],
    right: Float[Tensor, "latents d_model"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, " entries"]:
    """left[b] . right[indices[b, j]] for every b and j, flattened."""
    B, K = indices.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, B * K + 1, K),
            indices.flatten(),
            left.new_zeros(B * K),
            (B, len(right)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0).values()


def _order_by_latent(flat: Int[Tensor, " entries"], num_latents: int) -> Int[Tensor, " entries"]:
    """The stable order that sorts entries by latent; numpy's on a CPU, where its keys suffice."""
    if flat.device.type != "cpu" or num_latents > _NUM_RADIX_KEYS:
        return flat.sort(stable=True).indices
    return torch.from_numpy(np.argsort(flat.numpy().astype(np.uint16), kind="stable"))
