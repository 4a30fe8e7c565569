"""Tensors that are used again: no fresh memory at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Large tensors that are used again at every step, by trainings that take turns as well.

    A fresh one costs a page fault per 4 KiB.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The tensor of that name and shape, as it was left; zeros the first time."""
        key = (name, shape, dtype, device)
        if key not in self._held:
            self._held[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._held[key]

    def copy(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """`source` in another precision, in the tensor of that name."""
        return self.take(name, tuple(source.shape), dtype, source.device).copy_(source)
