"""The planted world: activations whose features, and whose fates under "pruning", are known.

Its sizes are fixed, so that nothing can be tuned to please: 256 directions in 64 dimensions that
fire independently, at rates from one in a thousand to one in ten tokens. "Pruning" the world
changes its directions one by one, by a choice that knows nothing of firing rate (`independent`) or
prefers the rare ones (`by_rate`). Whoever measures survival in it can be told whether that is true
(methods §9).
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

D_MODEL = 64
NUM_DIRECTIONS = 256
FIRING_RATES = (0.001, 0.1)  # log-uniform
ACTIVATION_SHAPE = 4  # gamma distributed with mean 1: always positive, deviation 0.5
NOISE_SHARE = 0.05  # of the variance of what the directions make, isotropic
SPLIT_DEGREES = 30.0  # of either half from the direction that was
RESCALING = (0.5, 2.0)  # log-uniform
KEPT_DEGREES = (0.0, 15.0)
ROTATED_DEGREES = (75.0, 90.0)
RATE_STRENGTH = 2.0  # of `by_rate`: log odds to be destroyed, rarest against the middle
BLOCK = 20  # directions of similar rate that share fates out among them exactly

Fate = Literal["kept", "rescaled", "split", "merged", "removed", "rotated"]
FATES: tuple[Fate, ...] = ("kept", "rescaled", "split", "merged", "removed", "rotated")
PER_BLOCK = {"kept": 8, "rescaled": 2, "split": 2, "merged": 2, "removed": 3, "rotated": 3}
SHARE_DESTROYED = 0.3
SURVIVES = ("kept", "rescaled")
DESTROYED = ("removed", "rotated")  # split and merged are neither
Choice = Literal["independent", "by_rate"]


class World(NamedTuple):
    """What makes the activations of one condition."""

    directions: Float[Tensor, "directions halves d_model"]
    """Unit vectors; the two halves differ only where a direction was split."""
    scales: Float[Tensor, " directions"]
    """What activations are multiplied by; 0 where a direction was removed."""
    firing_rates: Float[Tensor, " directions"]
    """Of every direction, on dense and on pruned activations alike."""


class Truth(NamedTuple):
    """What became of every direction."""

    fates: list[Fate]
    angles: Float[Tensor, " directions"]
    """Degrees between the direction before and after; NaN where it was removed, split or merged."""


def dense_world(*, seed: int = 0) -> World:
    """Before any pruning."""
    generator = _generator("directions", seed)
    directions = _unit(torch.randn(NUM_DIRECTIONS, D_MODEL, generator=generator))
    low, high = (math.log(rate) for rate in FIRING_RATES)
    share = torch.rand(NUM_DIRECTIONS, generator=generator)
    rates = (low + (high - low) * share).exp()
    halves = directions[:, None].expand(-1, 2, -1)
    return World(halves.clone(), torch.ones(NUM_DIRECTIONS), rates)


def pruned_world(dense: World, choice: Choice, *, seed: int = 0) -> tuple[World, Truth]:
    """The same directions, each with its fate."""
    generator = _generator("fates", seed)
    fates = _fates(dense.firing_rates, choice, generator)
    before = dense.directions[:, 0]
    after, scales = dense.directions.clone(), dense.scales.clone()
    angles = torch.full((NUM_DIRECTIONS,), math.nan)
    for name, (low, high) in (("kept", KEPT_DEGREES), ("rotated", ROTATED_DEGREES)):
        where = _with(fates, name)
        degrees = low + (high - low) * torch.rand(len(where), generator=generator)
        after[where] = _turned(before[where], degrees, generator)[:, None]
        angles[where] = degrees
    where = _with(fates, "rescaled")
    low, high = (math.log(factor) for factor in RESCALING)
    scales[where] = (low + (high - low) * torch.rand(len(where), generator=generator)).exp()
    angles[where] = 0.0
    where = _with(fates, "split")
    sideways = _turned(before[where], torch.full((len(where),), SPLIT_DEGREES), generator)
    after[where, 0] = sideways
    after[where, 1] = 2 * (sideways * before[where]).sum(1, keepdim=True) * before[where] - sideways
    where = _with(fates, "merged")
    pairs = where[torch.randperm(len(where), generator=generator)].view(-1, 2)
    together = _unit(before[pairs].sum(1))
    after[pairs] = together[:, None, None].expand(-1, 2, 2, -1)
    scales[_with(fates, "removed")] = 0.0
    return World(after, scales, dense.firing_rates), Truth(fates, angles)


def world_activations(
    world: World, num_tokens: int, *, tokens_seed: int, noise_seed: int
) -> Float[Tensor, "tokens d_model"]:
    """Raw activations; equal `tokens_seed` and world size give paired tokens.

    Which directions fire on a token, and how strongly, comes from `tokens_seed` alone, so dense and
    pruned worlds are asked with the same one; the noise is each condition's own.
    """
    tokens, noise = _generator("tokens", tokens_seed), _generator("noise", noise_seed)
    rates = world.firing_rates
    signal_variance = float((rates * (1 + 1 / ACTIVATION_SHAPE - rates)).sum())
    noise_deviation = math.sqrt(NOISE_SHARE * signal_variance / D_MODEL)
    parts = []
    for first in range(0, num_tokens, 16384):
        size = (min(16384, num_tokens - first), NUM_DIRECTIONS)
        fires = torch.rand(size, generator=tokens) < rates
        strength = torch.zeros(2, *size)
        token, direction = fires.nonzero(as_tuple=True)
        half = torch.randint(2, token.shape, generator=tokens)
        strength[half, token, direction] = _gamma(len(token), tokens) * world.scales[direction]
        x = strength[0] @ world.directions[:, 0] + strength[1] @ world.directions[:, 1]
        x += noise_deviation * torch.randn(x.shape, generator=noise)
        parts.append(x)
    return torch.cat(parts)


def _gamma(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Gamma with an integer shape is a sum of exponentials; mean 1."""
    exponentials = torch.empty(ACTIVATION_SHAPE, count).exponential_(generator=generator)
    return exponentials.mean(0)


def _fates(rates: Tensor, choice: Choice, generator: torch.Generator) -> list[Fate]:
    """The same number of every fate in either world, which are dealt the same hand.

    `independent` deals them out within blocks of similar rate, so that not even chance makes them
    depend on it. `by_rate` deals the same fates by a score that prefers rare directions.
    """
    names = [name for name in FATES for _ in range(PER_BLOCK[name])]
    by_rate = rates.argsort()
    dealt: list[Fate] = []
    while len(dealt) < NUM_DIRECTIONS:
        dealt += [names[i] for i in torch.randperm(BLOCK, generator=generator)]
    del dealt[NUM_DIRECTIONS:]
    if dealt.count("merged") % 2:  # two make one
        dealt[dealt.index("merged")] = "kept"
    fates: list[Fate] = ["kept"] * NUM_DIRECTIONS
    order = list(range(NUM_DIRECTIONS))
    if choice == "by_rate":
        rank = torch.arange(NUM_DIRECTIONS) / (NUM_DIRECTIONS - 1)
        uniform = torch.rand(NUM_DIRECTIONS, generator=generator)
        score = 2 * RATE_STRENGTH * (0.5 - rank) - (-uniform.log()).log()  # Gumbel: top k
        order = score.argsort(descending=True).tolist()
        dealt.sort(key=lambda fate: fate not in DESTROYED)
    for place, fate in zip(order, dealt, strict=True):
        fates[int(by_rate[place])] = fate
    return fates


def _generator(purpose: str, seed: int) -> torch.Generator:
    """Streams of their own: an SAE's initialisation draws from the plain seeds."""
    digest = hashlib.sha256(f"planted {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _with(fates: list[Fate], name: str) -> Int[Tensor, " some"]:
    return torch.tensor([i for i, fate in enumerate(fates) if fate == name], dtype=torch.long)


def _turned(
    rows: Float[Tensor, "some d_model"],
    degrees: Float[Tensor, " some"],
    generator: torch.Generator,
) -> Float[Tensor, "some d_model"]:
    """Every row turned by its angle towards a random orthogonal direction."""
    other = torch.randn(rows.shape, generator=generator)
    other = _unit(other - (other * rows).sum(1, keepdim=True) * rows)
    radians = torch.deg2rad(degrees)[:, None]
    return radians.cos() * rows + radians.sin() * other


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)
