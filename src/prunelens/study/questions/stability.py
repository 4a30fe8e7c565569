"""RQ1: do two seeds find the same features?"""

from __future__ import annotations

from prunelens.analyses.stability import seed_stability
from prunelens.sae.architectures import load_sae
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.work import Work


def _stability(work: Work) -> None:
    decoders = {
        sae.init_seed: load_sae(folder).decoder_weight.detach()
        for sae, folder in work.saes("sae").items()
    }
    seed_stability(decoders, work.config["taus"]).to_parquet(work.out / "stability.parquet")


def _stability_cost(costed: Costed) -> Cost:
    seeds = len(costed.parents)
    return Cost(costed.matching(seeds * (seeds - 1) // 2))


STABILITY = Question(
    "stability",
    2,
    _stability,
    cost=_stability_cost,
    work_kind="matching",
    asked=("stability",),
    config=lambda run: run.taus(),
    parents=lambda run: run.readers(),
    tables=(
        Table(
            "stability",
            "run, pair of seeds, tau",
            "RQ1: do two seeds find the same features",
            "stability.parquet",
            """
            seed_a seed_b: Seed of the start of SAE A and of SAE B.
            tau one_way mnn greedy""",
        ),
    ),
)
