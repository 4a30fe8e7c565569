"""An SAE's errors on some tokens, and what can be mended without training it again (RQ3).

Two refits, both from the activations of the model under test: the decoder bias (pruning moves the
mean of the activations), and for JumpReLU one common factor on all thresholds (pruning changes
their scale).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from prunelens.sae.exchange.formats import GivenSae

_BATCH_TOKENS, _BATCH_LATENTS = 2048, 2**25  # dense latents held at a time: 128 MB in float32


class Refitted(NamedTuple):
    """An SAE on one token set."""

    l0: float
    """Mean number of active latents, as it was given."""
    variants: dict[str, GivenSae]
    """none, b_dec and, where there are thresholds, threshold (with b_dec refitted after it)."""


def refit(
    sae: GivenSae,
    states: Float[Tensor, "tokens d_model"],
    members: Bool[Tensor, "sets tokens"],
    *,
    dense_l0: Sequence[float] | None,
) -> list[Refitted]:
    """The refits of an SAE on each token set; equal sets share their variants.

    Args:
        states: raw activations of the model under test.
        members: which tokens are in which set.
        dense_l0: per set the L0 that refitted thresholds must give; None: keep the thresholds
            (on the dense model itself the refitted ones are the ones it has).
    """
    errors = Errors(len(members), sae)
    errors.add(sae, states, members)
    results: list[Refitted] = []
    for number, member in enumerate(members):
        if (twin := first_equal(members, number)) < number:
            results.append(results[twin])
            continue
        shifted = sae.with_decoder_shift(errors.moments.mean[number].float())
        variants = {"none": sae, "b_dec": shifted}
        if sae.threshold is not None:
            tokens = states[member]
            factor = 1.0
            if dense_l0 is not None:
                factor = threshold_factor(sae, tokens, round(dense_l0[number] * len(tokens)))
            variants["threshold"] = shifted if factor == 1.0 else _scaled(sae, factor, tokens)
        results.append(Refitted(float(errors.l0[number]), variants))
    return results


def threshold_factor(
    sae: GivenSae, states: Float[Tensor, "tokens d_model"], num_active: int
) -> float:
    """The common factor on all thresholds at which `num_active` latents are active in all.

    A latent is active where pre-activation / threshold exceeds the factor, so the factor is the
    middle of two neighbours in the order of these ratios: exact in one pass, where a bisection
    would encode everything some twenty times. 1 if the thresholds do as they are; 0 if even
    without thresholds too few are active.
    """
    assert sae.threshold is not None
    rectified, threshold = sae.with_threshold_scale(0.0), sae.threshold
    largest, floor = torch.empty(0, device=sae.device), 0.0
    for x in batches_for(sae, states):
        ratios = rectified.encode(x) / threshold
        largest = torch.cat([largest, ratios[ratios > floor]])
        if len(largest) > 2 * (num_active + 1):
            largest = largest.topk(num_active + 1, sorted=False).values
            floor = float(largest.min())
    if len(largest) <= num_active:
        return 0.0
    top = largest.topk(num_active + 1).values
    below = float(top[-1])
    above = float(top[-2]) if num_active else math.inf
    if below <= 1.0 < above:
        return 1.0
    return (below + above) / 2 if math.isfinite(above) else 2 * below


class Moments:
    """Sums of values and of their squares per dimension, for several token sets, in float64."""

    def __init__(self, num_sets: int, d_model: int, device: torch.device) -> None:
        self.count = torch.zeros(num_sets, 1, dtype=torch.float64, device=device)
        self.total = torch.zeros(num_sets, d_model, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(
        self,
        values: Float[Tensor, "tokens d_model"],
        members: Bool[Tensor, "some_sets tokens"],
        *,
        first: int = 0,
    ) -> None:
        """Add tokens to the sets that they are in, of those from the `first` on."""
        weights, values = members.double(), values.double()
        sets = slice(first, first + len(members))
        self.count[sets] += weights.sum(1, keepdim=True)
        self.total[sets] += weights @ values
        self.squares[sets] += weights @ values.square()

    @property
    def mean(self) -> Float64[Tensor, "sets d_model"]:
        """Mean of each set."""
        return self.total / self.count

    def around(self, centre: Float[Tensor, "... d_model"]) -> Float64[Tensor, "sets d_model"]:
        """Sum over tokens of (value - centre)^2; one centre for all sets, or one for each."""
        around = self.squares - 2 * centre * self.total + self.count * centre.double().square()
        return around.clamp_min(0)


class Errors:
    """What an SAE leaves unexplained (x - x_rec, raw), and how many latents it uses."""

    def __init__(self, num_sets: int, sae: GivenSae) -> None:
        self.moments = Moments(num_sets, sae.d_model, sae.device)
        self.active = torch.zeros(num_sets, dtype=torch.float64, device=sae.device)
        """Active latents, summed over the tokens of each set."""

    def add(
        self,
        sae: GivenSae,
        states: Float[Tensor, "tokens d_model"],
        members: Bool[Tensor, "some_sets tokens"],
        *,
        first: int = 0,
    ) -> None:
        """Encode and decode tokens, without the SAE's own decoder shift; sets as in `Moments`."""
        unshifted = dataclasses.replace(sae, decoder_shift=None)
        start = 0
        for x in batches_for(sae, states):
            part = members[:, start : start + len(x)].to(sae.device)
            rebuilt = unshifted.rebuild(x)
            self.moments.add(x - rebuilt.states, part, first=first)
            sets = slice(first, first + len(part))
            self.active[sets] += part.double() @ rebuilt.num_active.double()
            start += len(x)

    @property
    def l0(self) -> Float64[Tensor, " sets"]:
        """Mean number of active latents per token of each set."""
        return self.active / self.moments.count.squeeze(1)


def batches_for(
    sae: GivenSae, states: Float[Tensor, "tokens d_model"]
) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Tokens in float32 on the SAE's device, so many at a time that dense latents fit."""
    size = max(1, min(_BATCH_TOKENS, _BATCH_LATENTS // sae.num_latents))
    for part in states.split(size):
        yield part.to(sae.device, torch.float32)


def first_equal(sets: Shaped[Tensor, "sets ..."], number: int) -> int:
    """The first of the sets that equals this one."""
    return next(i for i in range(number + 1) if torch.equal(sets[i], sets[number]))


def _scaled(sae: GivenSae, factor: float, tokens: Float[Tensor, "tokens d_model"]) -> GivenSae:
    scaled = sae.with_threshold_scale(factor)
    errors = Errors(1, scaled)
    errors.add(scaled, tokens, torch.ones(1, len(tokens), dtype=torch.bool))
    return scaled.with_decoder_shift(errors.moments.mean[0].float())
