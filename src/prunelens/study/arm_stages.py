"""Stages that compare pairs of SAEs, arm by arm (RQ2): by direction, by activation, by span.

Which pairs make an arm is `analyses.survival`'s affair.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import pandas as pd
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.activation_matching import (
    ActivationComparison,
    LatentSeries,
    activation_matching,
    latent_series,
)
from prunelens.analyses.noise import NullRows, Rows
from prunelens.analyses.subspace import subspace_overlaps
from prunelens.analyses.survival import (
    COORDINATES,
    Comparison,
    Dictionary,
    StartedT,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)
from prunelens.sae.topk import TopKSAE
from prunelens.study.cost import Asked, Cost
from prunelens.study.kind import StageKind
from prunelens.study.parents import Sae, Training
from prunelens.study.question_stages import load_common_change, paired_activations, second_half
from prunelens.study.work import Work

CONDITIONS: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")
NULL_ARMS = ("shared_init", "cross_init")  # every pair is matched once more: the plain SAEs alone


class _Compared(NamedTuple):
    """One SAE among the parents."""

    condition: Literal["dense", "pruned"]
    which: Sae
    folder: pathlib.Path
    untrained: bool = False

    @property
    def init_seed(self) -> int:
        """Of the SAE."""
        return self.which.init_seed

    def sae(self) -> TopKSAE:
        """As it was trained, or as it was at step 0."""
        sae = TopKSAE.load(self.folder)
        if not self.untrained:
            return sae
        return TopKSAE.initialise(sae.d_model, sae.num_latents, sae.k, init_seed=self.init_seed)

    def statistics(self) -> Statistics:
        """The normalisation that it was trained under."""
        return Statistics.load(self.folder / "normalisation.safetensors")


class _Reading(NamedTuple):
    """What one SAE makes of its activations."""

    by: _Compared
    series: LatentSeries

    @property
    def init_seed(self) -> int:
        """Of the SAE."""
        return self.by.which.init_seed

    @property
    def data_seed(self) -> int:
        """Of the SAE."""
        return self.by.which.data_seed


class _Renormalised(NamedTuple):
    """Rows that were normalised with some statistics, as others would have normalised them."""

    given: Rows
    before: Statistics
    after: Statistics

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Rows in the order of `index`."""
        rows = self.given.rows(index)
        scale = self.before.sigma / self.after.sigma
        shift = (self.before.mean - self.after.mean) / self.after.sigma
        return rows.mul_(scale.to(rows)).add_(shift.to(rows))


def _survival(work: Work) -> None:
    result = survival(_arms(work, _dictionary), work.config["taus"])
    result.rates.to_parquet(work.out / "survival.parquet")
    result.latents.to_parquet(work.out / "latents.parquet")


def _corrected(work: Work) -> None:
    tables = [
        pd.read_parquet(work.parents[role] / "survival.parquet")
        for role in ("survival", "controls")
    ]
    corrected_survival(*tables).to_parquet(work.out / "corrected.parquet")


def _subspace(work: Work) -> None:
    latents = subspace_overlaps(_arms(work, _dictionary))
    latents.to_parquet(work.out / "latents.parquet")
    seeds = ["init_a", "order_a", "init_b", "order_b"]
    means = latents.groupby(["arm", *seeds], sort=False)["overlap"].mean().reset_index()
    means.to_parquet(work.out / "subspace.parquet")


def _activation_matching(work: Work) -> None:
    """Over the tokens that persistence is measured on, and with its draw of the null."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    tokens = second_half(work, kept)
    num_saes = len(work.saes("dense")) + len(work.saes("pruned"))
    done = iter(range(2 * num_saes))

    def series(which: _Compared, rows: Rows) -> LatentSeries:
        found = latent_series(which.sae().to(work.device), rows, tokens)
        work.progress(min(1.0, (next(done) + 1) / (2 * num_saes)))
        return found

    def read(which: _Compared) -> _Reading:
        path = work.parents[which.condition] / "eval.safetensors"
        statistics = which.statistics()
        rows = Activations(path, kept=kept, statistics=statistics, device=work.device)
        return _Reading(which, series(which, rows))

    @functools.cache  # several dense SAEs are compared with it
    def read_null(which: _Compared) -> LatentSeries:
        dense, pruned, *_ = paired_activations(work)
        null = NullRows(dense, pruned, load_common_change(work), tokens)
        before = Statistics(dense.mean, dense.sigma)
        after = Statistics(*(part.to(work.device) for part in which.statistics()))
        return series(which, _Renormalised(null, before, after))

    comparisons = _with_series(_arms(work, read), read_null if "pruned" in work.parents else None)
    found = activation_matching(comparisons, work.config["taus"])
    found.rates.to_parquet(work.out / "rates.parquet")
    found.latents.to_parquet(work.out / "latents.parquet")


def _with_series(
    comparisons: list[Comparison[_Reading]], null: Callable[[_Compared], LatentSeries] | None
) -> Iterator[ActivationComparison]:
    """Every comparison, and where there is a null those of NULL_ARMS with it in B's place."""
    for arm, a, b in ((each.arm, each.a, each.b) for each in comparisons):
        seeds = (a.init_seed, a.data_seed, b.init_seed, b.data_seed)
        yield ActivationComparison(arm, b.by.condition, *seeds, a.series, b.series)
        if null and arm in NULL_ARMS:
            yield ActivationComparison(arm, "null", *seeds, a.series, null(b.by))


def _dictionary(which: _Compared) -> Dictionary:
    decoder = which.sae().decoder_weight.detach()
    sae = which.which
    return Dictionary(decoder, which.statistics().sigma, sae.init_seed, sae.data_seed)


def _arms(work: Work, load: Callable[[_Compared], StartedT]) -> list[Comparison[StartedT]]:
    """The arms of a run, pruned or dense, from the SAEs among the parents."""
    dense, pruned = (
        [_Compared(condition, sae, folder) for sae, folder in work.saes(condition).items()]
        for condition in CONDITIONS
    )
    plain = _plain(dense)
    if pruned:
        arms = [plain, _plain(pruned), _reordered(pruned), _others(pruned, training="warm")]
        return pruned_arms(*([load(each) for each in arm] for arm in arms))
    arms = [
        plain,
        _reordered(dense),
        _others(dense, rotated=True),
        [each._replace(untrained=True) for each in plain],
        _others(dense, training="warm"),
        _others(dense, rotated=True, training="warm"),
    ]
    return control_arms(*([load(each) for each in arm] for arm in arms))


def _plain(saes: list[_Compared]) -> list[_Compared]:
    return [each for each in saes if each.which.is_plain]


def _reordered(saes: list[_Compared]) -> list[_Compared]:
    """Of an order of the data that is another start's."""
    return [each for each in _others(saes) if not each.which.is_plain]


def _others(
    saes: list[_Compared], *, rotated: bool = False, training: Training = "own"
) -> list[_Compared]:
    alike = (rotated, training)
    return [each for each in saes if (each.which.rotated, each.which.training) == alike]


# --- what they cost -----------------------------------------------------------------------------


def _survival_cost(asked: Asked) -> Cost:
    """The arms of methods §7: a pruned run's own, or the dense run's ceilings, floor and chance."""
    dense, pruned = asked.saes("dense"), asked.saes("pruned")
    seeds = sum(sae.is_plain for sae in dense)
    controls = sum(not sae.is_plain for sae in dense + pruned)
    pairs = seeds * (seeds - 1)
    comparisons = seeds + controls + pairs if pruned else controls + 2 * pairs
    return Cost(asked.matching(comparisons * len(COORDINATES)))


def _subspace_cost(asked: Asked) -> Cost:
    """Every arm's cosines again, in one system of coordinates."""
    return Cost(_survival_cost(asked).flops / len(COORDINATES))


def _activation_matching_cost(asked: Asked) -> Cost:
    """Every SAE reads half the eval split, plain ones of a pruned run also the null in its place;
    every pair multiplies k by k latents per token.
    """
    dense, pruned = asked.saes("dense"), asked.saes("pruned")
    tokens, saes = asked.eval_tokens // 2, len(dense + pruned)
    seeds = len(dense) if pruned else 0
    pairs = 2.0 * tokens * asked.study.sae.k**2 * (saes * max(1, saes - 1) + seeds**2)
    return Cost(asked.encoding(tokens * (saes + seeds)) + pairs)


ARM_STAGES = (
    StageKind("survival", 3, _survival, cost=_survival_cost, rate="matching"),
    StageKind("corrected", 1, _corrected),
    StageKind("subspace", 2, _subspace, cost=_subspace_cost, rate="matching"),
    StageKind(
        "activation_matching",
        2,
        _activation_matching,
        cost=_activation_matching_cost,
        rate="SAE encoding",
    ),
)
