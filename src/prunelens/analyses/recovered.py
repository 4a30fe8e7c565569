"""How much of a model's cross-entropy an SAE's reconstruction recovers (RQ3, methods §7).

What is put in place of a site changes nothing below it. So the blocks below run once per batch of
windows, and only what stands above runs again for every replacement; a model in which that does
not give its own logits, bit for bit, is run whole each time.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunelens.analyses.refit import batches_for, first_equal
from prunelens.config import Site
from prunelens.model import LanguageModel, logits, replace_at_site, site_module
from prunelens.perplexity import LOGITS_AT_ONCE, next_token_nll
from prunelens.sae.formats import GivenSae

log = logging.getLogger(__name__)

Where = tuple[LanguageModel, Site, int]
"""Model, site, layer."""

Rebuild = Callable[[Tensor], Tensor]
"""Activations, whose last dimension is d_model, to what takes their place."""


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
    where: Where,
    windows: Int[Tensor, "windows context"],
    members: Bool[Tensor, "sets windows context"],
    mean: Float[Tensor, "sets d_model"],
    mended: Sequence[Mended],
    *,
    done: Callable[[int], None],
) -> CrossEntropies:
    """Run a model as it is, mean-ablated, and with each SAE's reconstruction at the site.

    Positions outside the set keep their activations. The model runs once, and from the site on
    once per set for the mean, and once per set and variant; equal sets (no token's norm was out
    of bounds) share.

    Args:
        where: model, site, layer.
        members: which positions are in which set.
        mean: per set, what the ablation puts in.
        done: told the number of windows of each run.
    """
    numbers = range(len(members))
    # Sets that are equal here may differ on the tokens that the mean was taken over.
    means = {
        number: _Replacement(number, first_equal(mean, number), _constant(mean[number]))
        for number in numbers
    }
    saes = {
        (entry.sae.name, number, name): _Replacement(number, variant, _reconstruction(variant))
        for entry in mended
        for number in numbers
        for name, variant in entry.variants[number].items()
    }
    nll = _nll(where, windows, members, [*means.values(), *saes.values()], done)

    def measured(replacement: _Replacement) -> float:
        return _mean_at(nll[replacement.key(members)], members[replacement.number])

    return CrossEntropies(
        model=[_mean_at(nll[None], members[number]) for number in numbers],
        mean_ablated=[measured(means[number]) for number in numbers],
        sae={name: measured(replacement) for name, replacement in saes.items()},
    )


class _Replacement(NamedTuple):
    """What is put at the site, at the positions of one token set."""

    number: int
    """Of the token set."""
    what: Hashable
    """Equal where the same is put in."""
    rebuild: Rebuild

    def key(self, members: Bool[Tensor, "sets windows context"]) -> Hashable:
        """Equal where the same is put in at the same positions."""
        return first_equal(members, self.number), self.what


def _constant(mean: Float[Tensor, " d_model"]) -> Rebuild:
    return lambda x: mean.to(x.device).expand_as(x)


def _reconstruction(sae: GivenSae) -> Rebuild:
    return lambda x: torch.cat([sae.rebuild(part).states for part in batches_for(sae, x)])


def _nll(
    where: Where,
    windows: Int[Tensor, "windows context"],
    members: Bool[Tensor, "sets windows context"],
    replacements: Sequence[_Replacement],
    done: Callable[[int], None],
) -> dict[Hashable, Float[Tensor, "windows predictions"]]:
    """-log p(next token) at all positions but the last, by key; None: the model as it is."""
    asked = Counter(each.key(members) for each in replacements)
    distinct = {each.key(members): each for each in replacements}
    found: dict[Hashable, list[Tensor]] = defaultdict(list)
    runs = _Runs(where)
    for rows in _batches(where[0], windows):
        tokens = windows[rows]
        found[None].append(next_token_nll(runs.whole(tokens), tokens).cpu())
        done(len(tokens))
        for key, (number, _, rebuild) in distinct.items():
            scores = runs.replaced(_rebuilding(members[number, rows], rebuild))
            found[key].append(next_token_nll(scores, tokens).cpu())
            done(asked[key] * len(tokens))
    return {key: torch.cat(parts) for key, parts in found.items()}


def _batches(lm: LanguageModel, windows: Int[Tensor, "windows context"]) -> Iterator[slice]:
    """Rows of so many windows that their logits fit."""
    limit = LOGITS_AT_ONCE.get(lm.device.type, 2**22)
    per_batch = max(1, limit // (windows.shape[1] * lm.vocabulary_size))
    for first in range(0, len(windows), per_batch):
        yield slice(first, first + per_batch)


def _rebuilding(at: Bool[Tensor, "windows context"], rebuild: Rebuild) -> Rebuild:
    """New activations with those `at` some positions rebuilt; what is given stays as it is."""

    def rebuilt(x: Tensor) -> Tensor:
        here, x = at.to(x.device), x.clone()
        if bool(here.any()):
            x[here] = rebuild(x[here]).to(x)
        return x

    return rebuilt


def _mean_at(
    nll: Float[Tensor, "windows predictions"], members: Bool[Tensor, "windows context"]
) -> float:
    """Mean over the predictions made at positions of a set, in float64; NaN where there is none."""
    chosen = nll[members[:, :-1]]
    return float(chosen.double().mean())


# --- restarting at the site ---------------------------------------------------------------------


class _Runs:
    """A batch of windows, run as it is and then again and again from the site on.

    The Hugging Face model itself runs, so that masks, rotary angles, the last norm and the head
    stay its: only, the site's module answers with other activations without being run, and so do
    the blocks below the site's, with what the last of them gave.
    """

    def __init__(self, where: Where) -> None:
        self._lm, self._name, self._layer = where
        self._site = site_module(*where)
        self._below = list(self._lm.blocks[: self._layer])
        self._restarts: bool | None = None  # not known before the first batch
        self._calls: Counter[nn.Module] = Counter()
        self._kept: dict[nn.Module, Any] = {}

    @torch.no_grad()
    def whole(
        self, tokens: Int[Tensor, "windows context"]
    ) -> Float[Tensor, "windows context vocabulary"]:
        """The logits of the next batch; what stands at the site, and below it, is kept."""
        self._tokens = tokens
        self._calls.clear()
        with contextlib.ExitStack() as hooks:
            for module in (self._site, *self._below):
                hooks.callback(module.register_forward_hook(self._keep).remove)
            own = logits(self._lm, tokens)
        if self._restarts is None:
            self._restarts = self._gives(own)
            if not self._restarts:
                log.info("%s cannot be restarted at its site: every run is whole", self._lm.label)
        return own

    @torch.no_grad()
    def replaced(self, replace: Rebuild) -> Float[Tensor, "windows context vocabulary"]:
        """The batch's logits with `replace` (which gives new memory) of the site's activations."""
        if not self._restarts:
            return replace_at_site(self._lm, self._tokens, self._name, self._layer, replace)
        return self._rerun(replace)

    def _keep(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._calls[module] += 1
        if module is self._site or module is self._below[-1]:
            # A copy: what runs on may change it in place, as blocks with parallel sublayers do.
            self._kept[module] = _with_hidden(output, _hidden(output).clone())

    def _gives(self, own: Float[Tensor, "windows context vocabulary"]) -> bool:
        """Whether unchanged activations give the model's own logits, bit for bit.

        They need not where a module hands more to those above than its output; and where one is
        run twice, a change would have to be made twice.
        """
        once = all(self._calls[module] == 1 for module in (self._site, *self._below))
        return once and torch.equal(self._rerun(torch.clone), own)

    def _rerun(self, replace: Rebuild) -> Float[Tensor, "windows context vocabulary"]:
        output = self._kept[self._site]
        before = _hidden(output)
        answers = {self._site: _with_hidden(output, replace(before).to(before))}
        if self._below:
            entering = self._kept[self._below[-1]]
            entering = _with_hidden(entering, _hidden(entering).clone())
            answers |= dict.fromkeys(self._below, entering)
        with _answering(answers):
            return logits(self._lm, self._tokens)


@contextlib.contextmanager
def _answering(answers: Mapping[nn.Module, Any]) -> Iterator[None]:
    """While open, each of the modules does nothing but return its answer."""
    before = {module: module.__dict__.get("forward") for module in answers}  # accelerate's, say
    try:
        for module, answer in answers.items():
            module.forward = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
