"""RQ3: can an SAE of the dense model still be used on a pruned one? (methods §7)

It is tried on three sets of positions (an attention sink at the first one dominates any sum of
squares), as it is, with its decoder bias refitted, and for JumpReLU with its thresholds refitted.
Whatever the model, the token sets are those of the dense one.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunelens.analyses.positions import POSITIONS, members_of, norm_limit, token_norms
from prunelens.analyses.recovered import CrossEntropies, Mended, cross_entropies
from prunelens.analyses.refit import Errors, Moments, Refitted, refit
from prunelens.analyses.verdict import TRANSFER_RULE, transfer_verdicts
from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.model import LanguageModel, forward_tokens, run_to_site
from prunelens.sae.formats import GivenSae, check_fits, check_l0

__all__ = [
    "POSITIONS",
    "TRANSFER_RULE",
    "DenseReference",
    "Transfer",
    "transfer",
    "transfer_verdicts",
]


class DenseReference(NamedTuple):
    """What the dense model fixes for all conditions: token sets, scales, the L0 to return to."""

    eval_norms: Float[Tensor, "windows context"]
    """|x| of every token of the evaluation windows."""
    refit_norms: Float[Tensor, "refit_windows context"]
    """The same of the windows for refitting."""
    norm_limit: float
    """Tokens above it are left out of `norm_filtered`; infinity: none is."""
    sigma: Float[Tensor, " d_model"]
    """Deviation per dimension, float64, by which `fvu` divides errors and variances."""
    variance: tuple[float, ...]
    """Per position set: sum over its eval tokens of |x - mean|^2, raw."""
    refit_l0: dict[str, tuple[float, ...]]
    """Per SAE and position set: L0 on the windows for refitting."""

    def save(self, path: pathlib.Path) -> None:
        """Write it as one safetensors file."""
        tensors = {name: part.contiguous() for name, part in self._asdict().items() if _is(part)}
        rest = {name: part for name, part in self._asdict().items() if not _is(part)}
        save_file(tensors, path, metadata={"numbers": json.dumps(rest)})

    @classmethod
    def load(cls, path: pathlib.Path) -> DenseReference:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers["variance"] = tuple(numbers["variance"])
        numbers["refit_l0"] = {name: tuple(l0) for name, l0 in numbers["refit_l0"].items()}
        return cls(**tensors, **numbers)


class Transfer(NamedTuple):
    """Several SAEs on one model."""

    rows: pd.DataFrame
    """One row per SAE, position set and refit."""
    reference: DenseReference
    """Made from the dense model, handed on for the pruned ones."""
    notes: tuple[str, ...]
    """What could not be checked; dense model only."""


@torch.no_grad()
def transfer(
    lm: LanguageModel,
    saes: Sequence[GivenSae],
    windows_eval: Int[Tensor, "windows context"],
    windows_refit: Int[Tensor, "refit_windows context"],
    *,
    site: Site,
    layer: int,
    dense: DenseReference | None,
    ce_windows: int,
    max_norm_multiple: float | None = 10.0,
    sigma: Float[Tensor, " d_model"] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Transfer:
    """Measure SAEs on one model; first on the dense one, then on each pruned one.

    Args:
        saes: with distinct names; they share the model's forward passes.
        windows_eval: what errors, L0 and cross-entropy are measured on.
        windows_refit: what biases, thresholds and the ablated mean are fitted on.
        dense: None: `lm` is the dense model, and each SAE's L0 is checked against its nominal
            one; else what the call for the dense model returned.
        ce_windows: cross-entropy is measured on so many of the first eval windows.
        max_norm_multiple: `norm_filtered` leaves out the first position and tokens whose dense
            norm exceeds this multiple of the dense median (over windows_refit without the first
            position); None: only the first position. Used with the dense model.
        sigma: deviation of the dense activations; None: that of `norm_filtered` on windows_refit.
            Used with the dense model.
        progress: told the share that is done, 0 to 1.
    Returns: rows with sae, positions (all, without_first, norm_filtered), refit (none, b_dec,
        threshold), fvu (errors and variance both divided by the dense sigma), fvu_raw,
        fvu_dense_var (raw error / dense raw variance), l0, ce_recovered, ce_model,
        ce_mean_ablated, ce_sae (nats per prediction made at a position of the set, where that
        set alone is replaced), threshold_factor, nominal_l0, num_tokens, verdict (empty; see
        `transfer_verdicts`), reason (why a number is NaN).
    Raises: UserError where an SAE does not fit the site, its dense L0 is not the nominal one, or
        activations are not finite.
    """
    for sae in saes:
        check_fits(sae, lm.label, d_model=lm.d_model, site=site, layer=layer)
    assert len({sae.name for sae in saes}) == len(saes)
    done = _Progress(saes, windows_eval, windows_refit, ce_windows, progress)
    where = (lm, site, layer)
    states = torch.cat([part.cpu() for part in _states(*where, windows_refit, done)])
    norms = token_norms(states) if dense is None else dense.refit_norms
    assert norms.shape == windows_refit.shape
    limit = norm_limit(norms, max_norm_multiple) if dense is None else dense.norm_limit
    fit = _fit(saes, states.flatten(0, 1), members_of(norms, limit), dense)
    del states
    notes: list[str] = []
    if dense is None:  # before the long part; without sinks, as makers of SAEs measure L0
        notes = [check_l0(sae, fit.refitted[sae.name][-1].l0) for sae in saes]
    found = _evaluate(
        where,
        windows_eval,
        fit,
        norms=None if dense is None else dense.eval_norms,
        limit=limit,
        done=done,
    )
    if dense is None:
        l0 = {name: tuple(r.l0 for r in sets) for name, sets in fit.refitted.items()}
        spread = fit.sigma if sigma is None else sigma.double().cpu()
        variance = tuple(found.variance.sum(1).tolist())
        dense = DenseReference(found.norms, norms, limit, spread, variance, l0)
    ce = cross_entropies(
        where,
        windows_eval[:ce_windows],
        members_of(found.norms, limit).unflatten(1, found.norms.shape)[:, :ce_windows],
        fit.mean,
        [Mended(sae, [r.variants for r in fit.refitted[sae.name]]) for sae in saes],
        done=done.add,
    )
    rows = [row for sae in saes for row in _rows(sae, fit, found, dense, ce)]
    return Transfer(pd.DataFrame(rows), dense, tuple(note for note in notes if note))


class _Fit(NamedTuple):
    """What the windows for refitting gave."""

    mean: Float64[Tensor, "sets d_model"]
    """Mean activation of each set, under the model at hand."""
    sigma: Float64[Tensor, " d_model"]
    """Deviation of `norm_filtered`; 1 where a dimension never varies."""
    refitted: dict[str, list[Refitted]]
    """Per SAE, per set."""


class _Evaluation(NamedTuple):
    """What the eval windows gave."""

    norms: Float[Tensor, "windows context"]
    num_tokens: list[int]
    variance: Float64[Tensor, "sets d_model"]
    """Sum over tokens of (x - mean)^2."""
    errors: dict[tuple[str, float], Errors]
    """By SAE and factor on its thresholds, decoder biases not shifted."""


def _fit(
    saes: Sequence[GivenSae], states: Tensor, members: Tensor, dense: DenseReference | None
) -> _Fit:
    moments = Moments(len(members), states.shape[1], torch.device("cpu"))
    centre = states[:2048].double().mean(0)  # near the mean, so that no digits are lost
    for x, member in zip(states.split(2048), members.split(2048, 1), strict=True):
        moments.add(x.double() - centre, member)
    filtered = POSITIONS.index("norm_filtered")
    sigma = (moments.around(moments.mean)[filtered] / moments.count[filtered]).sqrt()
    refitted = {
        sae.name: refit(
            sae, states, members, dense_l0=None if dense is None else dense.refit_l0[sae.name]
        )
        for sae in saes
    }
    return _Fit(moments.mean + centre, torch.where(sigma > 0, sigma, 1.0), refitted)


def _evaluate(
    where: tuple[LanguageModel, Site, int],
    windows: Tensor,
    fit: _Fit,
    *,
    norms: Tensor | None,
    limit: float,
    done: _Progress,
) -> _Evaluation:
    """One pass over the eval windows for all SAEs, sets and refits.

    A shifted decoder bias needs no pass of its own: its error follows from the moments of the
    unshifted one.
    """
    moments = Moments(len(POSITIONS), fit.mean.shape[1], torch.device("cpu"))
    errors: dict[tuple[str, float], Errors] = {}
    seen: list[Tensor] = []
    first = 0
    for states in _states(*where, windows, done):
        seen.append(token_norms(states) if norms is None else norms[first : first + len(states)])
        first += len(states)
        members, x = members_of(seen[-1], limit), states.flatten(0, 1)
        moments.add(x.double().cpu() - fit.mean[-1], members)
        for name, sets in fit.refitted.items():
            used = {v.threshold_scale: v for found in sets for v in found.variants.values()}
            for scale, sae in used.items():
                sums = errors.setdefault((name, scale), Errors(len(POSITIONS), sae))
                sums.add(sae, x, members)
    counts = [int(count) for count in moments.count]
    return _Evaluation(torch.cat(seen), counts, moments.around(moments.mean), errors)


def _rows(
    sae: GivenSae, fit: _Fit, found: _Evaluation, dense: DenseReference, ce: CrossEntropies
) -> Iterator[dict[str, Any]]:
    """One SAE's rows."""
    precision = dense.sigma.square().reciprocal()
    for number, positions in enumerate(POSITIONS):
        variance = found.variance[number]
        for name, variant in fit.refitted[sae.name][number].variants.items():
            sums = found.errors[sae.name, variant.threshold_scale]
            shift = variant.decoder_shift
            centre = torch.zeros(()) if shift is None else shift
            error = sums.moments.around(centre)[number].cpu()
            entropy = ce.of(sae.name, number, name)
            yield {
                "sae": sae.name,
                "positions": positions,
                "refit": name,
                "fvu": _ratio((precision * error).sum(), (precision * variance).sum()),
                "fvu_raw": _ratio(error.sum(), variance.sum()),
                "fvu_dense_var": _ratio(error.sum(), dense.variance[number]),
                "l0": float(sums.l0[number]),
                "ce_recovered": entropy.recovered,
                "ce_model": entropy.model,
                "ce_mean_ablated": entropy.mean_ablated,
                "ce_sae": entropy.sae,
                "threshold_factor": (
                    math.nan if sae.threshold is None else variant.threshold_scale
                ),
                "nominal_l0": sae.nominal_l0,
                "num_tokens": found.num_tokens[number],
                "verdict": "",
                "reason": entropy.reason,
            }


# --- tokens -------------------------------------------------------------------------------------


class _Progress:
    """Windows run so far, of all that will be; what is shared counts as run."""

    def __init__(
        self,
        saes: Sequence[GivenSae],
        windows_eval: Tensor,
        windows_refit: Tensor,
        ce_windows: int,
        report: Callable[[float], None] | None,
    ) -> None:
        replaced = 1 + sum(2 + (sae.threshold is not None) for sae in saes)
        passes = 1 + len(POSITIONS) * replaced
        num_ce = min(ce_windows, len(windows_eval))
        self._total = len(windows_eval) + len(windows_refit) + passes * num_ce
        self._done, self._report = 0, report

    def add(self, num_windows: int) -> None:
        self._done += num_windows
        if self._report:
            self._report(min(1.0, self._done / self._total))


def _states(
    lm: LanguageModel, site: Site, layer: int, windows: Tensor, done: _Progress
) -> Iterator[Float[Tensor, "batch context d_model"]]:
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
        done.add(len(batch))


def _ratio(error: Tensor, variance: Tensor | float) -> float:
    return float(error) / float(variance) if float(variance) > 0 else math.nan


def _is(part: object) -> bool:
    return isinstance(part, Tensor)
