"""Does the dense SAE still fire on the same tokens?"""

from __future__ import annotations

from prunelens.analyses.persistence import DRAWS, persistence, persistence_summary
from prunelens.study.cost import Asked, Cost
from prunelens.study.kind import Question
from prunelens.study.questions.paired import by_dense_sae
from prunelens.study.work import Work


def _persistence(work: Work) -> None:
    by_dense_sae(work, persistence, persistence_summary, "persistence.parquet")


def _persistence_cost(asked: Asked) -> Cost:
    """Per SAE: dense and every draw of what is disturbed, on half the eval split."""
    encodings = (1 + sum(DRAWS.values())) * len(asked.saes("sae"))
    return Cost(asked.encoding(asked.eval_tokens // 2 * encodings))


PERSISTENCE = Question(
    "persistence",
    3,
    _persistence,
    cost=_persistence_cost,
    rate="SAE encoding",
    asked=("persistence",),
    of="pruned",
    parents=lambda run: run.paired(),
)
