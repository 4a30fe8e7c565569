"""Masks: which weights of a model stay, one bit per weight in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from prunelens.errors import UserError
from prunelens.prune.scores import Scored
from prunelens.prune.selection import Kept, select
from prunelens.temporary import replacing

FORMAT = "prunelens-masks-1"
MASKS_FILE = "prune_masks.safetensors"  # beside a checkpoint that is passed on


class PackedMasks(Mapping[str, Tensor]):
    """Masks by matrix, True where a weight stays, on the CPU; unpacked on look-up, one at a time.

    They take one bit per weight: row by row, high bit first, the last byte filled with zeros.
    """

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bits: dict[str, UInt8[np.ndarray, " bytes"]] = {}

    def __getitem__(self, name: str) -> Bool[Tensor, "_output _input"]:
        shape = self._shapes[name]
        bits = np.unpackbits(self._bits[name], count=math.prod(shape))
        return torch.from_numpy(bits.view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every mask."""
        return self._shapes

    @property
    def bits(self) -> Mapping[str, UInt8[np.ndarray, " bytes"]]:
        """The bytes of every mask."""
        return self._bits

    def add(self, name: str, shape: tuple[int, ...], bits: UInt8[np.ndarray, " bytes"]) -> None:
        """Take one mask as it is packed; `bits` is not copied."""
        assert len(bits) == -(-math.prod(shape) // 8), (name, shape, len(bits))
        self._shapes[name], self._bits[name] = tuple(shape), bits

    def write(self, kept: Kept, shape: tuple[int, ...]) -> None:
        """Fill in some rows of the mask of that shape."""
        if kept.name not in self._shapes:
            self.add(kept.name, shape, np.zeros(-(-math.prod(shape) // 8), dtype=np.uint8))
        start = kept.rows.start * shape[1]
        assert start % 8 == 0, "blocks of rows fill whole bytes"
        packed = _packed(kept.keep)
        self._bits[kept.name][start // 8 : start // 8 + len(packed)] = packed


def keep_masks(
    scores: Mapping[str, Float32[Tensor, "_output _input"]],
    *,
    scope: Literal["global", "matrix", "row"],
    sparsity: Fraction,
    group: tuple[int, int] | None = None,
) -> dict[str, Bool[Tensor, "_output _input"]]:
    """Which weights stay (True), by matrix, on the scores' devices (methods §3).

    Exactly floor(sparsity * n) weights of every scope group go, those of the lowest score; among
    equal scores the lowest flat index goes first, and an earlier matrix before a later one.

    Args:
        scores: by matrix, not negative, in `named_modules` order.
        scope: the weights that compete: `global` all, `matrix` those of one, `row` of one row.
        sparsity: in [0, 1], exact.
        group: n and m of a pattern n:m, as for `select`.
    Raises: UserError where a score is NaN or infinite, or m divides no row; it names the matrix.
    """
    for name, matrix in scores.items():
        assert matrix.dtype == torch.float32 and matrix.ndim == 2, (name, matrix.dtype)
        assert not bool((matrix < 0).any()), f"negative scores in {name}"
    matrices = {name: Scored(matrix) for name, matrix in scores.items()}
    masks = {name: torch.empty_like(m, dtype=torch.bool) for name, m in scores.items()}
    for kept in select(matrices, scope=scope, sparsity=sparsity, group=group):
        masks[kept.name][kept.rows] = kept.keep
    return masks


def save_masks(masks: Mapping[str, Bool[Tensor, "_output _input"]], path: pathlib.Path) -> None:
    """Write masks as safetensors, one bit per weight (row by row, high bit first), atomically.

    The same masks in the same order give the same bytes.
    """
    packed = {name: _bits(masks, name) for name in masks}
    described = {"format": FORMAT, "shapes": dict(_shapes(masks))}
    # One key: several would be written in any order.
    metadata = {"masks": json.dumps(described)}
    with replacing(path) as file:
        safetensors.numpy.save_file(packed, file, metadata=metadata)


def load_masks(path: pathlib.Path) -> PackedMasks:
    """The masks that `save_masks` wrote, in the same order.

    Raises: UserError where the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"masks: no file {str(path)!r}; give one that `save_masks` wrote")
    masks = PackedMasks()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            described = _described(file.metadata() or {})
            if described.get("format") != FORMAT:
                raise UserError(
                    f"masks: {str(path)!r} holds no masks ({FORMAT}); give a file that"
                    " `save_masks` wrote"
                )
            for name, shape in described["shapes"].items():
                bits = file.get_tensor(name)
                if len(bits) != -(-math.prod(shape) // 8):
                    raise UserError(f"masks: {str(path)!r} is damaged at {name}; make it again")
                masks.add(name, tuple(shape), bits)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"masks: {str(path)!r} is no safetensors file ({error}); make it again"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"[:150]
        raise UserError(
            f"masks: {str(path)!r} does not describe its masks ({problem}); make it again"
        ) from None
    return masks


def masks_sha256(masks: Mapping[str, Bool[Tensor, "_output _input"]]) -> str:
    """What stands for masks on any machine: a SHA-256 in hexadecimal.

    It runs over the matrices by rising name: the name in UTF-8, a zero byte, the shape as
    `rows x columns` in decimals (`128x512`), a zero byte, then the mask's bytes as `save_masks`
    writes them. The order in which the masks were made does not matter.
    """
    digest = hashlib.sha256()
    shapes = _shapes(masks)
    for name in sorted(masks):
        shape = "x".join(map(str, shapes[name]))
        digest.update(f"{name}\0{shape}\0".encode() + _bits(masks, name).tobytes())
    return digest.hexdigest()


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """`format` and `shapes`; files of the first releases have a key for each."""
    if "masks" in metadata:
        return dict(json.loads(metadata["masks"]))
    if metadata.get("format") != FORMAT:
        return {}
    return {"format": FORMAT, "shapes": json.loads(metadata["shapes"])}


def _shapes(masks: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    if isinstance(masks, PackedMasks):
        return masks.shapes
    return {name: tuple(mask.shape) for name, mask in masks.items()}


def _bits(masks: Mapping[str, Tensor], name: str) -> UInt8[np.ndarray, " bytes"]:
    """One mask as bytes; those of packed masks are not unpacked."""
    return masks.bits[name] if isinstance(masks, PackedMasks) else _packed(masks[name])


def _packed(mask: Tensor) -> UInt8[np.ndarray, " bytes"]:
    return np.packbits(mask.cpu().numpy().reshape(-1))
