"""Numbers as the compiled loops of `cpu_kernels` hold them.

A factor of a product is a float32, or the upper half of one: a bfloat16, held as uint16, which
neither numpy nor numba has.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

# Sums may be taken in any order and products be added without rounding; NaN and infinity stay.
_REARRANGED = {"contract", "reassoc", "nsz"}
compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=_REARRANGED)

_ONE, _HALF, _LOW, _NAN = np.uint32(1), np.uint32(0x7FFF), np.uint32(16), np.uint32(0x7FC0)


@intrinsic
@no_type_check
def _float_of_bits(context, bits):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), build


@intrinsic
@no_type_check
def _bits_of_float(context, number):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), build


@no_type_check
def number_of(stored):
    """The float32 that a stored factor or a pre-activation's bits stand for."""
    raise TypeError("for compiled code alone")


@overload(number_of)
@no_type_check
def _compiled_number(stored):
    if stored in (types.uint16, types.int16):
        return lambda stored: _float_of_bits(np.uint32(np.uint16(stored)) << _LOW)
    if stored == types.int32:
        return lambda stored: _float_of_bits(np.uint32(stored))
    return lambda stored: stored


@compiled
@no_type_check
def _rounded(number):
    """The bits of the nearest bfloat16, ties to even; of a NaN, NaN."""
    bits = _bits_of_float(number)
    nearest = (bits + _HALF + ((bits >> _LOW) & _ONE)) >> _LOW
    return np.uint16(nearest if number == number else _NAN)


@no_type_check
def factor_of(number, rows):
    """A float32 as the factor that `rows` hold: itself, or the nearest bfloat16."""
    raise TypeError("for compiled code alone")


@overload(factor_of)
@no_type_check
def _compiled_factor(number, rows):
    if rows.dtype == types.uint16:
        return lambda number, rows: _rounded(number)
    return lambda number, rows: number


@no_type_check
def _stored(number, rows):
    """A bfloat16 as `rows` hold it: as its bits, or as a float32."""
    raise TypeError("for compiled code alone")


@overload(_stored)
@no_type_check
def _compiled_stored(number, rows):
    if rows.dtype == types.uint16:
        return lambda number, rows: number
    return lambda number, rows: number_of(number)


@compiled
@no_type_check
def keep_rounded(row, numbers):
    """Put float32 numbers, rounded to bfloat16, into the start of a row of either precision."""
    for d in range(len(numbers)):
        row[d] = _stored(_rounded(numbers[d]), row)
