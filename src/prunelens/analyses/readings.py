"""What SAEs make of a model's activations, or of what stands in their place, in one pass (RQ3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from prunelens.analyses.null_states import NullStates
from prunelens.analyses.positions import FILTERED, POSITIONS, members_of, token_norms
from prunelens.analyses.recovered import Where
from prunelens.analyses.refit import Errors, Moments, Refitted, refit
from prunelens.errors import UserError
from prunelens.model import forward_tokens, run_to_site
from prunelens.sae.exchange.formats import GivenSae


class Reading(NamedTuple):
    """What the SAEs read: the model's own activations, or the null's on norm_filtered alone."""

    source: str
    """pruned or null, as in tables."""
    sets: list[int]
    """Numbers in POSITIONS."""
    refit_null: NullStates | None = None
    """Of the windows for refitting; None: the model's own."""
    eval_null: NullStates | None = None
    """Of the eval windows."""

    def members(
        self, norms: Float[Tensor, "windows context"], limit: float
    ) -> Bool[Tensor, "sets windows context"]:
        """Which tokens are in which of the sets, by their norms in the dense model."""
        return members_of(norms, limit)[self.sets].unflatten(1, norms.shape)


OWN = Reading("pruned", list(range(len(POSITIONS))))


class Fit(NamedTuple):
    """What the windows for refitting gave."""

    mean: Float64[Tensor, "sets d_model"]
    """Mean activation of each set."""
    sigma: Float64[Tensor, " d_model"]
    """Deviation of `norm_filtered`; 1 where a dimension never varies."""
    refitted: dict[str, list[Refitted]]
    """Per SAE, per set."""


def fit(
    reading: Reading,
    saes: Sequence[GivenSae],
    states: Float[Tensor, "windows context d_model"],
    members: Bool[Tensor, "sets windows context"],
    dense_l0: dict[str, list[float]] | None,
) -> Fit:
    """Refit SAEs on what is read.

    Args:
        states: the model's own, of the windows for refitting.
        dense_l0: by SAE and set, as `refit` wants it.
    """
    if reading.refit_null:
        states = reading.refit_null.of(states, torch.arange(len(states)))
    states, members = states.flatten(0, 1), members.flatten(1)
    moments = Moments(len(members), states.shape[1], torch.device("cpu"))
    centre = states[:2048].double().mean(0)  # near the mean, so that no digits are lost
    for x, member in zip(states.split(2048), members.split(2048, 1), strict=True):
        moments.add(x.double() - centre, member)
    filtered = reading.sets.index(FILTERED)
    sigma = (moments.around(moments.mean)[filtered] / moments.count[filtered]).sqrt()
    refitted = {
        sae.name: refit(
            sae, states, members, dense_l0=None if dense_l0 is None else dense_l0[sae.name]
        )
        for sae in saes
    }
    return Fit(moments.mean + centre, torch.where(sigma > 0, sigma, 1.0), refitted)


class Evaluation:
    """Sums over the eval tokens of each set, by group of documents."""

    def __init__(self, reading: Reading, fitted: Fit, num_groups: int) -> None:
        self._reading, self._fit = reading, fitted
        self._shape = (num_groups, len(reading.sets))
        d_model = fitted.mean.shape[1]
        self._moments = Moments(num_groups * len(reading.sets), d_model, torch.device("cpu"))
        self._errors: dict[tuple[str, float], Errors] = {}

    def add(
        self,
        states: Float[Tensor, "batch context d_model"],
        members: Bool[Tensor, "sets batch context"],
        windows: Int[Tensor, " batch"],
        group: int,
    ) -> None:
        """Add the model's own activations of windows of one group, or what stands for them.

        A shifted decoder bias needs no pass of its own: its error follows from the moments of the
        unshifted one.
        """
        if self._reading.eval_null:
            states = self._reading.eval_null.of(states, windows)
        x, members, first = states.flatten(0, 1), members.flatten(1), group * self._shape[1]
        self._moments.add(x.double().cpu() - self._fit.mean[-1], members, first=first)
        for name, sets in self._fit.refitted.items():
            used = {v.threshold_scale: v for found in sets for v in found.variants.values()}
            for scale, sae in used.items():
                key = (name, scale)
                if key not in self._errors:
                    self._errors[key] = Errors(len(self._moments.count), sae)
                self._errors[key].add(sae, x, members, first=first)

    @property
    def num_tokens(self) -> Float64[Tensor, " sets"]:
        """Tokens of each set."""
        return self._moments.count.view(self._shape).sum(0)

    def variance(self) -> Float64[Tensor, "groups sets d_model"]:
        """Sum over tokens of (x - mean of the set's tokens)^2."""
        total = self._moments.total.unflatten(0, self._shape).sum(0)
        mean = total / self.num_tokens[:, None]
        around = self._moments.around(mean.repeat(self._shape[0], 1))
        return around.unflatten(0, self._shape)

    def error(self, variant: GivenSae) -> Float64[Tensor, "groups sets d_model"]:
        """Sum over tokens of (x - x_rec)^2."""
        errors = self._errors[variant.name, variant.threshold_scale]
        shift = variant.decoder_shift
        if shift is None:
            shift = errors.moments.total.new_zeros(variant.d_model)
        around = errors.moments.around(shift)
        return around.unflatten(0, self._shape).cpu()

    def l0(self, variant: GivenSae) -> Float64[Tensor, " sets"]:
        """Mean number of active latents per token."""
        active = self._errors[variant.name, variant.threshold_scale].active
        return active.view(self._shape).sum(0).cpu() / self.num_tokens


def evaluate(
    where: Where,
    windows: Int[Tensor, "windows context"],
    groups: Int[Tensor, " windows"],
    readings: Sequence[Reading],
    fits: Sequence[Fit],
    *,
    norms: Float[Tensor, "windows context"] | None,
    limit: float,
    done: Callable[[int], None],
) -> tuple[list[Evaluation], Float[Tensor, "windows context"]]:
    """One pass over the eval windows for all readings, SAEs, sets and refits.

    Args: norms: of the tokens in the dense model; None: this is it.
    Returns: the sums of each reading; the norms.
    """
    num_groups = int(groups.max()) + 1
    found = [Evaluation(*pair, num_groups) for pair in zip(readings, fits, strict=True)]
    seen = torch.empty(windows.shape) if norms is None else norms
    for group in range(num_groups):
        rows = (groups == group).nonzero().squeeze(1)
        for states in site_states(where, windows[rows], done):
            batch, rows = rows[: len(states)], rows[len(states) :]
            if norms is None:
                seen[batch] = token_norms(states)
            for reading, sums in zip(readings, found, strict=True):
                sums.add(states, reading.members(seen[batch], limit), batch, group)
    return found, seen


def site_states(
    where: Where, windows: Int[Tensor, "windows context"], done: Callable[[int], None]
) -> Iterator[Float[Tensor, "batch context d_model"]]:
    """The site's activations, batch by batch. Raises: UserError where one is not finite."""
    lm, site, layer = where
    per_batch = max(1, forward_tokens(lm.device.type) // windows.shape[1])
    for batch in windows.split(per_batch):
        states = run_to_site(lm, batch, site, layer)
        if not bool(states.isfinite().all()):
            dtype = str(lm.model.dtype).removeprefix("torch.")
            raise UserError(
                f"activations: {lm.label} layer {layer} in {dtype} gives NaN or infinity; set"
                " models.dtype to bfloat16 or float32"
            )
        yield states
        done(len(batch))
