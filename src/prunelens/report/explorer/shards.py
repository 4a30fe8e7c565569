"""Arrays -> the JSON of an explorer's data files. Sizes and names: see `content`.

Arrays of numbers are little-endian typed arrays in base64 (`packed`); contexts, of which the page
reads 128 latents at a time, are plain JSON with what is not zero.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from prunelens.report.explorer.content import DENSE, Column, Contexts, Effects

Json = dict[str, Any]
Array = npt.NDArray[Any]

LATENTS_PER_SHARD = 128
DIGITS = 3  # significant digits of activations and logits
BITS = 32  # tokens per word of `places.fires`
UNKNOWN_KEPT = -1
INTEGERS: dict[str, Any] = {
    "u1": np.uint8,
    "u2": np.uint16,
    "u4": np.uint32,
    "i1": np.int8,
    "i4": np.int32,
}


def packed(values: Array | None) -> Json | None:
    """`{"type": "f4", "base64": …}`: floats as float32, integers in the fewest bytes of `INTEGERS`.

    Two dimensions are written row by row.
    """
    if values is None:
        return None
    code = "f4" if values.dtype.kind == "f" else _narrowest(values)
    raw = np.ascontiguousarray(values, dtype=f"<{code}").tobytes()
    return {"type": code, "base64": base64.b64encode(raw).decode("ascii")}


def column(each: Column) -> Json:
    """A column with its words and its values."""
    words = {"key": each.key, "label": each.label, "help": each.help}
    return {**words, "values": packed(each.values)}


def kept_codes(kept: Array) -> Array:
    """[F] int8: 1 kept, 0 lost, -1 cannot be said."""
    return np.where(np.isnan(kept), UNKNOWN_KEPT, kept).astype(np.int8)


def places(contexts: Contexts, num_latents: int) -> Json:
    """Where every context lies and on which of its tokens the latent fires: what search needs.

    `offsets` [F + 1]: the contexts of latent i are those from offsets[i] to offsets[i + 1].
    `fires` [n, words]: bit b of word w is token 32 w + b of the context.
    """
    fires = contexts.activations[DENSE] > 0  # a token that was not read (NaN) does not count
    words = math.ceil(fires.shape[1] / BITS)
    padded = np.zeros((len(fires), words * BITS), dtype=bool)
    padded[:, : fires.shape[1]] = fires
    bits = np.packbits(padded, axis=1, bitorder="little").view("<u4")
    return {
        "eitherSide": contexts.either_side,
        "words": words,
        "offsets": packed(np.searchsorted(contexts.latent, np.arange(num_latents + 1))),
        "windows": packed(contexts.window),
        "positions": packed(contexts.position),
        "fires": {"type": "u4", "base64": base64.b64encode(bits.tobytes()).decode("ascii")},
    }


def shard(contexts: Contexts, effects: Effects | None, first: int, last: int) -> Json:
    """Contexts and effects of the latents first, …, last - 1.

    A context is `{"w": window, "p": position, "s": [low, high] of a sample, "n": offsets of the
    tokens that no condition read, "a": {condition: [[offset, activation], …]}}`; an activation of
    null is a token that this condition alone did not read.
    """
    begin, end = np.searchsorted(contexts.latent, [first, last]).tolist()
    rows = _contexts(contexts, slice(begin, end))
    offsets = np.searchsorted(contexts.latent[begin:end], np.arange(first, last + 1)).tolist()
    latents: list[Json] = [
        {"contexts": rows[offsets[i] : offsets[i + 1]]} for i in range(last - first)
    ]
    if effects is not None:
        part = slice(first, last)
        promoted = _logits(effects.promoted[part], effects.promoted_logits[part])
        suppressed = _logits(effects.suppressed[part], effects.suppressed_logits[part])
        for latent, up, down in zip(latents, promoted, suppressed, strict=True):
            latent |= {"promoted": up, "suppressed": down}
    return {"first": first, "eitherSide": contexts.either_side, "latents": latents}


def rounded(values: Array) -> list[Any]:
    """To three significant digits, so that JSON writes few of them; nested as the array is."""
    wide = values.astype(np.float64)
    with np.errstate(divide="ignore"):
        magnitude = np.floor(np.log10(np.abs(wide)))
    behind = np.where(np.isfinite(magnitude), DIGITS - 1 - magnitude, 0)  # digits after the point
    # Powers of ten above 1 are exact, so that one division gives the number that prints shortest.
    up, down = 10.0 ** np.maximum(behind, 0), 10.0 ** np.maximum(-behind, 0)
    result: list[Any] = (np.round(wide * up / down) * down / up).tolist()
    return result


# --- parts ----------------------------------------------------------------------------------------


def _narrowest(values: Array) -> str:
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for code, kind in INTEGERS.items():
        if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
            return code
    raise AssertionError(f"{least} to {most} do not fit into 32 bits")


def _contexts(contexts: Contexts, part: slice) -> list[Json]:
    rows: list[Json] = [
        {"w": window, "p": position}
        for window, position in zip(
            contexts.window[part].tolist(), contexts.position[part].tolist(), strict=True
        )
    ]
    sampled = np.flatnonzero(contexts.is_sample[part])
    intervals = np.stack([contexts.low[part][sampled], contexts.high[part][sampled]], axis=1)
    for i, interval in zip(sampled.tolist(), rounded(intervals), strict=True):
        rows[i]["s"] = interval
    arrays = {name: values[part] for name, values in contexts.activations.items()}
    unread = np.logical_and.reduce([np.isnan(values) for values in arrays.values()])
    for i, offsets in enumerate(_where(unread)):
        rows[i]["n"] = offsets
        rows[i]["a"] = {}
    for name, values in arrays.items():
        for i, pairs in enumerate(_pairs(values, unread)):
            rows[i]["a"][name] = pairs
    return rows


def _where(marked: Array) -> list[list[int]]:
    """The marked places of each row."""
    row, offset = np.nonzero(marked)
    bounds = np.searchsorted(row, np.arange(len(marked) + 1)).tolist()
    listed = offset.tolist()
    return [listed[bounds[i] : bounds[i + 1]] for i in range(len(marked))]


def _pairs(values: Array, unread: Array) -> list[list[list[Any]]]:
    """[offset, activation] of what is not 0; rows of [rows, W]."""
    shown = (values != 0) & ~unread
    row, offset = np.nonzero(shown)
    found = values[shown]
    missing = np.isnan(found)
    numbers: list[Any] = rounded(np.where(missing, 0, found))
    for i in np.flatnonzero(missing).tolist():
        numbers[i] = None
    pairs = [list(pair) for pair in zip(offset.tolist(), numbers, strict=True)]
    bounds = np.searchsorted(row, np.arange(len(values) + 1)).tolist()
    return [pairs[bounds[i] : bounds[i + 1]] for i in range(len(values))]


def _logits(tokens: Array, logits: Array) -> list[list[list[Any]]]:
    """[token, logit] of each latent, the strongest first; without those that are not finite."""
    numbers = rounded(np.where(np.isfinite(logits), logits, 0))
    return [
        [
            list(pair)
            for pair, is_known in zip(zip(*row, strict=True), known, strict=True)
            if is_known
        ]
        for *row, known in zip(tokens.tolist(), numbers, np.isfinite(logits).tolist(), strict=True)
    ]
