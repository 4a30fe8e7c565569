"""Sparse products of a TopK SAE's training step on a CUDA device.

- `decode`, `transposed_product`: `embedding_bag` over bfloat16 rows rounds its sums to bfloat16,
  and a latent that fires on every token would hold up the rest.
- `entry_products`: `sampled_addmm` takes float32 alone, and its pattern as a sparse matrix.

The sort of `by_latent` is PyTorch's. What `triton_kernels` says of CUDA graphs holds here too.

Shapes: B tokens, D d_model, F latents, K active latents per token, E = B K entries.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_SEGMENT_ENTRIES = 128  # more would leave a latent that fires on every token to few processors
_ENTRIES = 16  # rows fetched together, so that their loads overlap


class ByLatent(NamedTuple):
    """The entries of a [tokens, latents] matrix in the order by latent, then by token."""

    order: Int[Tensor, " entries"]
    """Position of each entry in `indices.flatten()`."""
    tokens: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]
    starts: Int[Tensor, " latents_and_one"]
    """Latent f has the entries starts[f] to starts[f + 1]."""
    extra_starts: Int[Tensor, " latents_and_one"]
    """How many segments beyond their first the latents before f have."""
    extra_owners: Int[Tensor, " extras"]
    """Latent of each such segment; `latents` for the places that are not used."""


def decode(
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    weight: Float[Tensor, "latents d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """W_dec z + b_dec, summed in float32; `weight` is float32 or bfloat16."""
    (B, K), D = values.shape, weight.shape[1]
    out = torch.empty(B, D, dtype=torch.float32, device=weight.device)
    block = _column_block(D)
    _decode_kernel[(B, triton.cdiv(D, block))](
        values.contiguous(),
        indices.contiguous(),
        weight,
        bias,
        out,
        K,
        D,
        weight.stride(0),
        ENTRIES=_ENTRIES,
        BLOCK=block,
    )
    return out


@triton.jit
@no_type_check
def _decode_kernel(
    values,
    indices,
    weight,
    bias,
    out,
    K,
    D,
    weight_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = token * K
    total = _weighted_rows(
        values, indices, start, start + K, weight, weight_stride, columns, D, ENTRIES, BLOCK
    )
    total += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total, mask=columns < D)


@triton.jit
@no_type_check
def _weighted_rows(
    weights,
    ids,
    start,
    end,
    table,
    table_stride,
    columns,
    width,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of weights[e] * table[ids[e], columns] over start <= e < end, in a fixed order."""
    inside = (columns < width)[None, :]
    total = tl.zeros([ENTRIES, BLOCK], dtype=tl.float32)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        real = entries < end
        row = tl.load(ids + entries, mask=real, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=real, other=0.0).to(tl.float32)
        found = tl.load(
            table + row[:, None] * table_stride + columns[None, :],
            mask=real[:, None] & inside,
            other=0.0,
        )
        total += weight[:, None] * found.to(tl.float32)
    return tl.sum(total, 0)


def by_latent(indices: Int[Tensor, "tokens k"], num_latents: int) -> ByLatent:
    """Order the entries of the kept latents by latent; a stable sort, short keys where they fit."""
    device, E = indices.device, indices.numel()
    keys = torch.int16 if num_latents <= 2**15 else torch.int32
    ordered = indices.flatten().to(keys).sort(stable=True)
    latents = ordered.values.int()
    bounds = torch.arange(num_latents + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(latents, bounds)
    # Entries beyond a latent's first segment; at most E / _SEGMENT_ENTRIES segments in all.
    beyond = (starts.diff() - 1).clamp_min(0) // _SEGMENT_ENTRIES
    extra_ends = beyond.cumsum(0)
    places = torch.arange(E // _SEGMENT_ENTRIES, device=device)
    return ByLatent(
        order=ordered.indices,
        tokens=ordered.indices // indices.shape[1],
        latents=latents,
        starts=starts,
        extra_starts=torch.nn.functional.pad(extra_ends, (1, 0)),
        extra_owners=torch.searchsorted(extra_ends, places, right=True),
    )


def transposed_product(
    pattern: ByLatent,
    entries: Float[Tensor, " entries"],
    rows: Float[Tensor, "tokens width"],
) -> Float[Tensor, "latents width"]:
    """The matrix with these entries (in the pattern's order), transposed, times rows; float32.

    A latent's entries are taken in segments, each by a program of its own, so that one that fires
    everywhere does not hold up the rest: the first segment's sum is written to the result, those of
    the others apart, and a second launch adds them in order.
    """
    F, extras, width = len(pattern.starts) - 1, len(pattern.extra_owners), rows.shape[1]
    out = torch.empty(F, width, dtype=torch.float32, device=rows.device)
    partial = torch.empty(extras, width, dtype=torch.float32, device=rows.device)
    block = _column_block(width)
    columns = triton.cdiv(width, block)
    _segments_kernel[(extras + F, columns)](
        entries.contiguous(),
        pattern.tokens,
        pattern.starts,
        pattern.extra_starts,
        pattern.extra_owners,
        rows,
        out,
        partial,
        extras,
        F,
        width,
        rows.stride(0),
        SEGMENT=_SEGMENT_ENTRIES,
        ENTRIES=_ENTRIES,
        BLOCK=block,
    )
    if extras:
        _add_extras_kernel[(F, columns)](out, partial, pattern.extra_starts, width, BLOCK=block)
    return out


@triton.jit
@no_type_check
def _segments_kernel(
    entries,
    tokens,
    starts,
    extra_starts,
    extra_owners,
    rows,
    out,
    partial,
    num_extras,
    F,
    width,
    rows_stride,
    SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The extra segments come first: they are the full ones."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent = program - num_extras
    number = latent * 0
    target = out + latent * width
    if program < num_extras:
        latent = tl.load(extra_owners + program)
        if latent == F:  # a place that is not used
            return
        number = program - tl.load(extra_starts + latent) + 1
        target = partial + program * width
    start = tl.load(starts + latent) + number * SEGMENT
    end = tl.minimum(tl.load(starts + latent + 1), start + SEGMENT)
    total = _weighted_rows(
        entries, tokens, start, end, rows, rows_stride, columns, width, ENTRIES, BLOCK
    )
    tl.store(target + columns, total, mask=columns < width)


@triton.jit
@no_type_check
def _add_extras_kernel(out, partial, extra_starts, width, BLOCK: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    start, end = tl.load(extra_starts + latent), tl.load(extra_starts + latent + 1)
    if start == end:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(out + latent * width + columns, mask=inside)
    for extra in range(start, end):
        total += tl.load(partial + extra * width + columns, mask=inside)
    tl.store(out + latent * width + columns, total, mask=inside)


def entry_products(
    left: Float[Tensor, "tokens d_model"],
    right: Float[Tensor, "latents d_model"],
    tokens: Int[Tensor, " entries"],
    latents: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """left[tokens[e]] . right[latents[e]] for every entry, in float32."""
    E, D = len(tokens), left.shape[1]
    out = torch.empty(E, dtype=torch.float32, device=left.device)
    _entry_products_kernel[(triton.cdiv(E, _ENTRIES),)](
        left,
        right,
        tokens.contiguous(),
        latents.contiguous(),
        out,
        E,
        D,
        left.stride(0),
        right.stride(0),
        ENTRIES=_ENTRIES,
        BLOCK=_column_block(D),
    )
    return out


@triton.jit
@no_type_check
def _entry_products_kernel(
    left,
    right,
    tokens,
    latents,
    out,
    E,
    D,
    left_stride,
    right_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = entries < E
    left_rows = left + tl.load(tokens + entries, mask=real, other=0).to(tl.int64) * left_stride
    right_rows = right + tl.load(latents + entries, mask=real, other=0).to(tl.int64) * right_stride
    total = tl.zeros([ENTRIES, BLOCK], dtype=tl.float32)
    for first in range(0, D, BLOCK):
        columns = (first + tl.arange(0, BLOCK))[None, :]
        inside = real[:, None] & (columns < D)
        one = tl.load(left_rows[:, None] + columns, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(right_rows[:, None] + columns, mask=inside, other=0.0).to(tl.float32)
        total += one * other
    tl.store(out + entries, tl.sum(total, 1), mask=real)


def _column_block(width: int) -> int:
    """The widest power of two, at most 256, that pads rows of this width by an eighth at most.

    More would take so many registers that few programs run at once and loads are waited for.
    """
    blocks = (256, 128, 64, 32)
    fitting = (b for b in blocks if triton.cdiv(width, b) * b <= width * 9 / 8)
    return next(fitting, 32 if width > 16 else 16)
