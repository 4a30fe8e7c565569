"""A study's description -> its runs and the stages that they need. Nothing is executed here.

A run is model x layer x condition. Stages are shared wherever their identities are equal: one
corpus, one calibration, one dense SAE serve every run that needs them.

    corpus -> calibration -> prune -> activations -> statistics -> sae -> stability
                               |\\-> perplexity   (screening: dense only)  |-> survival -> corrected
                               |\\-> transfer (with dense SAEs)            |-> persistence
                               \\--> causal (with fates)                   \\-> fates -> fragility

`fates` joins what survival and persistence say of each dense latent. What needs all runs at once
(the predictor) comes after them: see `study.conclude`.
"""

from __future__ import annotations

from prunelens.config import StudyConfig
from prunelens.study.layer_plan import LayerPlan
from prunelens.study.matrix import Plan, Run
from prunelens.study.model_plan import ModelPlan, Sources
from prunelens.study.planted_plan import PlantedPlan


def plan_study(study: StudyConfig, *, resolve: bool = True, check: bool = True) -> Plan:
    """Lay out the matrix; reads fingerprints of models and text, and checks what can be checked.

    Args:
        study: what to do.
        resolve: find the content behind every name. Without it the names stand for themselves and
            no hub is asked: enough to count and to cost, but the identities are not the real ones.
        check: look whether it fits its models, which takes seconds of imports; of no use where it
            was planned before.
    Raises: UserError for a missing model or text, an unknown layer, too large a k.
    """
    sources = Sources(resolve)
    runs: list[Run] = []
    for model in study.models:
        plan = (
            PlantedPlan(study, model)
            if model.is_planted
            else ModelPlan(study, model, sources, check=check)
        )
        runs += _runs(plan, model.layers)
    return Plan(study, runs)


def _runs(model: ModelPlan, layers: tuple[int, ...]) -> list[Run]:
    """Dense runs of every layer first, then one run per layer and pruned condition."""
    dense = {layer: LayerPlan(model, layer, None, None) for layer in dict.fromkeys(layers)}
    runs = [plan.run() for plan in dense.values()]
    for pruning in model.study.conditions():
        runs += [
            LayerPlan(model, layer, pruning, reference).run() for layer, reference in dense.items()
        ]
    return runs
