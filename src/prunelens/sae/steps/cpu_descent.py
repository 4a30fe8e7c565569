"""One training step on a CPU by compiled loops: `Descent`, each row read once for all its uses."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.sae import kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import Weights
from prunelens.sae.steps import cpu_kernels, rounding
from prunelens.sae.steps.copies import RoundedCopies
from prunelens.sae.steps.descent import BETA_MEAN, BETA_SQUARE, BIASES, Descended, Descent

log = logging.getLogger(__name__)

_SHARE = 64  # tokens or latents that a thread takes at a time, at least …
_SHARES = 32  # … and into how many at most they are dealt: the same for any number of threads

_Map = Callable[..., Iterable[Any]]  # map, or that of a pool


class CpuDescent(Descent):
    """`Descent` by the loops of `cpu_kernels`.

    With bfloat16, copies of both weight matrices in it are kept up to date by the update itself;
    the weights, Adam's moments and the loops' sums are float32. `compile_loops` beforehand spares
    the first step the compiler.
    """

    def __init__(
        self, weights: Weights, k: int, *, dtype: torch.dtype, buffers: Buffers | None = None
    ) -> None:
        super().__init__(weights, k, dtype=dtype, buffers=buffers)
        D, device = len(self.weights.decoder_bias), self.weights.decoder_bias.device
        self._copies = None
        if dtype == torch.bfloat16:
            width = rounding.width_with_column(D)
            self._copies = RoundedCopies(self.weights, width=width, dtype=rounding.units(device))

    @torch.no_grad()
    def step(self, x_hat: Float[Tensor, "batch d_model"], *, rate: float, number: int) -> Descended:
        """See `Descent.step`."""
        threads = torch.get_num_threads()
        if threads == 1:
            return self._step(x_hat.contiguous(), rate, number, map)
        with ThreadPoolExecutor(threads) as pool:
            return self._step(x_hat.contiguous(), rate, number, pool.map)

    def _step(self, x_hat: Tensor, rate: float, number: int, run: _Map) -> Descended:
        F = len(self.weights.encoder_bias)
        inputs, pre = self._encode(x_hat)
        latents = self._select(pre, run)
        loss, grad, of_decoder = self._errors(x_hat, *latents, run)
        entries = self._by_latent(*latents)
        scales = (
            np.float32(rate / (1 - BETA_MEAN**number)),
            np.float32(1 / math.sqrt(1 - BETA_SQUARE**number)),
        )
        decoder, encoder = self._rows("decoder_weight"), self._rows("encoder_weight")
        of_encoder, fires = np.empty(F, np.float32), np.empty(F, np.bool_)
        _share(run, cpu_kernels.step_decoder, F, *entries, grad, *decoder, *scales)
        given = (_factors(inputs), *encoder, *scales, of_encoder, fires)
        _share(run, cpu_kernels.step_encoder, F, *entries, *given)
        biases = torch.from_numpy(of_encoder), torch.from_numpy(of_decoder)
        self.adam(BIASES, biases, rate, number, slice(None))
        if self._copies is not None:
            self._copies.renew_bias()
        return Descended(torch.tensor(loss), torch.from_numpy(fires))

    def _encode(self, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs as factors, with a column of ones where copies have one, and pre-activations."""
        weights, copies, shape = self.weights, self._copies, (len(x_hat), len(self.weights[0]))
        if copies is None:
            out = self._buffers.take("pre", shape, torch.float32, x_hat.device)
            bias, rows = weights.encoder_bias, weights.encoder_weight
            return x_hat, torch.addmm(bias, x_hat, rows.T, out=out)
        copies.renew()
        inputs = rounding.rounded_inputs(x_hat, self._buffers)
        out = self._buffers.take("pre", shape, inputs.dtype, x_hat.device)
        return inputs, torch.mm(inputs, copies.encoder.T, out=out)

    def _select(self, pre: Tensor, run: _Map) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of each token's latents."""
        (B, F), k = pre.shape, self._k
        indices, values = self._array("indices", (B, k), torch.int32), self._array("values", (B, k))
        size = kernels.group_size(F, k)
        _share(run, cpu_kernels.select, B, _bits(pre), size, indices, values)
        return indices, values

    def _errors(
        self, x_hat: Tensor, indices: np.ndarray, values: np.ndarray, run: _Map
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """The loss, its gradient at the reconstruction as factors, and at the decoder's bias."""
        (B, D), copies = x_hat.shape, self._copies
        rows = self.weights.decoder_weight if copies is None else copies.decoder
        grad = _factors(self._buffers.take("grad", (B, D), rows.dtype, rows.device))
        bias, scale = self.weights.decoder_bias.numpy(), np.float32(2 / B)
        given = (indices, values, _factors(rows), bias, x_hat.numpy(), scale, grad)
        shares = _shares(B)
        sums = np.empty((len(shares), D), np.float32)
        squares = list(
            run(lambda share, out: cpu_kernels.errors(*share, *given, out), shares, sums)
        )
        return sum(squares) / B, grad, sums.sum(0)

    def _by_latent(self, indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where each latent's entries start, their tokens and values, and room for gradients."""
        starts = self._array("starts", (len(self.weights.encoder_bias) + 2,), torch.int64)
        tokens = self._array("tokens", (indices.size,), torch.int32)
        z, grad_z = (self._array(name, (indices.size,)) for name in ("z", "grad_z"))
        cpu_kernels.by_latent(indices, values, starts, tokens, z)
        return starts, tokens, z, grad_z

    def _rows(self, name: str) -> tuple[np.ndarray | None, ...]:
        """A matrix, its moments and its rounded copy."""
        groups = (self.weights, self.mean, self.mean_square)
        copy = {"encoder_weight": "encoder", "decoder_weight": "decoder"}[name]
        rounded = None if self._copies is None else _factors(getattr(self._copies, copy))
        return (*(getattr(group, name).numpy() for group in groups), rounded)

    def _array(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> np.ndarray:
        return self._buffers.take(name, shape, dtype, torch.device("cpu")).numpy()


@functools.cache
def compile_loops(dtype: torch.dtype) -> None:
    """Have the loops compiled for this precision, which takes seconds, once per process.

    By a step of a tiny SAE in this thread: an interruption would wait for those of a pool.
    """
    log.info("the loops of a training step are being compiled, which takes some seconds")
    matrices, biases = (torch.eye(8), torch.eye(8)), (torch.zeros(8), torch.zeros(8))
    tiny = CpuDescent(Weights(matrices[0], biases[0], matrices[1], biases[1]), 2, dtype=dtype)
    with torch.no_grad():
        tiny._step(torch.ones(4, 8), 1e-3, 1, map)


def _factors(rows: Tensor) -> np.ndarray:
    """As `cpu_kernels` takes them; the same memory."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _bits(pre: Tensor) -> np.ndarray:
    """Pre-activations read as integers; the same memory."""
    return pre.view(torch.int16 if pre.dtype == torch.bfloat16 else torch.int32).numpy()


def _share(run: _Map, function: Callable[..., Any], count: int, *arguments: Any) -> None:
    """`function` of some of `count` items at a time."""
    list(run(lambda share: function(*share, *arguments), _shares(count)))


def _shares(count: int) -> list[tuple[int, int]]:
    """First and last + 1 of the items that are done in one go."""
    shares = max(1, min(_SHARES, count // _SHARE))
    return [(count * i // shares, count * (i + 1) // shares) for i in range(shares)]
