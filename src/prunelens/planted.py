"""The planted world: activations whose features, and whose fates under "pruning", are known.

Its sizes are fixed, so that nothing can be tuned to please: 256 directions in 64 dimensions that
fire in bursts by document, few of them often and most of them seldom. "Pruning" changes the scale
of all activations and of every dimension, and then the directions one by one, wholly or in part, by
a choice that knows nothing of firing rate (`independent`) or prefers the rare ones (`by_rate`); in
`none` no direction changes, and noise stands for what pruning does. Whoever measures survival in it
can be told whether that is true (methods §9, §10).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

D_MODEL = 64
NUM_DIRECTIONS = 256
FIRING_RATES = (0.0015, 0.15)
RATE_TAIL = 0.6  # exponent of the Pareto distribution of rates, which ends at either bound
DOCUMENT_TOKENS = 256
BURSTS = 0.8  # log-normal deviation of what a document multiplies each rate by, on average 1
MOST_OFTEN = 0.5  # share of a document's tokens that a direction fires on
ACTIVATION_SHAPE = 4  # gamma distributed with mean 1: always positive, deviation 0.5
NOISE_SHARE = 0.05  # of the variance of what the directions make, isotropic; part of every token
OWN_NOISE = {"dense": 0.0, "pruned": 0.05, "none": 0.5}  # the same, of each condition for itself
GAIN = 1.3  # of pruned activations
GAIN_SPREAD = 0.15  # log-normal deviation of every dimension's own beside it
SPLIT_DEGREES = 30.0  # of either half from the direction that was
RESCALING = (0.7, 2.0)  # log-uniform
WEAKENING = (0.1, 0.7)  # uniform
DEGREES = {"kept": (0.0, 15.0), "turned": (15.0, 75.0), "rotated": (75.0, 90.0)}  # uniform
RATE_STRENGTH = 2.0  # of `by_rate`: log odds to be destroyed, rarest against the middle
BLOCK = 20  # directions of similar rate that share fates out among them exactly

Fate = Literal["kept", "rescaled", "split", "merged", "weakened", "turned", "removed", "rotated"]
PER_BLOCK: dict[Fate, int] = {
    "kept": 6,
    "rescaled": 2,
    "split": 1,
    "merged": 1,
    "weakened": 2,
    "turned": 2,
    "removed": 3,
    "rotated": 3,
}
SHARE_DESTROYED = 0.3
SURVIVES: tuple[Fate, ...] = ("kept", "rescaled")
PARTLY: tuple[Fate, ...] = ("weakened", "turned")
DESTROYED: tuple[Fate, ...] = ("removed", "rotated")  # split and merged are none of these
Choice = Literal["independent", "by_rate", "none"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


class World(NamedTuple):
    """What makes the activations of one condition."""

    directions: Float[Tensor, "directions halves d_model"]
    """Unit vectors; the two halves differ only where a direction was split."""
    scales: Float[Tensor, " directions"]
    """What activations are multiplied by; 0 where a direction was removed."""
    firing_rates: Float[Tensor, " directions"]
    """Of every direction over all documents, on dense and on pruned activations alike."""
    gains: Float[Tensor, " d_model"]
    """What pruning multiplies every dimension by, whatever the direction; 1 before it."""
    own_noise: Float[Tensor, ""]
    """Variance of the noise that only this condition has, in that of what the dense directions
    make."""


class Truth(NamedTuple):
    """What became of every direction."""

    fates: list[Fate]
    angles: Float[Tensor, " directions"]
    """Degrees between the direction before and after; NaN where it was removed, split or merged."""
    shares: Float[Tensor, " directions"]
    """How much survived: the part of the later direction along the earlier one times its scale, 0
    to 1; 0.5 where it was split or merged. Gains leave it as it is."""


def dense_world(
    *,
    seed: int = 0,
    num_directions: int = NUM_DIRECTIONS,
    d_model: int = D_MODEL,
    firing_rates: tuple[float, float] = FIRING_RATES,
) -> World:
    """Before any pruning."""
    generator = _generator("directions", seed)
    directions = _unit(torch.randn(num_directions, d_model, generator=generator))
    rarest, most_frequent = (rate**-RATE_TAIL for rate in firing_rates)
    share = torch.rand(num_directions, generator=generator)
    rates = (rarest + (most_frequent - rarest) * share) ** (-1 / RATE_TAIL)
    halves, own = directions[:, None].expand(-1, 2, -1), torch.tensor(OWN_NOISE["dense"])
    return World(halves.clone(), torch.ones(num_directions), rates, torch.ones(d_model), own)


def pruned_world(
    dense: World, choice: Choice, *, seed: int = 0, by_lot: bool = False
) -> tuple[World, Truth]:
    """The same directions, each with its fate.

    `by_lot`: every direction draws its own, so that worlds of several seeds have more or less of
    each. Otherwise all have the same number, and little is left to chance.
    """
    generator = _generator("fates", seed)
    num_directions, _, d_model = dense.directions.shape
    gains = GAIN * (GAIN_SPREAD * torch.randn(d_model, generator=generator)).exp()
    if choice == "none":
        nothing = torch.zeros(num_directions)
        world = dense._replace(gains=gains, own_noise=torch.tensor(OWN_NOISE["none"]))
        return world, Truth(["kept"] * num_directions, nothing, 1 - nothing)
    fates = _fates(dense.firing_rates, choice, by_lot, generator)
    before = dense.directions[:, 0]
    after, scales = dense.directions.clone(), dense.scales.clone()
    angles = torch.full((num_directions,), math.nan)
    for name, (low, high) in DEGREES.items():
        where = _with(fates, name)
        degrees = low + (high - low) * torch.rand(len(where), generator=generator)
        after[where] = _turned(before[where], degrees, generator)[:, None]
        angles[where] = degrees
    where = _with(fates, "rescaled", "weakened")
    angles[where] = 0.0
    where = _with(fates, "rescaled")
    low, high = (math.log(factor) for factor in RESCALING)
    scales[where] = (low + (high - low) * torch.rand(len(where), generator=generator)).exp()
    where = _with(fates, "weakened")
    low, high = WEAKENING
    scales[where] = low + (high - low) * torch.rand(len(where), generator=generator)
    where = _with(fates, "split")
    sideways = _turned(before[where], torch.full((len(where),), SPLIT_DEGREES), generator)
    after[where, 0] = sideways
    after[where, 1] = 2 * (sideways * before[where]).sum(1, keepdim=True) * before[where] - sideways
    where = _with(fates, "merged")
    pairs = where[torch.randperm(len(where), generator=generator)].view(-1, 2)
    together = _unit(before[pairs].sum(1))
    after[pairs] = together[:, None, None].expand(-1, 2, 2, -1)
    scales[_with(fates, "removed")] = 0.0
    shares = (scales * (before * after[:, 0]).sum(1)).clamp(0.0, 1.0)
    shares[_with(fates, "split", "merged")] = 0.5
    own = torch.tensor(OWN_NOISE["pruned"])
    world = World(after, scales, dense.firing_rates, gains, own)
    return world, Truth(fates, angles, shares)


def world_activations(
    world: World, num_tokens: int, *, tokens_seed: int, noise_seed: int
) -> Float[Tensor, "tokens d_model"]:
    """Raw activations, document after document; equal `tokens_seed` and size give paired tokens.

    What a token is (which directions fire, how strongly, and noise that no direction explains)
    comes from `tokens_seed` alone, so dense and pruned worlds are asked with the same one;
    `noise_seed` is of each condition's own noise. Every document (the last may be cut off) has
    rates of its own, so its tokens resemble each other.
    """
    noise = _generator("noise", noise_seed)
    signal_variance = float(
        (world.firing_rates * (1 + 1 / ACTIVATION_SHAPE - world.firing_rates)).sum()
    )
    common, own = (
        math.sqrt(share * signal_variance / len(world.gains))
        for share in (NOISE_SHARE, float(world.own_noise))
    )
    parts = []
    for fires, tokens in _fires(world, num_tokens, tokens_seed):
        strength = torch.zeros(2, *fires.shape)
        token, direction = fires.nonzero(as_tuple=True)
        half = torch.randint(2, token.shape, generator=tokens)
        strength[half, token, direction] = _gamma(len(token), tokens) * world.scales[direction]
        x = strength[0] @ world.directions[:, 0] + strength[1] @ world.directions[:, 1]
        x += common * torch.randn(x.shape, generator=tokens)
        parts.append(x * world.gains + own * torch.randn(x.shape, generator=noise))
    return torch.cat(parts)


def firings(
    world: World, num_tokens: int, *, tokens_seed: int
) -> Bool[Tensor, "tokens directions"]:
    """On which tokens of `world_activations` each direction fires."""
    parts = []
    for fires, tokens in _fires(world, num_tokens, tokens_seed):
        count = int(fires.sum())  # what is drawn there between two sets of documents
        torch.randint(2, (count,), generator=tokens)
        _gamma(count, tokens)
        torch.randn(len(fires), len(world.gains), generator=tokens)
        parts.append(fires)
    return torch.cat(parts)


def _fires(
    world: World, num_tokens: int, tokens_seed: int
) -> Iterator[tuple[Bool[Tensor, "tokens directions"], torch.Generator]]:
    """Of some documents at a time, and what else their tokens are drawn from."""
    rates, tokens = world.firing_rates, _generator("tokens", tokens_seed)
    for document in document_of(num_tokens).split(64 * DOCUMENT_TOKENS):
        document -= int(document[0])
        bursts = torch.randn(int(document[-1]) + 1, len(rates), generator=tokens)
        often = (rates * (BURSTS * bursts - BURSTS**2 / 2).exp()).clamp(max=MOST_OFTEN)
        yield torch.rand(len(document), len(rates), generator=tokens) < often[document], tokens


def document_of(num_tokens: int) -> Int[Tensor, " tokens"]:
    """The document of every token, from 0."""
    return torch.arange(num_tokens) // DOCUMENT_TOKENS


def _gamma(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Gamma with an integer shape is a sum of exponentials; mean 1."""
    exponentials = torch.empty(ACTIVATION_SHAPE, count).exponential_(generator=generator)
    return exponentials.mean(0)


def _fates(rates: Tensor, choice: Choice, by_lot: bool, generator: torch.Generator) -> list[Fate]:
    """The same number of every fate in either world, which are dealt the same hand, or one by lot.

    `independent` deals them out within blocks of similar rate, so that not even chance makes them
    depend on it. `by_rate` deals the same fates, the worst first, by a score that prefers rare
    directions.
    """
    names = [name for name, count in PER_BLOCK.items() for _ in range(count)]
    by_rate = rates.argsort()
    dealt: list[Fate] = []
    while len(dealt) < len(rates):
        if by_lot:
            block = torch.randint(BLOCK, (BLOCK,), generator=generator)
        else:
            block = torch.randperm(BLOCK, generator=generator)
        dealt += [names[i] for i in block]
    del dealt[len(rates) :]
    if dealt.count("merged") % 2:  # two make one
        dealt[dealt.index("merged")] = "kept"
    fates: list[Fate] = ["kept"] * len(rates)
    order = list(range(len(rates)))
    if choice == "by_rate":
        rank = torch.arange(len(rates)) / (len(rates) - 1)
        uniform = torch.rand(len(rates), generator=generator)
        score = 2 * RATE_STRENGTH * (0.5 - rank) - (-uniform.log()).log()  # Gumbel: top k
        order = score.argsort(descending=True).tolist()
        dealt.sort(key=lambda fate: -(2 * (fate in DESTROYED) + (fate in PARTLY)))
    for place, fate in zip(order, dealt, strict=True):
        fates[int(by_rate[place])] = fate
    return fates


def _generator(purpose: str, seed: int) -> torch.Generator:
    """Streams of their own: an SAE's initialisation draws from the plain seeds."""
    digest = hashlib.sha256(f"planted {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _with(fates: list[Fate], *names: str) -> Int[Tensor, " some"]:
    return torch.tensor([i for i, fate in enumerate(fates) if fate in names], dtype=torch.long)


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
