"""Safetensors files as memory: made before their content is there, mapped, changed in place.

The operating system writes changed pages to disk and takes their memory back whenever it needs it,
so a tensor may be far larger than what is free.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import safetensors
import torch
from torch import Tensor

from prunelens.errors import UserError

COPIED_AT_ONCE = 1 << 18
"""Numbers that are read, converted and written at a time: they stay in the cache."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""


def layout(path: pathlib.Path) -> dict[str, Place]:
    """Where a safetensors file has its tensors; reads the header only.

    Raises: UserError where it is no safetensors file, its header does not fit it, or a tensor is of
        a type that torch has no name for.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # sizes, offsets and their order are checked there
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"models.name: {str(path)!r} is no whole safetensors file ({error}); fetch it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    odd = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
    if odd:
        raise UserError(
            f"models.name: {str(path)!r} has tensors of type {odd[0]}, which are not read here;"
            " name a checkpoint of plain floats"
        )
    return {
        name: Place(_DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }


def create(
    path: pathlib.Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """A new safetensors file of zeros, mapped: what its tensors become is what the file holds.

    Args:
        path: where; there is nothing yet.
        tensors: dtype and shape of each.
    Raises: UserError where the disk has no room for all of it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    # The widest first: so each begins at a multiple of its own width, as torch asks for.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        places[name] = Place(dtype, tuple(shape), end)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("x+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        memory = _mapped(file, file.tell() + end, path.parent)
    begin = 8 + len(text)
    return {name: _tensor(memory, p._replace(start=begin + p.start)) for name, p in places.items()}


def scratch(folder: pathlib.Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros in a file without a name: gone with the tensor, or with the process.

    Raises: UserError where the disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        memory = _mapped(file, math.prod(shape) * dtype.itemsize, folder)
    return _tensor(memory, Place(dtype, tuple(shape), 0))


def fill(target: Tensor, path: pathlib.Path, place: Place) -> None:
    """Read a tensor of a file into `target`, a contiguous one of its shape; converts the dtype.

    Raises: UserError where the file ends before the tensor does.
    """
    assert tuple(target.shape) == place.shape, (path, target.shape, place)
    buffer = torch.empty(COPIED_AT_ONCE, dtype=place.dtype)
    with path.open("rb") as file:
        file.seek(place.start)
        for part in target.view(-1).split(COPIED_AT_ONCE):
            read = part if part.dtype == place.dtype else buffer[: len(part)]
            if file.readinto(read.view(torch.uint8).numpy().data) != read.nbytes:
                raise UserError(f"models.name: {str(path)!r} is cut short; fetch it again")
            if read is not part:
                part.copy_(read)


def _mapped(file: BinaryIO, size: int, folder: pathlib.Path) -> mmap.mmap | None:
    """A file's first bytes as memory; room is taken at once, as a full disk later would kill us."""
    if not size:
        return None
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            _write_zeros(file, size)
        return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"disk: no room for {size / 2**30:.1f} GiB in {str(folder)!r} ({error.strerror}); free"
            " some, or name another folder"
        ) from None


def _write_zeros(file: BinaryIO, size: int) -> None:
    """From where the file stands to `size`."""
    for start in range(file.tell(), size, 1 << 22):
        file.write(bytes(min(1 << 22, size - start)))
    file.flush()


def _tensor(memory: mmap.mmap | None, place: Place) -> Tensor:
    count = math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    assert memory is not None
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.start)
    return flat.view(place.shape)
