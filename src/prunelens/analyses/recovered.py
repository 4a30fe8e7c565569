"""How much of a model's cross-entropy an SAE's reconstruction recovers (RQ3, methods §7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.analyses.refit import batches_for, first_equal
from prunelens.config import Site
from prunelens.model import LanguageModel, logits, replace_at_site
from prunelens.perplexity import LOGITS_AT_ONCE
from prunelens.sae.formats import GivenSae

Rebuild = Callable[[Tensor], Tensor]
"""[tokens, d_model] activations to what takes their place."""


class Mended(NamedTuple):
    """An SAE and, per token set, its variants by name."""

    sae: GivenSae
    variants: Sequence[dict[str, GivenSae]]


class CrossEntropy(NamedTuple):
    """Nats per prediction made at a position of the set; NaN where there is none."""

    model: float
    """The model as it is."""
    mean_ablated: float
    """With the mean activation at the positions of the set."""
    sae: float
    """With the SAE's reconstruction there."""

    @property
    def recovered(self) -> float:
        """(mean_ablated - sae) / (mean_ablated - model); NaN unless the ablation does harm."""
        harm = self.mean_ablated - self.model
        return (self.mean_ablated - self.sae) / harm if harm > 0 else math.nan

    @property
    def reason(self) -> str:
        """Why `recovered` is NaN; empty where it is a number."""
        if not math.isnan(self.recovered):
            return ""
        if math.isnan(self.model):
            return "ce_recovered: no prediction is made at these positions"
        return "ce_recovered: mean ablation does not raise the cross-entropy"


class CrossEntropies(NamedTuple):
    """All of one model."""

    model: list[float]
    """Per token set."""
    mean_ablated: list[float]
    """Per token set."""
    sae: dict[tuple[str, int, str], float]
    """By SAE, number of the token set, and variant."""

    def of(self, sae: str, number: int, variant: str) -> CrossEntropy:
        """The three numbers that one row compares."""
        return CrossEntropy(
            self.model[number], self.mean_ablated[number], self.sae[sae, number, variant]
        )


def cross_entropies(
    where: tuple[LanguageModel, Site, int],
    windows: Int[Tensor, "windows context"],
    members: Bool[Tensor, "sets windows context"],
    mean: Float[Tensor, "sets d_model"],
    mended: Sequence[Mended],
    *,
    done: Callable[[int], None],
) -> CrossEntropies:
    """Run a model as it is, mean-ablated, and with each SAE's reconstruction at the site.

    Positions outside the set keep their activations. The model runs once, once per set for the
    mean, and once per set and variant; equal sets (no token's norm was out of bounds) share.

    Args:
        where: model, site, layer.
        members: which positions are in which set.
        mean: per set, what the ablation puts in.
        done: told the number of windows of each pass.
    """
    plain = _nll(where, windows, None)
    done(len(windows))
    cache: dict[tuple[int, Hashable], float] = {}

    def replaced(number: int, what: Hashable, rebuild: Rebuild) -> float:
        key = first_equal(members, number), what
        if key not in cache:
            nll = _nll(
                where, windows, lambda at: lambda x: _rebuilt(x, members[number][at], rebuild)
            )
            cache[key] = _mean_at(nll, members[number])
        done(len(windows))
        return cache[key]

    numbers = range(len(members))
    return CrossEntropies(
        model=[_mean_at(plain, members[number]) for number in numbers],
        # Sets that are equal here may differ on the tokens that the mean was taken over.
        mean_ablated=[
            replaced(number, first_equal(mean, number), _constant(mean[number]))
            for number in numbers
        ],
        sae={
            (entry.sae.name, number, name): replaced(number, variant, _reconstruction(variant))
            for entry in mended
            for number in numbers
            for name, variant in entry.variants[number].items()
        },
    )


def _constant(mean: Float[Tensor, " d_model"]) -> Rebuild:
    return lambda x: mean.to(x.device).expand_as(x)


def _reconstruction(sae: GivenSae) -> Rebuild:
    return lambda x: torch.cat([sae.decode(sae.encode(part)) for part in batches_for(sae, x)])


def _rebuilt(
    x: Float[Tensor, "windows context d_model"],
    at: Bool[Tensor, "windows context"],
    rebuild: Rebuild,
) -> Float[Tensor, "windows context d_model"]:
    """The activations with those `at` some positions rebuilt."""
    at = at.to(x.device)
    if not bool(at.any()):
        return x
    x = x.clone()
    x[at] = rebuild(x[at]).to(x)
    return x


def _nll(
    where: tuple[LanguageModel, Site, int],
    windows: Int[Tensor, "windows context"],
    replace: Callable[[slice], Rebuild] | None,
) -> Float[Tensor, "windows predictions"]:
    """-log p(next token) at all positions but the last; `replace` is asked per slice of windows."""
    lm, site, layer = where
    limit = LOGITS_AT_ONCE.get(lm.device.type, 2**22)
    per_batch = max(1, limit // (windows.shape[1] * lm.vocabulary_size))
    found = []
    for first in range(0, len(windows), per_batch):
        at = slice(first, first + per_batch)
        batch = windows[at]
        if replace is None:
            scores = logits(lm, batch)
        else:
            scores = replace_at_site(lm, batch, site, layer, replace(at))
        targets = batch[:, 1:].to(scores.device)
        losses = F.cross_entropy(
            scores[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        found.append(losses.view_as(targets).cpu())
    return torch.cat(found)


def _mean_at(
    nll: Float[Tensor, "windows predictions"], members: Bool[Tensor, "windows context"]
) -> float:
    """Mean over the predictions made at positions of a set, in float64; NaN where there is none."""
    chosen = nll[members[:, :-1]]
    return float(chosen.double().mean())
