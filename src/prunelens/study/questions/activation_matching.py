"""Do latents of two SAEs fire alike, wherever they point?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

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
from prunelens.analyses.fates import activation_by_latent
from prunelens.analyses.noise import NullRows, Rows
from prunelens.analyses.survival import Comparison
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table, Told
from prunelens.study.questions.arms import Compared, arms
from prunelens.study.questions.paired import load_common_change, paired_activations, second_half
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

NULL_ARMS = ("shared_init", "cross_init")  # every pair is matched once more: the plain SAEs alone


def _activation_matching(work: Work) -> None:
    """Over the tokens that persistence is measured on, and with its draw of the null."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    tokens = second_half(work, kept)
    num_saes = len(work.saes("dense")) + len(work.saes("pruned"))
    done = iter(range(2 * num_saes))

    def series(which: Compared, rows: Rows) -> LatentSeries:
        found = latent_series(which.sae().to(work.device), rows, tokens)
        work.progress(min(1.0, (next(done) + 1) / (2 * num_saes)))
        return found

    def read(which: Compared) -> _Reading:
        path = work.parents[which.condition] / "eval.safetensors"
        statistics = which.statistics()
        rows = Activations(path, kept=kept, statistics=statistics, device=work.device)
        return _Reading(which, series(which, rows))

    @functools.cache  # several dense SAEs are compared with it
    def read_null(which: Compared) -> LatentSeries:
        dense, pruned, *_ = paired_activations(work)
        null = NullRows(dense, pruned, load_common_change(work), tokens)
        before = Statistics(dense.mean, dense.sigma)
        after = Statistics(*(part.to(work.device) for part in which.statistics()))
        return series(which, _Renormalised(null, before, after))

    comparisons = _with_series(arms(work, read), read_null if "pruned" in work.parents else None)
    found = activation_matching(comparisons, work.config["taus"])
    found.rates.to_parquet(work.out / "rates.parquet")
    found.latents.to_parquet(work.out / "latents.parquet")


def _with_series(
    comparisons: list[Comparison[_Reading]], null: Callable[[Compared], LatentSeries] | None
) -> Iterator[ActivationComparison]:
    """Every comparison, and where there is a null those of NULL_ARMS with it in B's place."""
    for arm, a, b in ((each.arm, each.a, each.b) for each in comparisons):
        seeds = (a.init_seed, a.data_seed, b.init_seed, b.data_seed)
        yield ActivationComparison(arm, b.by.condition, *seeds, a.series, b.series)
        if null and arm in NULL_ARMS:
            yield ActivationComparison(arm, "null", *seeds, a.series, null(b.by))


class _Reading(NamedTuple):
    """What one SAE makes of its activations."""

    by: Compared
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


def _activation_matching_cost(costed: Costed) -> Cost:
    """Every SAE reads half the eval split, plain ones of a pruned run also the null in its place;
    every pair multiplies k by k latents per token.
    """
    dense, pruned = costed.saes("dense"), costed.saes("pruned")
    tokens, saes = costed.eval_tokens // 2, len(dense + pruned)
    seeds = len(dense) if pruned else 0
    pairs = 2.0 * tokens * costed.study.sae.k**2 * (saes * max(1, saes - 1) + seeds**2)
    return Cost(costed.encoding(tokens * (saes + seeds)) + pairs)


def _parents(run: LayerPlan) -> Mapping[str, Stage]:
    """Rotated SAEs have no part: the same tokens make the same features fire in a rotated space.

    A pruned run's SAEs also read the null.
    """
    reading = run.compared(rotated=False)
    reading |= {"dense": run.dense.activations, "screening": run.dense.screening}
    if run.pruning:
        reading |= {**run.both_activations(), "common_change": run.answer("common_change")}
    return reading


ACTIVATION_MATCHING = Question(
    "activation_matching",
    2,
    _activation_matching,
    cost=_activation_matching_cost,
    work_kind="SAE encoding",
    asked=("identity",),
    config=lambda run: run.taus(),
    parents=_parents,
    tables=(
        Table(
            "activation_matching",
            "run, arm, pair of SAEs, tau",
            "do latents of the two SAEs fire alike, wherever they point",
            "rates.parquet",
            """
            arm init_a order_a init_b order_b
            tau: The least correlation at which two latents match.
            one_way mnn greedy one_way_reverse
            source: What the SAE B reads: `pruned` or `null`; `dense` in the dense run.""",
        ),
    ),
    by_latent=activation_by_latent,
    latents="""
    activation_match_<arm>: The latent of B that fires most alike.
    activation_mutual_<arm>: Whether the two are each other's most alike.""",
    told={
        "activation_correlation": Told(
            "activation match, {arm}",
            "Correlation with the latent of the pruned SAE that fires most alike ({means}): low"
            " means that none fires as this one did.",
        ),
        "activation_match": Told(
            "fires most alike, {arm}",
            "The latent of the pruned SAE that fires most alike ({means}); -1 where there is none.",
        ),
    },
)
