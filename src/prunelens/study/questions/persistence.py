"""Does the dense SAE still fire on the same tokens?"""

from __future__ import annotations

from prunelens.analyses.fates import persistence_by_latent
from prunelens.analyses.persistence import DRAWS, persistence, persistence_summary
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table, Told
from prunelens.study.questions.paired import by_dense_sae
from prunelens.study.work import Work


def _persistence(work: Work) -> None:
    by_dense_sae(work, persistence, persistence_summary, "persistence.parquet")


def _persistence_cost(costed: Costed) -> Cost:
    """Per SAE: dense and every draw of what is disturbed, on half the eval split."""
    encodings = (1 + sum(DRAWS.values())) * len(costed.saes("sae"))
    return Cost(costed.encoding(costed.eval_tokens // 2 * encodings))


PERSISTENCE = Question(
    "persistence",
    3,
    _persistence,
    cost=_persistence_cost,
    work_kind="SAE encoding",
    asked=("persistence",),
    of="pruned",
    parents=lambda run: run.paired(),
    tables=(
        Table(
            "persistence",
            "pruned run, seed, source",
            "does the dense SAE still fire on the same tokens",
            "persistence.parquet",
            "seed source mean_correlation mean_jaccard share_above_0.7 num_silenced "
            "num_undefined excess_z relative_shuffled relative_shuffled_low "
            "relative_shuffled_high relative_isotropic relative_isotropic_low "
            "relative_isotropic_high",
        ),
    ),
    by_latent=lambda table, seed, _: persistence_by_latent(table, seed),
    told={
        "persistence": Told(
            "persistence",
            "Correlation of the latent's activations on dense and on pruned activations of the same"
            " tokens: 1 fires as before, 0 is lost; empty with fewer than 10 dense firings.",
        ),
        "relative_shuffled": Told(
            "share of noise",
            "Persistence as a share of what noise of the same size leaves, 0 to 1: below 1 is harm"
            " of pruning's own, whatever the firing rate.",
        ),
        "persistence_jaccard": Told(
            "Jaccard",
            "Overlap of the tokens on which the latent fires before and after pruning: 1 the same,"
            " 0 none in common.",
        ),
        "silenced": Told(
            "silenced", "1 where the latent fires on dense and never on pruned activations."
        ),
    },
)
