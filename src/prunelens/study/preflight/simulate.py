"""How long a study takes with N workers: its stages, scheduled as the executor schedules them.

Data dependency is the only order. Whenever a worker is free it takes the first stage, in the order
of the plan, whose parents are there (list scheduling, Graham 1966), so the makespan is at most
2 - 1/N times the shortest possible one. Transfers, start-up and the deletion of activation stores
take no time here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prunelens.study.artifacts.store import Stage
from prunelens.study.matrix import parents_first


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
        if stage.together and stage.name != "sae" and key in groups:
            place = groups[key]
            told = tasks[place]
            assert told.parents == parents, "stages of one pass read the same"
            tasks[place] = told._replace(hours=told.hours + hours(stage))
        else:
            place = groups[key] = len(tasks)
            tasks.append(Task(stage.label or stage.name, hours(stage), parents))
        places[stage.identity] = place
    return tasks


def side_by_side(studies: Iterable[Sequence[Task]]) -> list[Task]:
    """The tasks of several studies that share workers and nothing else, one study after another."""
    tasks: list[Task] = []
    for study in studies:
        start = len(tasks)
        tasks += [
            task._replace(parents=tuple(start + parent for parent in task.parents))
            for task in study
        ]
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
    ends: list[float] = []
    before: list[int | None] = []
    for task in tasks:
        last = max(task.parents, key=lambda parent: ends[parent], default=None)
        before.append(last)
        ends.append(task.hours + (0.0 if last is None else ends[last]))
    place = max(range(len(tasks)), key=lambda place: ends[place], default=None)
    length = 0.0 if place is None else ends[place]
    names: list[str] = []
    while place is not None:
        if tasks[place].hours > 0:
            names.append(tasks[place].name)
        place = before[place]
    return length, tuple(reversed(names))
