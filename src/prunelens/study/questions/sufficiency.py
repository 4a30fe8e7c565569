"""Were the SAEs of a run trained enough to be compared?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from prunelens.analyses.sufficiency import sufficiency, survival_by_step
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.parents import Of, sae_role
from prunelens.study.sae_stages import decoders_by_step
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan


def _sufficiency(work: Work) -> None:
    """The verdict on the run's SAEs, their curves, and survival by step where two are followed."""
    curves = {
        sae: pd.read_parquet(folder / "curve.parquet").assign(seed=sae.init_seed)
        for sae, folder in work.saes("own").items()
    }
    own = pd.concat([curve for sae, curve in curves.items() if sae.is_plain])
    doubled = next((curve for sae, curve in curves.items() if not sae.is_plain), None)
    found = sufficiency(own, doubled)
    pd.DataFrame([found]).to_parquet(work.out / "verdict.parquet")
    every = [own.assign(total_steps=own["step"].max())]
    if doubled is not None:
        every.append(doubled.assign(total_steps=doubled["step"].max()))
    pd.concat(every, ignore_index=True).to_parquet(work.out / "curves.parquet")
    dense, run = (_decoders_by_step(work, of) for of in ("dense", "own"))
    if dense:
        by_step = survival_by_step(dense, run, work.config["taus"])
        by_step.to_parquet(work.out / "survival_by_step.parquet")


def _decoders_by_step(work: Work, of: Of) -> dict[int, dict[int, Tensor]]:
    """Of the plain SAEs: seed -> step -> decoder."""
    plain = {sae: folder for sae, folder in work.saes(of).items() if sae.is_plain}
    return {sae.init_seed: decoders_by_step(folder) for sae, folder in plain.items()}


def _sufficiency_cost(costed: Costed) -> Cost:
    """Every dense SAE against every pruned one at every checkpoint, where both are followed."""
    steps = len(costed.study.sufficiency.checkpoints) + 1
    return Cost(costed.matching(len(costed.saes("dense")) ** 2 * steps))


def _parents(run: LayerPlan) -> Mapping[str, Stage]:
    """The followed ones also show survival by step."""
    parents = {
        sae_role("own", sae): stage
        for sae, stage in run.saes.items()
        if sae.is_plain or sae.training == "doubled"
    }
    return parents | run.dense_saes("dense") if run.pruning and run.is_followed() else parents


SUFFICIENCY = Question(
    "sufficiency",
    1,
    _sufficiency,
    cost=_sufficiency_cost,
    work_kind="matching",
    asked=("sufficiency",),
    config=lambda run: run.taus(),
    parents=_parents,
    tables=(
        Table(
            "sufficiency",
            "run",
            "were the SAEs trained enough to be compared",
            "verdict.parquet",
            """
            trained_enough: False where `mean_init_retention` is above 0.9 or
                `fvu_fall_beyond_schedule` above 0.02, True where neither is; empty where that
                cannot be said.
            mean_init_retention: Mean cosine of decoder rows to their start, at the end; the
                largest over seeds.
            fvu_fall: 1 - FVU at the end / FVU at the checkpoint before; the largest over seeds.
            fvu_fall_schedule: 1 - FVU at the end / FVU of the doubled training at the same step.
            fvu_fall_beyond_schedule: 1 - FVU at the end of the doubled training / FVU at the end.
            reason: The verdict in words, and why a number is empty.""",
        ),
        Table(
            "training_curves",
            "run, SAE, step",
            "how FVU and distance from the start went",
            "curves.parquet",
            """
            seed
            total_steps: How long that SAE was trained in all; tells the doubled one apart.
            step fvu mean_init_retention""",
        ),
        Table(
            "survival_by_step",
            "followed run, step, arm, pair of SAEs, tau",
            "what a shared start makes of survival while SAEs are trained",
            "survival_by_step.parquet",
            """
            step
            arm: `shared_init` or `cross_init`, of a dense and a pruned SAE of the same step.
            init_a init_b tau mnn one_way greedy""",
        ),
    ),
)
