"""RQ2: which features are found again? The dense run holds the controls."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.fates import matches_by_latent
from prunelens.analyses.survival import COORDINATES, corrected_survival, survival
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table, Told
from prunelens.study.questions.arms import arms, dictionary
from prunelens.study.work import Work


def _survival(work: Work) -> None:
    result = survival(arms(work, dictionary), work.config["taus"])
    result.rates.to_parquet(work.out / "survival.parquet")
    result.latents.to_parquet(work.out / "latents.parquet")


def _corrected(work: Work) -> None:
    tables = [
        pd.read_parquet(work.parents[role] / "survival.parquet")
        for role in ("survival", "controls")
    ]
    corrected_survival(*tables).to_parquet(work.out / "corrected.parquet")


def survival_cost(costed: Costed) -> Cost:
    """The arms of methods §7: a pruned run's own, or the dense run's ceilings, floor and chance."""
    dense, pruned = costed.saes("dense"), costed.saes("pruned")
    seeds = sum(sae.is_plain for sae in dense)
    controls = sum(not sae.is_plain for sae in dense + pruned)
    pairs = seeds * (seeds - 1)
    comparisons = seeds + controls + pairs if pruned else controls + 2 * pairs
    return Cost(costed.matching(comparisons * len(COORDINATES)))


SURVIVAL = Question(
    "survival",
    3,
    _survival,
    cost=survival_cost,
    work_kind="matching",
    asked=("survival",),
    config=lambda run: run.taus(),
    parents=lambda run: run.compared(),
    tables=(
        Table(
            "survival",
            "run, arm, pair of SAEs, coordinates, tau",
            "RQ2: how many dense features are found again",
            "survival.parquet",
            """
            arm
            coordinates: `normalised`, as the SAEs see the data, or `raw`.
            init_a order_a init_b order_b tau one_way mnn greedy one_way_reverse""",
        ),
    ),
    by_latent=matches_by_latent,
    latents="match_<arm>: The latent of B whose direction is nearest.",
    told={
        "mutual": Told(
            "mutual, {arm}",
            "1 where the latent and its nearest direction in the pruned SAE are each other's"
            " nearest ({means}); 0 where they are not.",
        ),
        "cosine": Told(
            "cosine, {arm}",
            "Cosine to the nearest direction in the pruned SAE ({means}): low is lost or turned.",
        ),
    },
)
CORRECTED = Question(
    "corrected",
    1,
    _corrected,
    asked=("survival",),
    of="pruned",
    parents=lambda run: {
        "survival": run.answers["survival"],
        "controls": run.dense.answers["survival"],
    },
    tables=(
        Table(
            "survival_corrected",
            "pruned run, arm, tau",
            "the same between its floor (0) and its ceiling (1)",
            "corrected.parquet",
            """
            arm: `shared`, `cross` or `warm`.
            tau
            corrected: (measured - floor) / (ceiling - floor); empty where ceiling - floor < 0.02.
            low high
            interval: How it was made; empty where there is none.
            reason""",
        ),
    ),
)
