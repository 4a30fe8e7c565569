"""Which of a latent's firings are kept, with their contexts, while batch after batch goes by.

A firing and its token share one integer, a key; the kept ones are those with the largest keys (the
strongest) or the smallest (a sample). Which they are depends neither on how tokens are batched nor
on their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.analyses.window_batches import WindowBatch

_TOKEN_BITS = 32  # lower half of a key: the token; upper half: what keys are ordered by
_TOKEN_MASK = 2**_TOKEN_BITS - 1
_NO_KEY = 2**63 - 1  # above all keys of a sample
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd constants of splitmix64, as signed integers
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class KeptContexts(NamedTuple):
    """Contexts of one kind, by latent and rank."""

    kind: str
    """`top` or `sample`."""
    latent: Int[Tensor, " contexts"]
    """Ascending."""
    token: Int[Tensor, " contexts"]
    """The one that fires, counted through the whole text."""
    low: Float[Tensor, " contexts"]
    """The bin: low < activation <= high; NaN where there are none."""
    high: Float[Tensor, " contexts"]
    activations: Float[Tensor, "contexts width"]
    """Of the latent, on the tokens around."""


class Strongest:
    """Of every latent the windows in which it fires most strongly, in descending order.

    A key is an activation's bits (which as integers have the order of positive floats) and below
    them how far its token is from the last that there could be; 0 where there is none.
    """

    def __init__(self, num_latents: int, count: int, either_side: int) -> None:
        self._keys = torch.zeros(num_latents, count, dtype=torch.int64)
        self._around = torch.full((num_latents, count, 2 * either_side + 1), torch.nan)

    def offer(self, batch: WindowBatch) -> None:
        """Keep what belongs among the kept ones."""
        self._keys, self._around = self._keys.to(batch.device), self._around.to(batch.device)
        num_latents, count = self._keys.shape
        bits = batch.value.view(torch.int32).long()
        keys = (bits << _TOKEN_BITS) | (_TOKEN_MASK - batch.token)
        best = keys.new_zeros(num_latents * batch.num_windows)
        best.scatter_reduce_(0, batch.latent * batch.num_windows + batch.window, keys, "amax")
        best = best.view(num_latents, batch.num_windows)
        changed = (best.amax(1) > self._keys[:, -1]).nonzero().squeeze(1)
        every = torch.cat([self._keys[changed], best[changed]], dim=1)
        kept, source = every.topk(count, dim=1)
        moved = changed[:, None] * count + source.clamp(max=count - 1)
        around = self._around.flatten(0, 1)[moved]
        new = (source >= count) & (kept > 0)
        latent = changed[:, None].expand_as(kept)[new]
        around[new] = batch.around(latent, _TOKEN_MASK - (kept[new] & _TOKEN_MASK))
        self._keys[changed], self._around[changed] = kept, around

    def contexts(self) -> KeptContexts:
        """The strongest first."""
        found = self._keys > 0
        token = _TOKEN_MASK - (self._keys[found] & _TOKEN_MASK)
        edge = torch.full(token.shape, torch.nan, dtype=torch.float64, device=token.device)
        latent = found.nonzero()[:, 0]
        return KeptContexts("top", latent, token, edge, edge, self._around[found])


class Sample:
    """Of every latent one firing from each bin of its range in which it fires.

    The bins are equal parts of (0, 2^j], low < activation <= high, with 2^j the least power of two
    that reaches the largest activation so far. Where j grows bins merge, two by two. Each keeps the
    firing with the smallest key: a hash, and below it the token.
    """

    def __init__(self, num_latents: int, bins: int, either_side: int, seed: int) -> None:
        self._keys = torch.full((num_latents, bins), _NO_KEY)
        self._around = torch.full((num_latents, bins, 2 * either_side + 1), torch.nan)
        self._exponent = _least_exponent(torch.zeros(num_latents))
        self._states = _hashed(_hashed(torch.tensor(seed)) + torch.arange(num_latents))

    def offer(self, batch: WindowBatch) -> None:
        """Keep what belongs among the kept ones."""
        self._keys, self._around = self._keys.to(batch.device), self._around.to(batch.device)
        self._exponent, self._states = (
            part.to(batch.device) for part in (self._exponent, self._states)
        )
        self._widen(batch)
        num_latents, bins = self._keys.shape
        # In float64 exact: no activation is on different sides of an edge before and after a merge.
        scaled = batch.value.double() * bins * _power_of_two(-self._exponent[batch.latent])
        where = batch.latent * bins + scaled.ceil().long() - 1
        priority = _shifted(_hashed(self._states[batch.latent] + batch.token), 33)
        keys = (priority << _TOKEN_BITS) | batch.token
        self._keys.view(-1).scatter_reduce_(0, where, keys, "amin")
        new = self._keys.view(-1)[where] == keys
        around = batch.around(batch.latent[new], batch.token[new])
        self._around.view(num_latents * bins, -1)[where[new]] = around

    def _widen(self, batch: WindowBatch) -> None:
        """Merge the bins of latents that fire above their range."""
        highest = batch.value.new_zeros(len(self._keys))
        highest.scatter_reduce_(0, batch.latent, batch.value, "amax")
        exponent = torch.maximum(self._exponent, _least_exponent(highest))
        grown = (exponent > self._exponent).nonzero().squeeze(1)
        doublings = (exponent - self._exponent)[grown].clamp(max=62)[:, None]
        self._exponent = exponent
        keys, around = self._keys[grown], self._around[grown]
        target = torch.arange(keys.shape[1], device=keys.device) >> doublings
        merged = torch.full_like(keys, _NO_KEY).scatter_reduce_(1, target, keys, "amin")
        row, column = ((merged.gather(1, target) == keys) & (keys != _NO_KEY)).nonzero().T
        moved = torch.full_like(around, torch.nan)
        moved[row, target[row, column]] = around[row, column]
        self._keys[grown], self._around[grown] = merged, moved

    def contexts(self) -> KeptContexts:
        """From the lowest bin up."""
        found = self._keys != _NO_KEY
        latent, number = found.nonzero().T
        end, bins = _power_of_two(self._exponent[latent]), self._keys.shape[1]
        token = self._keys[found] & _TOKEN_MASK
        low, high = number * end / bins, (number + 1) * end / bins
        return KeptContexts("sample", latent, token, low, high, self._around[found])


def _least_exponent(values: Float[Tensor, " values"]) -> Int[Tensor, " values"]:
    """The least j with 2^j >= value; -1023, below that of any other float32, for 0."""
    bits = values.double().view(torch.int64)
    return (bits >> 52) - 1023 + ((bits & (2**52 - 1)) != 0)


def _power_of_two(exponent: Int[Tensor, " values"]) -> Float[Tensor, " values"]:
    """2^exponent in float64, exactly, for exponents of float32."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _hashed(state: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """One step of splitmix64 (Steele, Lea, Flood 2014); int64 wraps around as it needs."""
    state = state + _GOLDEN
    for bits, factor in zip((30, 27), _FACTORS, strict=True):
        state.bitwise_xor_(_shifted(state, bits)).mul_(factor)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """To the right, as if without a sign."""
    return (state >> bits).bitwise_and_(2 ** (64 - bits) - 1)
