"""RQ3: can an SAE of the dense model still be used on a pruned one? (methods §7, §10)

It is tried on three sets of positions (an attention sink at the first one dominates any sum of
squares), as it is, with its decoder bias refitted, and for JumpReLU with its thresholds refitted.
Whatever the model, the token sets are those of the dense one, and what is compared is compared on
the same windows. On `norm_filtered` the null is tried as well: what noise of equal size does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from prunelens.analyses.dense_reference import DenseReference
from prunelens.analyses.null_states import NullSource
from prunelens.analyses.positions import FILTERED, POSITIONS, norm_limit, token_norms
from prunelens.analyses.readings import OWN, Evaluation, Fit, Reading, evaluate, fit, site_states
from prunelens.analyses.recovered import Nats, Place, Runs, cross_entropies
from prunelens.analyses.statistics import Estimate
from prunelens.analyses.verdict import (
    CE_MARGIN,
    LIMITS,
    TRANSFER_RULE,
    Recovery,
    transfer_verdicts,
)
from prunelens.config import Site
from prunelens.model import LanguageModel
from prunelens.sae.exchange.formats import GivenSae, check_fits, check_l0
from prunelens.spread import document_groups, spread_over_documents

__all__ = [
    "POSITIONS",
    "TRANSFER_RULE",
    "DenseReference",
    "Transfer",
    "transfer",
    "transfer_verdicts",
]

FIRST_WINDOWS = 32  # of a pruned model's cross-entropy; an interval of fewer looks narrow by luck
SEED = 0  # of the order of windows


class Transfer(NamedTuple):
    """Several SAEs on one model."""

    rows: pd.DataFrame
    """One row per SAE, position set, source and refit."""
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
    documents: Int[Tensor, " windows"],
    *,
    site: Site,
    layer: int,
    dense: DenseReference | None,
    ce_windows: int,
    max_norm_multiple: float | None = 10.0,
    sigma: Float[Tensor, " d_model"] | None = None,
    null: NullSource | None = None,
    progress: Callable[[float], None] | None = None,
) -> Transfer:
    """Measure SAEs on one model; first on the dense one, then on each pruned one.

    Cross-entropy is measured on windows drawn evenly over documents: of the dense model on
    `ce_windows`; of a pruned one on the first 32, 64, … of the same, until the interval of
    every SAE's `ce_drop` (as it is, norm-filtered) reaches less than the verdict's margin to
    either side. On which side it lies does not count: an interval that is looked at until it says
    something says too much. In windows through the blocks above the site, each costs 1 and, for
    each of the three sets that differ, 1 + 2 per SAE (3 with thresholds); the null, 1 + 2 per SAE.

    Args:
        saes: with distinct names; they share the model's forward passes.
        windows_eval: what errors, L0 and cross-entropy are measured on.
        windows_refit: what biases, thresholds and the ablated mean are fitted on.
        documents: the number of the document that each eval window is of.
        dense: None: `lm` is the dense model, and each SAE's L0 is checked against its nominal
            one; else what the call for the dense model returned.
        ce_windows: cross-entropy is measured on so many of the eval windows at most.
        max_norm_multiple: `norm_filtered` leaves out the first position and tokens whose dense
            norm exceeds this multiple of the dense median (over windows_refit without the first
            position); None: only the first position. Used with the dense model.
        sigma: deviation of the dense activations; None: that of `norm_filtered` on windows_refit.
            Used with the dense model.
        null: what the pruned model's null is made of; None: there is none.
        progress: told the share that is done, 0 to 1.
    Returns: rows with the columns of `transfer.csv`, verdict still empty (`transfer_verdicts`). An
        interval has _error, _df, _least and _most (see Estimate), too; and there are
        threshold_factor, nominal_l0, num_tokens.
    Raises: UserError where an SAE does not fit the site, its dense L0 is not the nominal one, or
        activations are not finite.
    """
    for sae in saes:
        check_fits(sae, lm.label, d_model=lm.d_model, site=site, layer=layer)
    assert len({sae.name for sae in saes}) == len(saes)
    where = (lm, site, layer)
    num_ce, num_sets = min(ce_windows, len(windows_eval)), len(POSITIONS) + (null is not None)
    done = _Progress(saes, len(windows_eval) + len(windows_refit), num_ce, num_sets, progress)
    states = torch.cat([part.cpu() for part in site_states(where, windows_refit, done.add)])
    norms = token_norms(states) if dense is None else dense.refit_norms
    assert norms.shape == windows_refit.shape
    limit = norm_limit(norms, max_norm_multiple) if dense is None else dense.norm_limit
    readings = [OWN]
    if null is not None:
        assert dense is not None
        filtered = Reading("null", [FILTERED])
        at = [filtered.members(part, limit)[0] for part in (norms, dense.eval_norms)]
        readings.append(Reading("null", [FILTERED], *null.states(*at)))
    fits = [
        fit(reading, saes, states, reading.members(norms, limit), _dense_l0(dense, reading))
        for reading in readings
    ]
    del states
    notes: list[str] = []
    if dense is None:  # before the long part; without sinks, as makers of SAEs measure L0
        notes = [check_l0(sae, fits[0].refitted[sae.name][FILTERED].l0) for sae in saes]
    sums, eval_norms = evaluate(
        where,
        windows_eval,
        document_groups(documents),
        readings,
        fits,
        norms=None if dense is None else dense.eval_norms,
        limit=limit,
        done=done.add,
    )
    sets = [
        _ReadSet(*each, index)
        for each in zip(readings, fits, sums, strict=True)
        for index in range(len(each[0].sets))
    ]
    drawn = spread_over_documents(documents, seed=SEED)[:ce_windows]
    means = fits[0].mean  # of the null as well, of whose remainders it is the expectation
    places = [each.place(eval_norms[drawn], limit, drawn, means) for each in sets]
    nats: list[Nats] = []
    runs, groups = Runs(where), drawn[:0]
    for first, end in itertools.pairwise([0, *_sizes(len(drawn), doubling=dense is not None)]):
        rows = slice(first, end)
        more = cross_entropies(runs, windows_eval[drawn], places, rows, done=done.add)
        nats = [one.followed_by(two) for one, two in zip(nats, more, strict=True)] if nats else more
        groups = document_groups(documents[drawn[:end]])
        if dense is not None and _is_narrow(saes, nats[FILTERED], dense, groups):
            break
    done.end()
    if dense is None:
        spread = fits[0].sigma if sigma is None else sigma.double().cpu()
        dense = _reference(saes, fits[0], sums[0], nats, (eval_norms, norms, limit, spread))
    counts = {
        "num_windows": len(groups),
        "num_documents": len(documents[drawn[: len(groups)]].unique()),
    }
    table = [
        row | counts
        for each, part in zip(sets, nats, strict=True)
        for sae in saes
        for row in each.rows(sae, part, dense, groups)
    ]
    return Transfer(pd.DataFrame(table), dense, tuple(note for note in notes if note))


class _ReadSet(NamedTuple):
    """One position set of what is read."""

    reading: Reading
    fit: Fit
    sums: Evaluation
    place_in_reading: int
    """Among its sets."""

    @property
    def number(self) -> int:
        """In POSITIONS."""
        return self.reading.sets[self.place_in_reading]

    def place(
        self,
        norms: Float[Tensor, "ce_windows context"],
        limit: float,
        windows: Int[Tensor, " ce_windows"],
        means: Float64[Tensor, "positions d_model"],
    ) -> Place:
        """Where cross-entropy is asked about, on the windows of these numbers."""
        saes = {
            (sae, name): variant
            for sae, sets in self.fit.refitted.items()
            for name, variant in sets[self.place_in_reading].variants.items()
        }
        members = self.reading.members(norms, limit)[self.place_in_reading]
        place = Place(members, means[self.number], saes)
        if null := self.reading.eval_null:
            place = place._replace(states=lambda x, rows: null.of(x, windows[rows]))
        return place

    def rows(
        self, sae: GivenSae, nats: Nats, dense: DenseReference, groups: Int[Tensor, " ce_windows"]
    ) -> Iterator[dict[str, Any]]:
        """One SAE's rows."""
        precision = dense.sigma.square().reciprocal()
        variance = self.sums.variance()[:, self.place_in_reading]
        for name, variant in self.fit.refitted[sae.name][self.place_in_reading].variants.items():
            error = self.sums.error(variant)[:, self.place_in_reading]
            recovery = nats.recovery(sae.name, name, groups)
            estimates = dense.estimates(
                sae.name, self.number, error.sum(-1), variance.sum(-1), recovery, groups
            )
            whole = Recovery(*(part.sum(keepdims=True) for part in recovery))
            count = float(nats.num_predictions.sum())
            model, mean_ablated, with_sae = (_ratio(part[0], count) for part in whole)
            yield {
                "sae": sae.name,
                "positions": POSITIONS[self.number],
                "source": self.reading.source,
                "refit": name,
                "fvu": _ratio((precision * error).sum(), (precision * variance).sum()),
                "fvu_raw": _ratio(error.sum(), variance.sum()),
                "fvu_dense_var": _ratio(error.sum(), dense.variance[self.number].sum()),
                "l0": float(self.sums.l0(variant)[self.place_in_reading]),
                "ce_recovered": float(recovery.shares()[0]),
                "ce_model": model,
                "ce_mean_ablated": mean_ablated,
                "ce_sae": with_sae,
                **{k: v for name, e in estimates.items() for k, v in e.columns(name).items()},
                "threshold_factor": math.nan if sae.threshold is None else variant.threshold_scale,
                "nominal_l0": sae.nominal_l0,
                "num_tokens": int(self.sums.num_tokens[self.place_in_reading]),
                "verdict": "",
                "reason": "; ".join(_reasons(count, recovery, estimates)),
            }


def _dense_l0(dense: DenseReference | None, reading: Reading) -> dict[str, list[float]] | None:
    if dense is None:
        return None
    return dict(zip(dense.saes, dense.refit_l0[:, reading.sets].tolist(), strict=True))


def _sizes(num_windows: int, *, doubling: bool) -> list[int]:
    """After how many windows it is asked whether they are enough."""
    sizes = (FIRST_WINDOWS * 2**n for n in range(64 if doubling else 0))
    return [*itertools.takewhile(lambda size: size < num_windows, sizes), num_windows]


def _is_narrow(
    saes: Sequence[GivenSae], nats: Nats, dense: DenseReference, groups: Int[Tensor, " windows"]
) -> bool:
    """Whether every SAE's `ce_drop` is known well enough, or nothing differs."""
    drops = [
        dense.drop(sae.name, FILTERED, nats.recovery(sae.name, "none", groups), groups)
        for sae in saes
    ]
    return all(drop.value == 0 or (drop.high - drop.low) / 2 < CE_MARGIN for drop in drops)


def _reference(
    saes: Sequence[GivenSae],
    fitted: Fit,
    sums: Evaluation,
    nats: Sequence[Nats],
    scales: tuple[Tensor, Tensor, float, Tensor],
) -> DenseReference:
    """Of what was measured on the dense model. `scales`: the reference's first four fields."""
    l0 = [[refitted.l0 for refitted in fitted.refitted[sae.name]] for sae in saes]
    nats_sae = [[part.saes[sae.name, "none"] for part in nats] for sae in saes]
    return DenseReference(
        *scales,
        saes=tuple(sae.name for sae in saes),
        refit_l0=torch.tensor(l0, dtype=torch.float64),
        error=torch.stack([sums.error(sae).sum(-1).T for sae in saes]),
        variance=sums.variance().sum(-1).T,
        nats_model=torch.stack([part.model for part in nats]),
        nats_mean_ablated=torch.stack([part.mean_ablated for part in nats]),
        nats_sae=torch.stack([torch.stack(parts) for parts in nats_sae]),
    )


def _reasons(count: float, recovery: Recovery, estimates: dict[str, Estimate]) -> Iterator[str]:
    """Why numbers are NaN or have no interval."""
    if not count:
        yield "ce_recovered: no prediction is made at these positions"
    elif math.isnan(recovery.shares()[0]):
        yield "ce_recovered: mean ablation does not raise the cross-entropy"
    for name, estimate in estimates.items():
        if math.isnan(estimate.error) and estimate.value != LIMITS[name].unchanged:
            yield f"{name}: {estimate.resampled}"


class _Progress:
    """Windows run so far, of all that may be; what is shared counts as run."""

    def __init__(
        self,
        saes: Sequence[GivenSae],
        num_windows: int,
        num_ce: int,
        num_sets: int,
        report: Callable[[float], None] | None,
    ) -> None:
        variants = sum(2 + (sae.threshold is not None) for sae in saes)
        self._total = num_windows + num_ce * (1 + num_sets * (2 + variants))
        self._done, self._report = 0, report

    def add(self, num_windows: int) -> None:
        self._done += num_windows
        if self._report:
            self._report(min(1.0, self._done / self._total))

    def end(self) -> None:
        """No more windows are needed."""
        self.add(self._total)


def _ratio(above: Tensor | float, below: Tensor | float) -> float:
    return float(above) / float(below) if float(below) > 0 else math.nan
