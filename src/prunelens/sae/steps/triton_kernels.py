"""Kernels for a TopK SAE's training step on a CUDA device: selection and update.

- `top_k`: `torch.topk` passes over every row of pre-activations many times, this once and a bit.
- `adam_rows`: torch's fused Adam, the unit norm and the bfloat16 copy are three passes over the
  weights, this is one: what the optimizer must read and write, and nothing else.

`triton_products` has the sparse products; the encoder's product is PyTorch's own.

Every function here and there has static shapes, does not wait for the device, and gives the same
bits for the same input: all can be captured in a CUDA graph, after a first call in which Triton
compiles them. Triton comes with PyTorch's CUDA builds for Linux; import these modules only where
they are needed.

Shapes: B tokens, F latents.
"""

from __future__ import annotations

import functools
import logging
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from prunelens.sae.kernels import SparseLatents

log = logging.getLogger(__name__)

WIDEST_ROW = 2**15
"""Latents that `top_k` holds in the registers of one program."""

_BETA_MEAN, _BETA_SQUARE = 0.9, 0.999
_EPSILON: tl.constexpr = tl.constexpr(1e-8)
_KEEP_MEAN: tl.constexpr = tl.constexpr(1 - _BETA_MEAN)
_KEEP_SQUARE: tl.constexpr = tl.constexpr(1 - _BETA_SQUARE)
_PIECE = 4096  # columns that `top_k` scans at once; the scan packs two counts into 32 bits


def top_k(
    pre: Float[Tensor, "tokens latents"], bias: Float[Tensor, " latents"] | None, k: int
) -> SparseLatents:
    """TopK(ReLU(pre + bias), k), exact; float32 values and distinct latents in ascending order.

    `pre` is float32 or bfloat16; the sum is taken in float32. Ties go to the lowest latent, also
    among those that are not positive. NaN counts as the largest, and is returned. Rows wider than
    `WIDEST_ROW` are left to `torch.topk`, which breaks ties and orders latents as it likes.
    """
    (B, F), device = pre.shape, pre.device
    assert 1 <= k <= F, f"top_k of {k} among {F}"
    if F > WIDEST_ROW:
        _say_wide(F)
        total = pre if bias is None else pre.float() + bias
        found = total.topk(k, sorted=False)
        return SparseLatents(found.values.float().clamp_min(0), found.indices)
    values = torch.empty(B, k, dtype=torch.float32, device=device)
    indices = torch.empty(B, k, dtype=torch.int64, device=device)
    block = triton.next_power_of_2(F)
    _top_k_kernel[(B,)](
        pre.contiguous(),
        pre if bias is None else bias.float().contiguous(),
        values,
        indices,
        F,
        k,
        HAS_BIAS=bias is not None,
        UNUSED_BITS=16 if bias is None and pre.dtype == torch.bfloat16 else 0,
        BLOCK=block,
        PIECE=min(block, _PIECE),
        num_warps=min(32, max(4, block // 1024)),
    )
    return SparseLatents(values, indices)


@triton.jit
@no_type_check
def _top_k_kernel(
    pre,
    bias,
    values,
    indices,
    F,
    k,
    HAS_BIAS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One row per program: its k-th largest key, held in registers, then a pass that picks."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * F
    keys = _keys(pre, bias, tl.arange(0, BLOCK), F, HAS_BIAS, UNUSED_BITS)
    # Down from the largest in growing strides, the first a factor of two, until k keys are reached.
    high = tl.max(keys, 0) + 1
    low = high
    found = high * 0
    stride = found + (1 << (23 - UNUSED_BITS))
    while found < k:
        high = low
        low = tl.maximum(low - stride, 0)
        stride = tl.minimum(stride * 2, 1 << 29)
        found = tl.sum((keys >= low).to(tl.int32), 0)
    # Halve: at least k keys reach `low`, fewer reach `high`.
    while (high - low > 1) & (found > k):
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, count, found)
    # Keys above `low` are in, and of those equal to it the first ones. The row is read again (it is
    # still in the cache) in pieces: all at once, the scan would not fit into registers.
    missing = k - tl.sum((keys > low).to(tl.int32), 0)
    num_above = found * 0
    num_tied = found * 0
    for first in range(0, F, PIECE):
        columns = first + tl.arange(0, PIECE)
        piece = _keys(pre, bias, columns, F, HAS_BIAS, UNUSED_BITS)
        above, tied = piece > low, piece == low
        ranks = tl.cumsum((above.to(tl.int32) << 16) | tied.to(tl.int32), 0)  # both in one scan
        ties = num_tied + (ranks & 0xFFFF)
        chosen = above | (tied & (ties <= missing))
        place = row * k + num_above + (ranks >> 16) + tl.minimum(ties, missing) - 1
        kept = (piece << UNUSED_BITS).to(tl.float32, bitcast=True)
        tl.store(values + place, kept, mask=chosen)
        tl.store(indices + place, columns.to(tl.int64), mask=chosen)
        num_above += tl.sum(above.to(tl.int32), 0)
        num_tied += tl.sum(tied.to(tl.int32), 0)


@triton.jit
@no_type_check
def _keys(pre, bias, columns, F, HAS_BIAS: tl.constexpr, UNUSED_BITS: tl.constexpr):
    """ReLU(pre + bias) as integers in the same order, none negative; -1 beyond the row."""
    inside = columns < F
    total = tl.load(pre + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0)
    rectified = tl.where(total < 0, 0.0, total)  # NaN stays: it must reach the loss
    keys = (rectified.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> UNUSED_BITS
    return tl.where(inside, keys, -1)


@functools.cache
def _say_wide(num_latents: int) -> None:
    log.info("%d latents are more than a program holds: torch.topk selects", num_latents)


def step_scales(rate: Float[Tensor, ""], step: Float[Tensor, ""]) -> Float[Tensor, " 2"]:
    """What Adam at step `step` (from 1) scales by: rate / (1 - 0.9^t) and sqrt(1 - 0.999^t).

    Both arguments lie on the device, so that a captured CUDA graph sees them change.
    """
    number = step.double()
    scales = (
        rate.double() / (1 - torch.pow(_BETA_MEAN, number)),
        torch.sqrt(1 - torch.pow(_BETA_SQUARE, number)),
    )
    return torch.stack(scales).float()


def adam_rows(
    param: Float[Tensor, "rows width"],
    grad: Float[Tensor, "rows width"],
    mean: Float[Tensor, "rows width"],
    mean_square: Float[Tensor, "rows width"],
    scales: Float[Tensor, " 2"],
    *,
    normalise: bool,
    shadow: Float[Tensor, "rows width"] | None = None,
) -> None:
    """One Adam step in place, as torch's fused Adam takes it (betas 0.9 and 0.999, epsilon 1e-8).

    With `normalise`, rows are scaled to unit norm after it. `shadow` gets a copy of the new rows in
    its own precision. All is float32 but for `shadow`; columns are contiguous, rows may lie apart.
    """
    tensors = (param, grad, mean, mean_square, param if shadow is None else shadow)
    width = param.shape[1]
    assert width == 1 or all(tensor.stride(1) == 1 for tensor in tensors), "strided columns"
    block = triton.next_power_of_2(width)
    _adam_kernel[(len(param),)](
        *tensors,
        scales,
        width,
        *(tensor.stride(0) for tensor in tensors),
        NORMALISE=normalise,
        HAS_SHADOW=shadow is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
    )


@triton.jit
@no_type_check
def _adam_kernel(
    param,
    grad,
    mean,
    mean_square,
    shadow,
    scales,
    width,
    param_stride,
    grad_stride,
    mean_stride,
    mean_square_stride,
    shadow_stride,
    NORMALISE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    param += row * param_stride + columns
    mean += row * mean_stride + columns
    mean_square += row * mean_square_stride + columns
    weight = tl.load(param, mask=inside, other=0.0)
    slope = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0)
    first = tl.load(mean, mask=inside, other=0.0)
    second = tl.load(mean_square, mask=inside, other=0.0)
    first += (slope - first) * _KEEP_MEAN
    second += (slope * slope - second) * _KEEP_SQUARE
    size, correction = tl.load(scales), tl.load(scales + 1)
    weight -= size * first / (tl.sqrt(second) / correction + _EPSILON)
    if NORMALISE:
        weight = weight / tl.sqrt(tl.sum(weight * weight, 0))
    tl.store(mean, first, mask=inside)
    tl.store(mean_square, second, mask=inside)
    tl.store(param, weight, mask=inside)
    if HAS_SHADOW:
        copy = weight.to(shadow.dtype.element_ty)
        tl.store(shadow + row * shadow_stride + columns, copy, mask=inside)
