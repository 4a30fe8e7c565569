"""Tensors that a later run goes on from: put in place at once, and known to be what was written.

safetensors has no checksum, and a flipped bit in a weight is a weight. So the file's metadata have
the SHA-256 of everything else in it. A sum in a file of its own could be that of the file before.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from prunelens.temporary import flush, replacing


class Checked(NamedTuple):
    """What a file of `save_checked` holds."""

    tensors: dict[str, Tensor]
    """By name, on the CPU."""
    note: str
    """Whatever else was to be kept, as text."""


def save_checked(tensors: Mapping[str, Tensor], path: pathlib.Path, *, note: str) -> None:
    """Write tensors and a note beside `path`, then put them in place at once."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        save_file(kept, file, metadata={"note": note, "sha256": _sha256(kept, note)})
        flush(file)


def load_checked(path: pathlib.Path) -> Checked:
    """What `save_checked` was given. Raises ValueError where a bit of it has changed."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note, expected = metadata["note"], metadata["sha256"]
    except KeyError as error:
        raise ValueError(f"no {error} in its metadata") from None
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    if _sha256(tensors, note) != expected:
        raise ValueError("it is not as it was written")
    return Checked(tensors, note)


def _sha256(tensors: Mapping[str, Tensor], note: str) -> str:
    total = hashlib.sha256(note.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
