"""Sparse encode, decode and gradients of an SAE: the short reference and the fast path.

Only some k of a token's latents are active, so all but the encoder product is sparse. On a CPU the
fast path is made of PyTorch's own operators (long trainings take `cpu_descent` instead):
`embedding_bag` sums k decoder rows per token (and, over the transposed pattern, tokens per latent,
which gives both weight gradients), and its gradient with respect to its weights takes the k inner
products that the latents' gradients need. Elsewhere the dense reference runs. `top_k` looks at
group maxima first; it is exact.

In training the products may be bfloat16: their factors are rounded to it, sums are float32, and
on a CPU their results are rounded as well.

Shapes: B tokens, D d_model, F latents, K active latents per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from prunelens.sae.buffers import Buffers
from prunelens.sae.steps.pattern import TransposedPattern
from prunelens.sae.steps.rounding import rounded_inputs, with_column


class Weights(NamedTuple):
    """The four tensors of an SAE, or their gradients."""

    encoder_weight: Float[Tensor, "latents d_model"]
    encoder_bias: Float[Tensor, " latents"]
    decoder_weight: Float[Tensor, "latents d_model"]
    decoder_bias: Float[Tensor, " d_model"]


class SparseLatents(NamedTuple):
    """The kept latents of each token, in no particular order; a latent fires where value > 0.

    Where tokens keep different numbers, k is the most, and the others are filled up with zeros.
    """

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

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Of the encoder's and the decoder's bias."""
        return self.weights.encoder_bias, self.weights.decoder_bias

    def of_latents(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows first..last-1 of the encoder's and the decoder's."""
        weights = self.weights
        return weights.encoder_weight[first:last], weights.decoder_weight[first:last]


def pre_activations(
    x_hat: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " latents"],
    *,
    dtype: torch.dtype = torch.float32,
    buffers: Buffers | None = None,
) -> Float[Tensor, "tokens latents"]:
    """W_enc x_hat + b_enc (methods §5), in a buffer until the next call where there are `buffers`.

    Differentiable in float32 without buffers. `dtype` is the precision of the product.
    """
    if dtype == torch.bfloat16:
        return _bfloat16_pre(x_hat, weight, bias, buffers or Buffers())
    if buffers is None:
        return torch.addmm(bias, x_hat, weight.T)
    out = buffers.take("pre", (len(x_hat), len(weight)), dtype, x_hat.device)
    return torch.addmm(bias, x_hat, weight.T, out=out)


def _bfloat16_pre(x_hat: Tensor, weight: Tensor, bias: Tensor, buffers: Buffers) -> Tensor:
    """W_enc x_hat + b_enc with factors rounded to bfloat16."""
    inputs = rounded_inputs(x_hat, buffers)
    rows = with_column("encoder", weight, bias.bfloat16(), buffers)
    shape = (len(x_hat), len(weight))
    return torch.mm(inputs, rows.T, out=buffers.take("pre", shape, rows.dtype, x_hat.device))


def decode(
    latents: SparseLatents,
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """W_dec z + b_dec, as a weighted sum of k rows per token; the product in W_dec's precision."""
    return _sum_of_rows(latents, weight) + bias


def _sum_of_rows(latents: SparseLatents, weight: Float[Tensor, "latents d_model"]) -> Tensor:
    values = latents.values.to(weight.dtype)
    return embedding_bag(latents.indices, weight, per_sample_weights=values, mode="sum")


def dense_latents(latents: SparseLatents, num_latents: int) -> Float[Tensor, "tokens latents"]:
    """z with its zeros written out."""
    zeros = latents.values.new_zeros(len(latents.values), num_latents)
    return zeros.scatter(1, latents.indices, latents.values)


def gradients(
    x_hat: Float[Tensor, "tokens d_model"],
    weights: Weights,
    latents: SparseLatents,
    *,
    dtype: torch.dtype,
    buffers: Buffers,
) -> SparseGradients | Gradients:
    """Loss and gradients, given the batch's latents: sparse on a CPU, dense elsewhere.

    `dtype` is the precision of the factors of the products with the decoder and, when they are
    sparse, of the others' too, whose sums are float32 and whose results are rounded to it. What is
    returned is float32.
    """
    if x_hat.device.type == "cpu":
        return SparseGradients(x_hat, weights, latents, dtype=dtype, buffers=buffers)
    rounded = weights.decoder_weight.to(dtype).to(torch.float32)
    return reference_gradients(x_hat, weights._replace(decoder_weight=rounded), latents)


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
    x_hat: Float[Tensor, "tokens d_model"],
    weights: Weights,
    latents: SparseLatents,
    *,
    dtype: torch.dtype = torch.float32,
    buffers: Buffers | None = None,
) -> Gradients:
    """`reference_gradients` at a cost of B K D instead of B F D; CPU only."""
    parts = SparseGradients(x_hat, weights, latents, dtype=dtype, buffers=buffers or Buffers())
    encoder_weight, decoder_weight = parts.of_latents(0, len(weights.decoder_weight))
    whole = Weights(encoder_weight, parts.biases[0], decoder_weight, parts.biases[1])
    return Gradients(parts.loss, whole, parts.fires)


class SparseGradients:
    """What `sparse_gradients` gives, the two matrices' gradients for some latents at a time.

    Whoever uses up those of a few hundred latents before asking for the next finds them in the
    cache, and needs no memory for all.
    """

    @torch.no_grad()
    def __init__(
        self,
        x_hat: Float[Tensor, "tokens d_model"],
        weights: Weights,
        latents: SparseLatents,
        *,
        dtype: torch.dtype,
        buffers: Buffers,
    ) -> None:
        (B, D), F = x_hat.shape, len(weights.decoder_weight)
        self._buffers = buffers
        rows = weights.decoder_weight
        if dtype != torch.float32:
            rows = buffers.copy("decoder", rows, dtype)
        x_rec = _sum_of_rows(latents, rows)
        error = torch.sub(
            x_rec, x_hat, out=buffers.take("error", (B, D), torch.float32, x_hat.device)
        )
        error += weights.decoder_bias
        self.loss = torch.linalg.vector_norm(error).square() / B
        grad = error.mul_(2 / B)  # d loss / d x_rec
        self._pattern = TransposedPattern(latents.indices, F)
        self._z = self._pattern.by_latent(latents.values.flatten())  # [B K]
        active = (self._z > 0).float()
        self._grad_z = self._pattern.row_products(weights.decoder_weight, grad).mul_(active)
        self._x_hat, self._grad = x_hat.to(dtype), grad.to(dtype)
        self.biases = self._pattern.sums(self._grad_z), grad.sum(0)
        self.fires = self._pattern.sums(active) > 0

    @torch.no_grad()
    def of_latents(
        self, first: int, last: int
    ) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, "some d_model"]]:
        """Rows first..last-1 of d loss / d W_enc and d loss / d W_dec in float32.

        They are in buffers until the next call.
        """
        encoder = self._pattern.product(self._grad_z, self._x_hat, first, last)
        decoder = self._pattern.product(self._z, self._grad, first, last)
        if encoder.dtype == torch.float32:
            return encoder, decoder
        held = self._buffers
        return (
            held.copy("encoder gradient", encoder, torch.float32),
            held.copy("decoder gradient", decoder, torch.float32),
        )


def top_k(pre: Float[Tensor, "tokens latents"], k: int) -> SparseLatents:
    """TopK(ReLU(pre), k): the k largest of each row, and 0 for those that are not positive.

    Ties are broken arbitrarily, and so is which of the latents that are not positive make up the
    k; on a CPU a NaN may be passed over.

    There the latents are dealt into groups. The k largest lie in the k groups with the largest
    maxima (or tie with what lies there), so only those groups are searched. Values are gathered
    from `pre` and carry its gradient; they are float32 whatever its precision.
    """
    if pre.device.type != "cpu":
        values, indices = pre.topk(k, sorted=False)
        return SparseLatents(values.clamp_min(0).float(), indices)
    B, F = pre.shape
    size = group_size(F, k)
    num_groups = F // size  # group g holds the latents g, g + num_groups, ...
    # Read as integers, positive floats keep their order, and below them lie all others.
    integers = torch.int16 if pre.dtype == torch.bfloat16 else torch.int32
    members = pre.detach().view(integers).view(B, size, num_groups)
    groups = _largest(members.amax(1), k)  # [B, k]
    candidates = members.gather(2, groups[:, None, :].expand(B, size, k)).view(B, size * k)
    found = _largest(candidates, k)
    indices = found // k * num_groups + groups.gather(1, found % k)
    return SparseLatents(pre.gather(1, indices).clamp_min(0).float(), indices)


def group_size(num_latents: int, k: int) -> int:
    """Latents of a group of `top_k`; a divisor of their number.

    The cost is about F / size maxima to search and k size candidates: least at sqrt(F / k).
    """
    sizes = range(1, math.isqrt(num_latents // k) + 1)
    return max(size for size in sizes if num_latents % size == 0)


def _largest(values: Int[Tensor, "tokens columns"], k: int) -> Int[Tensor, "tokens k"]:
    """Columns of the k largest integers of each row.

    Value and column become one integer, so that numpy's vectorised selection carries the column
    along: several times faster than selecting positions.
    """
    columns = values.shape[1]
    if k == columns:
        return torch.arange(k).expand(len(values), k)
    narrow = values.dtype == torch.int16 and columns <= 2**16
    bits, wide = (16, torch.int32) if narrow else (32, torch.int64)
    keys = values.to(wide).bitwise_left_shift_(bits).bitwise_or_(torch.arange(columns, dtype=wide))
    keys.numpy().partition(columns - k, axis=1)
    return (keys[:, columns - k :] & (2**bits - 1)).long()
