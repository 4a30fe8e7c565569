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
            """
            seed
            source: What the SAE reads in place of dense activations.
            mean_correlation: Mean over latents of the correlation with its dense activations.
            mean_jaccard: Mean over latents of the overlap of the tokens that it fires on.
            share_above_0.7: Share of latents whose correlation is above 0.7.
            num_silenced: Latents that fire on dense, never on the other activations.
            num_undefined: Latents with fewer than 10 dense firings; left out of the means.
            excess_z: Mean over latents of Fisher z minus that under shuffled noise; below 0 is
                harm of pruning's own. Of `pruned` and `null` alone.
            relative_shuffled: Mean correlation over latents as a share of the mean under shuffled
                noise; below 1 is harm beyond noise of equal size. Of `pruned` and `null` alone.
            relative_shuffled_low relative_shuffled_high
            relative_isotropic: As `relative_shuffled`, under isotropic noise.
            relative_isotropic_low relative_isotropic_high""",
        ),
    ),
    by_latent=lambda table, seed, _: persistence_by_latent(table, seed),
    latents="""
    persistence_null persistence_undone persistence_noise_isotropic persistence_noise_shuffled
        persistence_difference_shuffled: Correlation with that `source` of `persistence.csv`.
    relative_shuffled relative_isotropic: Persistence as a multiple of what that noise leaves, not
        cut; empty where it leaves less than 0.3.
    relative_shuffled_error relative_isotropic_error: Standard error of it.""",
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
