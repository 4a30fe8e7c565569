"""How much of a model's cross-entropy an SAE's reconstruction recovers (RQ3, methods §7).

What is put in place of a site changes nothing below it. So the blocks below run once per batch of
windows, and only what stands above runs again for every replacement; a model in which that does
not give its own logits, bit for bit, is run whole each time.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from prunelens.analyses.refit import batches_for, first_equal
from prunelens.analyses.verdict import Recovery
from prunelens.config import Site
from prunelens.model import (
    LanguageModel,
    hidden_of,
    logits,
    replace_at_site,
    site_module,
    with_hidden,
)
from prunelens.perplexity import LOGITS_AT_ONCE, next_token_nll
from prunelens.sae.exchange.formats import GivenSae

log = logging.getLogger(__name__)

Where = tuple[LanguageModel, Site, int]
"""Model, site, layer."""

Rebuild = Callable[[Tensor], Tensor]
"""Activations, whose last dimension is d_model, to what takes their place."""


States = Callable[[Tensor, slice], Tensor]
"""The site's activations, and which windows they are of, to what is read in their place."""


class Place(NamedTuple):
    """A token set and what is put there."""

    members: Bool[Tensor, "windows context"]
    mean: Float[Tensor, " d_model"]
    """What the ablation puts in."""
    saes: dict[tuple[str, str], GivenSae]
    """By name and variant."""
    states: States | None = None
    """What the model and the SAEs read; None: the model's own activations."""


class Nats(NamedTuple):
    """-log p(next token), summed over each window's predictions at the positions of a set."""

    num_predictions: Float64[Tensor, " windows"]
    """How many are made there."""
    model: Float64[Tensor, " windows"]
    """The model with what it reads there."""
    mean_ablated: Float64[Tensor, " windows"]
    """With the mean there instead."""
    saes: dict[tuple[str, str], Float64[Tensor, " windows"]]
    """With an SAE's reconstruction of it, by name and variant."""

    def recovery(self, sae: str, variant: str, groups: Int[Tensor, " windows"]) -> Recovery:
        """Per group of documents."""
        return Recovery.by_group(self.model, self.mean_ablated, self.saes[sae, variant], groups)

    def followed_by(self, others: Nats) -> Nats:
        """These windows, then those."""
        return Nats(
            torch.cat([self.num_predictions, others.num_predictions]),
            torch.cat([self.model, others.model]),
            torch.cat([self.mean_ablated, others.mean_ablated]),
            {name: torch.cat([part, others.saes[name]]) for name, part in self.saes.items()},
        )


def cross_entropies(
    runs: Runs,
    windows: Int[Tensor, "windows context"],
    places: Sequence[Place],
    rows: slice,
    *,
    done: Callable[[int], None],
) -> list[Nats]:
    """Run a model as it is, mean-ablated, and with each SAE's reconstruction, for every place.

    Positions outside the set keep their activations. The model runs once, and from the site on
    once per place for the mean, and once per place and variant; equal ones share.

    Args:
        rows: the windows that are run, of those that the places tell of.
        done: told the number of windows of each run.
    """
    members = torch.stack([place.members for place in places])
    means = torch.stack([place.mean for place in places])
    asked = [
        _asked(place, first_equal(members, number), first_equal(means, number))
        for number, place in enumerate(places)
    ]
    replacements = [each for one in asked for each in one.values()]
    nll = _nll(runs, windows, rows, [each for each in replacements if each], members, done)
    found = []
    for place, one in zip(places, asked, strict=True):
        at = place.members[rows, :-1]
        sums = {
            name: torch.where(at, nll[each and each.key], 0.0).sum(1) for name, each in one.items()
        }
        found.append(Nats(at.sum(1).double(), sums.pop("model"), sums.pop("mean_ablated"), sums))
    return found


class _Replacement(NamedTuple):
    """What is put at the site, at the positions of one token set."""

    where: int
    """Number of the token set; of equal ones the first."""
    what: Hashable
    """Equal where the same is put in."""
    rebuild: Rebuild
    states: States | None = None

    @property
    def key(self) -> Hashable:
        """Equal where the same is put in at the same positions."""
        return self.where, self.what, self.states


def _asked(place: Place, where: int, mean: int) -> dict[Any, _Replacement | None]:
    """What one place asks for; None: the model as it is.

    Args: mean: the first place with the same mean; sets that are equal here may differ on the
        tokens that it was taken over.
    """
    own = place.states and _Replacement(where, "as it is", torch.clone, place.states)
    ablated = _Replacement(where, mean, _constant(place.mean))
    saes = {
        name: _Replacement(where, sae, _reconstruction(sae), place.states)
        for name, sae in place.saes.items()
    }
    return {"model": own, "mean_ablated": ablated, **saes}


def _constant(mean: Float[Tensor, " d_model"]) -> Rebuild:
    return lambda x: mean.to(x.device).expand_as(x)


def _reconstruction(sae: GivenSae) -> Rebuild:
    return lambda x: torch.cat([sae.rebuild(part).states for part in batches_for(sae, x)])


def _nll(
    runs: Runs,
    windows: Int[Tensor, "windows context"],
    wanted: slice,
    replacements: Sequence[_Replacement],
    members: Bool[Tensor, "sets windows context"],
    done: Callable[[int], None],
) -> dict[Hashable, Float64[Tensor, "wanted predictions"]]:
    """-log p(next token) at all positions but the last, by key; None: the model as it is."""
    asked = Counter(each.key for each in replacements)
    distinct = {each.key: each for each in replacements}
    found: dict[Hashable, list[Tensor]] = defaultdict(list)
    for rows in _batches(runs.lm, windows, wanted):
        tokens = windows[rows]
        found[None].append(next_token_nll(runs.whole(tokens), tokens).double().cpu())
        done(len(tokens))
        for key, each in distinct.items():
            scores = runs.replaced(_rebuilding(members[each.where, rows], each, rows))
            found[key].append(next_token_nll(scores, tokens).double().cpu())
            done(asked[key] * len(tokens))
    return {key: torch.cat(parts) for key, parts in found.items()}


def _batches(
    lm: LanguageModel, windows: Int[Tensor, "windows context"], wanted: slice
) -> Iterator[slice]:
    """Rows of so many windows that their logits fit."""
    limit = LOGITS_AT_ONCE.get(lm.device.type, 2**22)
    per_batch = max(1, limit // (windows.shape[1] * lm.vocabulary_size))
    for first in range(wanted.start, wanted.stop, per_batch):
        yield slice(first, min(first + per_batch, wanted.stop))


def _rebuilding(
    at: Bool[Tensor, "windows context"], replacement: _Replacement, rows: slice
) -> Rebuild:
    """New activations with those `at` some positions rebuilt; what is given stays as it is."""

    def rebuilt(x: Tensor) -> Tensor:
        here, states = at.to(x.device), replacement.states
        read, x = states(x, rows) if states else x, x.clone()
        if bool(here.any()):
            x[here] = replacement.rebuild(read[here]).to(x)
        return x

    return rebuilt


# --- restarting at the site ---------------------------------------------------------------------


class Runs:
    """A batch of windows, run as it is and then again and again from the site on.

    The Hugging Face model itself runs, so that masks, rotary angles, the last norm and the head
    stay its: only, the site's module answers with other activations without being run, and so do
    the blocks below the site's, with what the last of them gave.
    """

    def __init__(self, where: Where) -> None:
        self.lm, self._name, self._layer = where
        self._site = site_module(*where)
        self._below = list(self.lm.blocks[: self._layer])
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
            own = logits(self.lm, tokens)
        if self._restarts is None:
            self._restarts = self._gives(own)
            if not self._restarts:
                log.info("%s cannot be restarted at its site: every run is whole", self.lm.label)
        return own

    @torch.no_grad()
    def replaced(self, replace: Rebuild) -> Float[Tensor, "windows context vocabulary"]:
        """The batch's logits with `replace` (which gives new memory) of the site's activations."""
        if not self._restarts:
            return replace_at_site(self.lm, self._tokens, self._name, self._layer, replace)
        return self._rerun(replace)

    def _keep(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._calls[module] += 1
        if module is self._site or module is self._below[-1]:
            # A copy: what runs on may change it in place, as blocks with parallel sublayers do.
            self._kept[module] = with_hidden(output, hidden_of(output).clone())

    def _gives(self, own: Float[Tensor, "windows context vocabulary"]) -> bool:
        """Whether unchanged activations give the model's own logits, bit for bit.

        They need not where a module hands more to those above than its output; and where one is
        run twice, a change would have to be made twice.
        """
        once = all(self._calls[module] == 1 for module in (self._site, *self._below))
        return once and torch.equal(self._rerun(torch.clone), own)

    def _rerun(self, replace: Rebuild) -> Float[Tensor, "windows context vocabulary"]:
        output = self._kept[self._site]
        before = hidden_of(output)
        answers = {self._site: with_hidden(output, replace(before).to(before))}
        if self._below:
            entering = self._kept[self._below[-1]]
            entering = with_hidden(entering, hidden_of(entering).clone())
            answers |= dict.fromkeys(self._below, entering)
        with _answering(answers):
            return logits(self.lm, self._tokens)


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
