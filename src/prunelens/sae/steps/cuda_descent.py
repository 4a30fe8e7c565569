"""One training step on a CUDA device: `Descent` by our kernels, captured in a CUDA graph.

A step launches some fifty kernels of a few microseconds each, which is more than a processor can
keep up with; captured once, they are launched together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.sae.kernels import Gradients, SparseLatents, Weights
from prunelens.sae.steps import triton_kernels, triton_products
from prunelens.sae.steps.copies import RoundedCopies
from prunelens.sae.steps.descent import Descended, Descent
from prunelens.sae.steps.rounding import width_with_column

_WIDTH_MULTIPLE = 8  # bfloat16 values in the 16 bytes that a thread loads at once


class CudaDescent(Descent):
    """`Descent` on a CUDA device.

    With bfloat16, copies of both weight matrices in it are kept up to date by the update itself;
    the weights, Adam's moments and all sums are float32. A batch size is captured at its second
    step, and what `step` returns is overwritten by the next one.
    """

    def __init__(self, weights: Weights, k: int, *, dtype: torch.dtype) -> None:
        super().__init__(weights, k, dtype=dtype)
        D, device = len(self.weights.decoder_bias), self.weights.decoder_bias.device
        self._copies = None
        if dtype == torch.bfloat16:
            self._copies = RoundedCopies(self.weights, width=_width(D))
        self._rate, self._number = (torch.zeros((), device=device) for _ in range(2))
        self._x_hat = torch.zeros(0, D, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: Descended | None = None

    @torch.no_grad()
    def step(self, x_hat: Float[Tensor, "batch d_model"], *, rate: float, number: int) -> Descended:
        """See `Descent.step`."""
        if x_hat.device.type != "cuda":  # in Triton's interpreter
            return self._step(x_hat, rate, number)
        with torch.cuda.device(x_hat.device):  # where Triton launches and graphs are captured
            return self._step(x_hat, rate, number)

    def _step(self, x_hat: Tensor, rate: float, number: int) -> Descended:
        if self._copies is not None:
            self._copies.renew()
        self._rate.fill_(rate)
        self._number.fill_(number)
        if x_hat.shape != self._x_hat.shape:  # compiles what is missing, so that it can be captured
            self._x_hat, self._graph = x_hat.clone(), None
            return self._run()
        self._x_hat.copy_(x_hat)
        if x_hat.device.type != "cuda":  # in Triton's interpreter
            return self._run()
        if self._graph is None or self._captured is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._captured = self._run()
        self._graph.replay()
        return self._captured

    def _run(self) -> Descended:
        weights, x_hat = self.weights, self._x_hat
        if self._copies is None:
            inputs = with_ones(x_hat, torch.float32)
            pre = torch.addmm(weights.encoder_bias, x_hat, weights.encoder_weight.T)
        else:
            inputs = with_ones(x_hat, self._copies.encoder.dtype)
            pre = inputs @ self._copies.encoder.T
        latents = triton_kernels.top_k(pre, None, self._k)
        rows = weights.decoder_weight if self._copies is None else self._copies.decoder
        found = gradients(x_hat, inputs, latents, rows, weights.decoder_bias)
        self._apply(found.weights)
        return Descended(found.loss, found.fires)

    def _apply(self, gradients: Weights) -> None:
        """Adam, unit norm and copies. Biases are updated as tables of one column or one row."""
        F, D = self.weights.encoder_weight.shape
        shapes = ((F, D), (F, 1), (F, D), (1, D))
        copies: tuple[Tensor | None, ...] = (None, None, None, None)
        if self._copies is not None:
            encoder, decoder = self._copies.encoder, self._copies.decoder
            copies = (encoder[:, :D], encoder[:, D : D + 1], decoder, None)
        scales = triton_kernels.step_scales(self._rate, self._number)
        groups = zip(self.weights, gradients, self.mean, self.mean_square, strict=True)
        plans = zip(Weights._fields, groups, shapes, copies, strict=True)
        for name, tensors, shape, copy in plans:
            weight, grad, mean, mean_square = (tensor.view(shape) for tensor in tensors)
            unit = name == "decoder_weight"
            triton_kernels.adam_rows(
                weight, grad, mean, mean_square, scales, normalise=unit, shadow=copy
            )


def gradients(
    x_hat: Float[Tensor, "tokens d_model"],
    inputs: Float[Tensor, "tokens width"],
    latents: SparseLatents,
    rows: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " d_model"],
) -> Gradients:
    """`kernels.reference_gradients` at a cost of B K D.

    Args:
        x_hat: what is to be reconstructed, in float32.
        inputs: `with_ones(x_hat)` in the precision of `rows`.
        latents: as the encoder found them.
        rows: the decoder's. Factors of all sparse products are rounded to their precision, and
            bfloat16 halves the traffic; sums stay float32.
        bias: the decoder's.
    """
    (B, D), F = x_hat.shape, len(rows)
    error = triton_products.decode(latents.values, latents.indices, rows, bias).sub_(x_hat)
    loss = error.square().sum() / B
    grad = error.mul_(2 / B)  # d loss / d x_rec
    grad_rows = grad.to(rows.dtype)
    pattern = triton_products.by_latent(latents.indices, F)
    z = latents.values.flatten()[pattern.order]
    active = z > 0  # only active latents learn
    products = triton_products.entry_products(grad_rows, rows, pattern.tokens, pattern.latents)
    grad_z = products * active
    encoder = triton_products.transposed_product(pattern, grad_z, inputs)
    fires = torch.zeros(F + 1, dtype=torch.bool, device=x_hat.device)  # the last for the inactive
    fires.scatter_(0, pattern.latents.long().masked_fill(~active, F), True)
    return Gradients(
        loss=loss,
        weights=Weights(
            encoder_weight=encoder[:, :D],
            encoder_bias=encoder[:, D],
            decoder_weight=triton_products.transposed_product(pattern, z, grad_rows),
            decoder_bias=grad.sum(0),
        ),
        fires=fires[:F],
    )


def with_ones(
    x_hat: Float[Tensor, "tokens d_model"], dtype: torch.dtype
) -> Float[Tensor, "tokens width"]:
    """Inputs with a column of ones after them, for the bias, and zeros up to whole 16 bytes.

    Against it, a product with the weights adds the bias, and the gradient's has the bias's.
    """
    B, D = x_hat.shape
    inputs = torch.zeros(B, _width(D), dtype=dtype, device=x_hat.device)
    inputs[:, :D] = x_hat
    inputs[:, D] = 1
    return inputs


def _width(d_model: int) -> int:
    return width_with_column(d_model, _WIDTH_MULTIPLE)
