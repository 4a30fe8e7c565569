"""What became of every dense latent, joined from the other answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from prunelens.analyses.fates import latent_fates
from prunelens.study.artifacts.store import Stage
from prunelens.study.kind import Question
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

OTHERS = ("persistence", "activation_matching", "scaling", "subspace")


def _fates(work: Work) -> None:
    dense = {
        sae.init_seed: pd.read_parquet(folder / "latents.parquet")
        for sae, folder in work.saes("sae").items()
    }
    matches = pd.read_parquet(work.parents["survival"] / "latents.parquet")
    others = {
        role: pd.read_parquet(work.parents[role] / "latents.parquet")
        for role in OTHERS
        if role in work.parents
    }
    found = latent_fates(dense, matches, work.config["seeds"], **others)
    found.to_parquet(work.out / "fates.parquet")


def _plan(run: LayerPlan) -> Mapping[str, Stage]:
    """Of the dense run only what its control arms say by firing rate."""
    if run.pruning is None and "fragility" not in run.study.questions:
        return {}
    answers = {name: run.answers[name] for name in ("survival", *OTHERS) if name in run.answers}
    seeds = [sae.init_seed for sae in run.seeds()]
    return {"fates": run.stage("fates", {"seeds": seeds}, answers | run.dense_saes("sae"))}


FATES = Question("fates", 3, _fates, asked=("fragility", "predictor", "causal"), plan=_plan)
