"""What needs all runs of a study at once: made after them, from those that are there.

So a run that failed is missing in these answers instead of preventing them.
"""

from __future__ import annotations

import pathlib

from prunelens.config import PruningConfig
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.matrix import Plan
from prunelens.study.progress import StudyProgress
from prunelens.study.stages import STAGES, failure_of, make_stage


def predictor_stage(plan: Plan, store: Store) -> Stage | None:
    """The predictor over every run whose latents' fates are there; None where it has none.

    Runs of a checkpoint of others are left out: nobody asked for their sparsity.
    """
    parents = {
        run.name: run.stages["fates"]
        for run in plan.runs
        if isinstance(run.pruning, PruningConfig)
        and "fates" in run.stages
        and store.has(run.stages["fates"])
    }
    if "predictor" not in plan.study.questions or not parents:
        return None
    runs = {
        run.name: {"model": run.model, "layer": run.layer, "sparsity": run.pruning.sparsity}
        for run in plan.runs
        if run.name in parents and run.pruning
    }
    config = {
        "taus": list(plan.study.taus),
        "runs": runs,
        "threads": plan.study.threads_per_stage,
    }
    return Stage(
        "predictor",
        STAGES["predictor"].version,
        config,
        parents,
        label=f"predictor over {len(parents)} runs",
        estimate=lambda: 1e9,
    )


def conclude(
    plan: Plan, store: Store, *, progress: StudyProgress, log_folder: pathlib.Path
) -> tuple[int, str | None]:
    """Make what is missing; returns how many stages that took, and why one failed (or None)."""
    stage = predictor_stage(plan, store)
    if stage is None or store.is_sound(stage):
        return 0, None
    for parent in stage.parents.values():
        store.read(parent)
    failure = failure_of(
        lambda: make_stage(
            store, stage, device="cpu", progress=lambda share: progress.update(stage, share)
        ),
        log_folder / f"{stage.identity[:12]}.log",
    )
    return 1, failure and f"{stage.label}: {failure}"
