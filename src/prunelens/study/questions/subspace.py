"""Does a direction lie in the span of its nearest in the other SAE?"""

from __future__ import annotations

from prunelens.analyses.fates import subspace_by_latent
from prunelens.analyses.subspace import subspace_overlaps
from prunelens.analyses.survival import COORDINATES
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.questions.arms import arms, dictionary
from prunelens.study.questions.survival import survival_cost
from prunelens.study.work import Work


def _subspace(work: Work) -> None:
    latents = subspace_overlaps(arms(work, dictionary))
    latents.to_parquet(work.out / "latents.parquet")
    seeds = ["init_a", "order_a", "init_b", "order_b"]
    means = latents.groupby(["arm", *seeds], sort=False)["overlap"].mean().reset_index()
    means.to_parquet(work.out / "subspace.parquet")


def _subspace_cost(costed: Costed) -> Cost:
    """Every arm's cosines again, in one system of coordinates."""
    return Cost(survival_cost(costed).flops / len(COORDINATES))


SUBSPACE = Question(
    "subspace",
    2,
    _subspace,
    cost=_subspace_cost,
    work_kind="matching",
    asked=("identity",),
    parents=lambda run: run.compared(),
    tables=(
        Table(
            "subspace",
            "run, arm, pair of SAEs",
            "does a direction lie in the span of a few of the other SAE",
            "subspace.parquet",
            """
            arm init_a order_a init_b order_b
            overlap: Mean over latents of A of the share (squared norm, 0 to 1) of its direction in
                the span of the four nearest directions of B.""",
        ),
    ),
    by_latent=subspace_by_latent,
    latents="subspace_<arm>: The latent's `overlap`, as in `subspace.csv`.",
)
