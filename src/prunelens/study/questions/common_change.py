"""What pruning does to all activations alike."""

from __future__ import annotations

from prunelens.analyses.noise import COLUMNS, KINDS, common_change_table, fit_common_change
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.questions.paired import paired_activations
from prunelens.study.work import Work


def _common_change(work: Work) -> None:
    """Fitted on the first half of eval, measured on the second, where all else is measured."""
    dense, pruned, first, second, _ = paired_activations(work)
    seed = work.config["seed"]
    changes = {
        kind: fit_common_change(dense, pruned, first, kind=kind, seed=seed) for kind in KINDS
    }
    table = common_change_table(dense, pruned, changes, second)
    table.to_parquet(work.out / "common_change.parquet")
    changes[work.config["kind"]].save(work.out / "change.safetensors")


def _common_change_cost(costed: Costed) -> Cost:
    """Two products of every token's activations with each other, on half the eval split."""
    return Cost(4.0 * (costed.eval_tokens // 2) * costed.shape.d_model**2)


COMMON_CHANGE = Question(
    "common_change",
    1,
    _common_change,
    cost=_common_change_cost,
    work_kind="SAE encoding",
    asked=("persistence", "identity", "transfer"),
    of="pruned",
    config=lambda run: run.kind_of_change(),
    parents=lambda run: run.both_activations(),
    tables=(
        Table(
            "common_change",
            "pruned run, kind of map",
            "what pruning did to all activations alike",
            "common_change.parquet",
            COLUMNS,
        ),
    ),
)
