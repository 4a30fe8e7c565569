"""Which tokens each step of a training sees, as a function of a seed and the step alone."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


class TokenOrder:
    """Which tokens each step sees: a fresh permutation per epoch; a batch may cross epochs."""

    def __init__(self, num_tokens: int, batch_tokens: int, *, data_seed: int) -> None:
        self.num_tokens, self.batch_tokens, self.data_seed = num_tokens, batch_tokens, data_seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> Int[Tensor, " batch"]:
        """Token indices of a step, counted from 1."""
        position, end = (step - 1) * self.batch_tokens, step * self.batch_tokens
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.num_tokens)
            parts.append(self._of_epoch(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _of_epoch(self, epoch: int) -> Int[Tensor, " tokens"]:
        if epoch != self._epoch:
            generator = derived_generator("order", self.data_seed, epoch)
            self._permutation = torch.randperm(self.num_tokens, generator=generator)
            self._epoch = epoch
        return self._permutation


def derived_generator(purpose: str, seed: int, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but these three."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
