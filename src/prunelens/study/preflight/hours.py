"""How long a study takes: its stages' work over the rates of a device, and their schedule.

Data dependency is the only order. Whenever a worker is free it takes the first stage, in the order
of the plan, whose parents are there (list scheduling, Graham 1966), so the makespan is at most
2 - 1/N times the shortest possible one. Transfers, start-up and the deletion of activation stores
take no time here.
"""

from __future__ import annotations

import heapq
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prunelens.checkpoint import ModelShape
from prunelens.config import StudyConfig
from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import WORK_KINDS
from prunelens.study.matrix import Plan, parents_first
from prunelens.study.stages import STAGES
from prunelens.study_file import parse_yaml, read_text

Rates = Mapping[str, Mapping[str, float]]
"""Model label -> kind of work -> operations of `study.cost` a second; empty where there are none.
"""


class Task(NamedTuple):
    """What one worker does in one go."""

    name: str
    """As a person calls it."""
    hours: float
    """How long it takes."""
    parents: tuple[int, ...]
    """Positions, in the list of tasks, of what must be done before; all of them come earlier."""


class Schedule(NamedTuple):
    """What N workers make of a list of tasks."""

    workers: int
    """N."""
    makespan_hours: float
    """From the start to the end of the last task."""
    total_hours: float
    """All tasks together, which is the makespan of one worker."""
    critical_path_hours: float
    """The longest chain of tasks that wait for each other: no number of workers is faster."""
    chain: tuple[str, ...]
    """The tasks of that chain that take time, first to last."""
    idle_share: float
    """Share of the workers' hours until the makespan in which they have nothing to do; NaN where
    nothing takes any time."""


def hours_of(costs: Iterable[tuple[Stage, Cost]], rates: Rates) -> dict[str, float]:
    """Hours of some stages by kind of work; 0 without rates."""
    hours: dict[str, float] = dict.fromkeys(WORK_KINDS, 0.0)
    for stage, cost in costs:
        kind = STAGES[stage.name].work_kind
        if kind and rates:
            assert stage.source
            hours[kind] += cost.flops / rates[stage.source.model.label][kind] / 3600
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


def tasks_of(targets: Iterable[Stage], hours: Callable[[Stage], float]) -> list[Task]:
    """The tasks of a plan in the order of the executor: parents first.

    The activation stores of several layers that one pass makes are one task. SAEs are one each, as
    where there are several workers; a single worker needs the same time for them in any grouping.

    Args:
        targets: what has to be there in the end, in the order of the plan.
        hours: of one stage; each distinct stage is asked for once.
    """
    places: dict[str, int] = {}  # identity -> position
    groups: dict[tuple[str, str], int] = {}
    tasks: list[Task] = []
    for stage in parents_first(targets):
        key = (stage.name, stage.together)
        parents = tuple(sorted({places[p.identity] for p in stage.parents.values()}))
        if stage.together and not STAGES[stage.name].one_each and key in groups:
            place = groups[key]
            told = tasks[place]
            assert told.parents == parents, "stages of one pass read the same"
            tasks[place] = told._replace(hours=told.hours + hours(stage))
        else:
            place = groups[key] = len(tasks)
            tasks.append(Task(stage.label or stage.name, hours(stage), parents))
        places[stage.identity] = place
    return tasks


def simulate(tasks: Sequence[Task], workers: int) -> Schedule:
    """List scheduling of `tasks` on `workers` equal workers; of those ready the first goes first.

    A task of no duration takes a worker too, for no time.
    """
    assert workers >= 1, workers
    critical, chain = _critical_path(tasks)
    total = math.fsum(task.hours for task in tasks)
    makespan = _makespan(tasks, workers)
    # Sums in another order differ in their last bits, so it could come out below 0.
    idle = max(0.0, 1 - total / (workers * makespan)) if makespan > 0 else math.nan
    return Schedule(workers, makespan, total, critical, chain, idle)


def _makespan(tasks: Sequence[Task], workers: int) -> float:
    waits = [len(task.parents) for task in tasks]
    children: list[list[int]] = [[] for _ in tasks]
    for place, task in enumerate(tasks):
        for parent in task.parents:
            children[parent].append(place)
    ready = [place for place, count in enumerate(waits) if not count]
    running: list[tuple[float, int]] = []  # (end, place)
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            place = heapq.heappop(ready)
            heapq.heappush(running, (now + tasks[place].hours, place))
        now = running[0][0]
        while running and running[0][0] == now:
            for child in children[heapq.heappop(running)[1]]:
                waits[child] -= 1
                if not waits[child]:
                    heapq.heappush(ready, child)
    return now


def _critical_path(tasks: Sequence[Task]) -> tuple[float, tuple[str, ...]]:
    """The longest chain's duration, and the names of its tasks that take time."""
    chains: list[tuple[float, tuple[str, ...]]] = []  # up to the end of each task
    for task in tasks:
        hours, names = _longest(chains[parent] for parent in task.parents)
        chains.append((task.hours + hours, (*names, task.name) if task.hours else names))
    return _longest(chains)


def _longest(chains: Iterable[tuple[float, tuple[str, ...]]]) -> tuple[float, tuple[str, ...]]:
    return max(chains, key=lambda chain: chain[0], default=(0.0, ()))


# --- rates of a device that is not this one ------------------------------------------------------


def read_rates(path: str | pathlib.Path, models: Iterable[str]) -> Rates:
    """The rates that a file states.

    Args:
        path: YAML or JSON with one number for each kind of work in `WORK_KINDS`, good for every
            model; or what `prunelens plan --json` printed on the device.
        models: the labels that rates are wanted for.
    Raises: UserError where the file is not that, or lacks a kind or a model.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"--rates: no file {str(path)!r}; give YAML with a rate for each kind")
    content = parse_yaml(read_text(path), where=f"--rates: {str(path)!r}")
    if not isinstance(content, dict):
        raise UserError(f"--rates: {str(path)!r} must be a mapping of kinds of work to rates")
    if not isinstance(content.get("device"), dict):
        return dict.fromkeys(models, _checked(content, path))
    measured = content["device"].get("flops_per_second")
    if not isinstance(measured, dict) or not measured:
        raise UserError(
            f"--rates: {str(path)!r} is a plan that was not calibrated; make it without"
            " --no-calibration"
        )
    for model in models:
        if model not in measured:
            raise UserError(
                f"--rates: {str(path)!r} has no rates of model {model!r}, only of"
                f" {', '.join(map(str, measured))}; give a plan of the same models"
            )
    return {model: _checked(measured[model], path) for model in models}


def _checked(given: Any, path: pathlib.Path) -> dict[str, float]:
    if not isinstance(given, dict) or set(given) != set(WORK_KINDS):
        names = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise UserError(
            f"--rates: {str(path)!r} has {names}; it must have exactly {', '.join(WORK_KINDS)}"
        )
    return {kind: _rate(kind, given[kind], path) for kind in WORK_KINDS}


def _rate(kind: str, value: Any, path: pathlib.Path) -> float:
    try:
        number = 0.0 if isinstance(value, bool) else float(value)  # YAML 1.2 reads 1e12 as text
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < math.inf:
        raise UserError(
            f"--rates: {kind} of {str(path)!r} is {value!r}; give operations a second, e.g. 1.0e+13"
        )
    return number
