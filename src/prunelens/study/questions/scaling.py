"""How many times its own size is a dense direction in pruned activations?"""

from __future__ import annotations

from prunelens.analyses.fates import scaling_by_latent
from prunelens.analyses.scaling import SOURCES, latent_scaling, scaling_summary
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table, Told
from prunelens.study.questions.paired import by_dense_sae
from prunelens.study.work import Work

FIT_STEPS = 10  # of the joint regression; three to five were seen


def _scaling(work: Work) -> None:
    by_dense_sae(work, latent_scaling, scaling_summary, "scaling.parquet")


def _scaling_cost(costed: Costed) -> Cost:
    """Per SAE, on half the eval split: one encoding, and per step of the joint regression k sparse
    rows of every target, read twice.
    """
    tokens = costed.eval_tokens // 2 * len(costed.saes("sae"))
    each = 4.0 * costed.shape.d_model * costed.study.sae.k * len(SOURCES) * FIT_STEPS
    return Cost(costed.encoding(tokens) + tokens * each)


SCALING = Question(
    "scaling",
    2,
    _scaling,
    cost=_scaling_cost,
    work_kind="SAE encoding",
    asked=("identity",),
    of="pruned",
    parents=lambda run: run.paired(),
    tables=(
        Table(
            "scaling",
            "pruned run, seed, source",
            "how many times its own size is a dense direction in pruned activations",
            "scaling.parquet",
            """
            seed
            source: In what the dense SAE's directions are sought.
            mean_scaling: Mean over latents of scaling: how many times its own size a direction is.
            median_scaling: Median over latents of the same number.
            share_above_half_median: Share of latents above half the median, where that is above 0.
            num_undefined: Latents without a number, which are left out of the means.""",
        ),
    ),
    by_latent=lambda table, seed, _: scaling_by_latent(table, seed),
    latents="scaling_null scaling_noise_isotropic scaling_unpaired: Scaling in that `source`.",
    told={
        "scaling": Told(
            "scaling",
            "How many times its own size the latent's direction is in pruned activations: 1"
            " as before, 0 gone; read it beside that of others, for a common gain raises all.",
        ),
    },
)
