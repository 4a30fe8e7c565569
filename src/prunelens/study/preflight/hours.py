"""How long stages take: their work over the rates of a device, measured or given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prunelens.checkpoint import ModelShape
from prunelens.config import StudyConfig
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import WORK_KINDS
from prunelens.study.matrix import Plan
from prunelens.study.preflight.calibrate import Rate, calibrate
from prunelens.study.preflight.simulate import Task, tasks_of
from prunelens.study.stages import STAGES

Rates = Mapping[str, Mapping[str, Rate]]
"""Model label -> kind of work -> rate; empty where there are none."""


def measured_rates(study: StudyConfig, device: str, seconds: float) -> dict[str, dict[str, Rate]]:
    """The rates of this device, in about `seconds` over all models; empty if no time is given."""
    if seconds <= 0:
        return {}
    each = seconds / len(study.models)
    return {
        model.label: calibrate(study, model, device=device, seconds=each) for model in study.models
    }


def given_rates(rates: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Rate]]:
    """Rates that somebody states (see `read_rates`), in the place of measured ones."""
    return {
        model: {kind: Rate(rate, 1.0) for kind, rate in kinds.items()}
        for model, kinds in rates.items()
    }


def hours_of(costs: Iterable[tuple[Stage, Cost]], rates: Rates) -> dict[str, float]:
    """Hours of some stages by kind of work; 0 without rates."""
    hours: dict[str, float] = dict.fromkeys(WORK_KINDS, 0.0)
    for stage, cost in costs:
        kind = STAGES[stage.name].work_kind
        if kind and rates:
            assert stage.source
            rate = rates[stage.source.model.label][kind].flops_per_second
            hours[kind] += cost.flops / rate / 3600
    return hours


def cost_of(stage: Stage, shapes: Mapping[str, ModelShape], study: StudyConfig) -> Cost:
    """The cost of a stage in its plan.

    One pass up to the highest layer gives the activations of those below, which cost nothing then.
    """
    assert stage.source
    model = stage.source.model
    if stage.name == "activations" and stage.config["layer"] < max(model.layers):
        return Cost()
    return STAGES[stage.name].cost(Costed(stage.config, stage.parents, shapes[model.label], study))


def study_tasks(plan: Plan, shapes: Mapping[str, ModelShape], rates: Rates) -> list[Task]:
    """What has to be done, for `simulate`: each stage takes its work over its rate.

    Args:
        plan: the study's.
        shapes: model label -> shape.
        rates: of every model of the study.
    """

    def hours(stage: Stage) -> float:
        return sum(hours_of([(stage, cost_of(stage, shapes, plan.study))], rates).values())

    return tasks_of(plan.targets().values(), hours)
