"""Factors rounded to bfloat16, and what this machine multiplies them in."""

from __future__ import annotations

import functools
import logging
import math

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.sae.buffers import Buffers

log = logging.getLogger(__name__)

_WIDTH_MULTIPLE = 32  # columns that matrix units take at a time


def rounded_inputs(
    x_hat: Float[Tensor, "tokens d_model"], buffers: Buffers
) -> Float[Tensor, "tokens width"]:
    """Inputs rounded to bfloat16 with a column of ones after them, against the encoder's bias.

    The bias is one more column of the weights: added by the product itself it costs nearly nothing.
    They are in a buffer until the next call, in the precision of `units`.
    """
    return with_column("inputs", x_hat, 1.0, buffers)


def with_column(
    name: str, rows: Tensor, column: Tensor | float, buffers: Buffers
) -> Float[Tensor, "rows width"]:
    """Rows rounded to bfloat16 with one more column, in the buffer of that name; then zeros."""
    D, precision = rows.shape[1], units(rows.device)
    table = buffers.take(name, (len(rows), width_with_column(D)), precision, rows.device)
    table[:, :D].copy_(rows if precision == torch.bfloat16 else rows.bfloat16())
    table[:, D] = column
    return table


def width_with_column(d_model: int, multiple: int = _WIDTH_MULTIPLE) -> int:
    """Width of rows with one more column, up to a whole multiple of what is taken at a time."""
    return math.ceil((d_model + 1) / multiple) * multiple


def units(device: torch.device) -> torch.dtype:
    """What factors rounded to bfloat16 are multiplied in.

    Where the processor has no bfloat16 units that is float32.
    """
    if device.type != "cpu" or has_bfloat16_units():
        return torch.bfloat16
    return torch.float32


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself; said once where it does not."""
    # Older versions of torch do not tell: then it is as if there were none.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(found.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    if not has:
        log.info("no bfloat16 units: products of bfloat16 factors are taken in float32")
    return has
