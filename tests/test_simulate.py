"""The simulated schedule against bounds, an exhaustive optimum and a slow simulation."""

import importlib
import itertools
import math
import pathlib
import random

import pytest

from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage
from prunelens.study.plan import plan_study
from prunelens.study.preflight.hours import Task, read_rates, simulate, tasks_of
from tiny_study import tiny_study, write_text


def graph(seed: int, size: int) -> list[Task]:
    """Random durations (some 0) and parents."""
    draw = random.Random(seed)
    tasks = []
    for place in range(size):
        parents = sorted(draw.sample(range(place), min(place, draw.randrange(3))))
        tasks.append(Task(f"t{place}", draw.choice([0, 1, 2, 3, 5]), tuple(parents)))
    return tasks


def slowly(tasks: list[Task], workers: int) -> int:
    """Time in ticks of one hour; every tick looks at every task. Durations are whole hours."""
    left = [task.hours for task in tasks]
    begun, done = set(), set()
    now = 0
    while True:
        finished = {place for place in begun - done if left[place] == 0}
        done |= finished
        free = workers - len(begun - done)
        can = [
            place
            for place, task in enumerate(tasks)
            if place not in begun and set(task.parents) <= done
        ]
        begun |= set(can[:free])
        if finished or can[:free]:
            continue  # what takes no time ends at once and makes room
        if len(done) == len(tasks):
            return now
        now += 1
        for place in begun - done:
            left[place] -= 1


def optimum(tasks: list[Task], workers: int) -> int:
    """The shortest makespan there is. Durations are whole hours.

    Each task in turn is put as early as its parents and the workers allow, before others if there
    is room; over all orders that gives every schedule in which nothing could be moved forward, and
    one of those is optimal. (A greedy schedule need not be, whatever its order.)
    """
    best = sum(task.hours for task in tasks)
    for order in itertools.permutations(range(len(tasks))):
        ends: dict[int, int] = {}
        busy = [0] * (best + 1 + max(task.hours for task in tasks))
        for place in order:
            hours, parents = tasks[place].hours, tasks[place].parents
            if not set(parents) <= set(ends):
                break
            start = max((ends[parent] for parent in parents), default=0)
            while any(count == workers for count in busy[start : start + hours]):
                start += 1
            for hour in range(start, start + hours):
                busy[hour] += 1
            ends[place] = start + hours
        else:
            best = min(best, max(ends.values()))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_it_agrees_with_a_slow_simulation_and_keeps_its_bounds(seed):
    tasks = graph(seed, 25)
    total = sum(task.hours for task in tasks)
    for workers in (1, 2, 3, 7, 100):
        found = simulate(tasks, workers)
        assert found.makespan_hours == slowly(tasks, workers)
        assert found.total_hours == total
        least = max(found.critical_path_hours, total / workers)
        assert least - 1e-9 <= found.makespan_hours
        # Graham's bound from below: work that is shared out, and the chain that is not.
        share = (1 - 1 / workers) * found.critical_path_hours
        assert found.makespan_hours <= total / workers + share + 1e-9
        assert found.idle_share == pytest.approx(1 - total / workers / found.makespan_hours)
    assert simulate(tasks, 1).makespan_hours == total
    assert simulate(tasks, 100).makespan_hours == simulate(tasks, 100).critical_path_hours


@pytest.mark.parametrize("seed", range(12))
def test_it_is_within_grahams_bound_of_the_optimum(seed):
    tasks = graph(100 + seed, 6)
    for workers in (2, 3):
        best = optimum(tasks, workers)
        assert best <= simulate(tasks, workers).makespan_hours <= (2 - 1 / workers) * best + 1e-9


def test_a_known_anomaly_of_list_scheduling():
    """Two short ones go first and leave the long one for last: 2 - 1/N is reached."""
    tasks = [Task("a", 1, ()), Task("b", 1, ()), Task("c", 2, ())]
    assert simulate(tasks, 2).makespan_hours == 3
    assert optimum(tasks, 2) == 2


def test_a_chain_is_as_long_for_any_number_of_workers():
    tasks = [Task(f"t{n}", 1.5, (n - 1,) if n else ()) for n in range(4)]
    for workers in (1, 8):
        found = simulate(tasks, workers)
        assert found.makespan_hours == found.critical_path_hours == 6
        assert found.chain == ("t0", "t1", "t2", "t3")
    assert simulate(tasks, 4).idle_share == pytest.approx(0.75)


def test_the_critical_path_is_the_longest_of_all_chains():
    for seed in range(10):
        tasks = graph(seed, 12)

        def longest(place, tasks=tasks):
            return tasks[place].hours + max(map(longest, tasks[place].parents), default=0)

        found = simulate(tasks, 2)
        assert found.critical_path_hours == max(map(longest, range(12)))
        by_name = {task.name: task.hours for task in tasks}
        assert sum(by_name[name] for name in found.chain) == found.critical_path_hours


def test_nothing_to_do():
    found = simulate([], 3)
    assert (found.makespan_hours, found.critical_path_hours, found.chain) == (0, 0, ())
    assert math.isnan(found.idle_share)
    assert math.isnan(simulate([Task("a", 0, ())], 2).idle_share)


def test_studies_side_by_side_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "tools"))
    chain = [Task("a", 1, ()), Task("b", 1, (0,))]
    both = importlib.import_module("write_scaling").side_by_side([chain, chain])
    assert [task.parents for task in both] == [(), (0,), (), (2,)]
    assert simulate(both, 2).makespan_hours == 2


def stage(name: str, parents: list[Stage], together: str = "") -> Stage:
    config = {"number": len(parents), "name": name}
    roles = {str(n): parent for n, parent in enumerate(parents)}
    return Stage(name.split()[0], 1, config, roles, label=name, together=together)


def test_tasks_are_stages_once_and_one_pass_is_one_task():
    text = stage("corpus", [])
    low, high = (stage(f"activations {n}", [text], together="pass") for n in (1, 2))
    saes = [stage(f"sae {n}", [low], together="order") for n in range(2)]
    last = stage("survival", [*saes, high])
    hours = {"corpus": 0.0, "activations": 1.0, "sae": 4.0, "survival": 2.0}
    tasks = tasks_of([last, *saes], lambda s: hours[s.name])
    assert [(t.name, t.hours) for t in tasks] == [
        ("corpus", 0.0), ("activations 1", 2.0), ("sae 0", 4.0), ("sae 1", 4.0), ("survival", 2.0),
    ]  # fmt: skip
    assert tasks[-1].parents == (1, 2, 3)
    assert simulate(tasks, 2).makespan_hours == 2 + 4 + 2


def test_a_studys_tasks_are_its_stages(checkpoint_folder, tmp_path):
    study = study_from_data(tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt")))
    targets = plan_study(study).targets().values()
    asked = []

    def hours(stage):
        asked.append(stage.identity)
        return 1.0

    tasks = tasks_of(targets, hours)
    assert len(asked) == len(set(asked)) == len(tasks)  # one layer: nothing shares a pass
    assert all(parent < place for place, task in enumerate(tasks) for parent in task.parents)
    found = simulate(tasks, 2)
    assert found.chain[0].startswith("corpus")
    assert simulate(tasks, 1).makespan_hours == len(tasks)
    assert len(tasks) / 2 <= found.makespan_hours < len(tasks)


# --- given rates --------------------------------------------------------------------------------

KINDS = ("language model", "SAE training", "SAE encoding", "matching")


def test_rates_are_read_of_a_file_or_of_a_plan(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("".join(f"{kind}: {n + 1}e12\n" for n, kind in enumerate(KINDS)))
    expected = dict(zip(KINDS, (1e12, 2e12, 3e12, 4e12), strict=True))
    assert read_rates(path, ["a", "b"]) == {"a": expected, "b": expected}
    plan = tmp_path / "plan.json"
    plan.write_text(
        '{"device": {"flops_per_second": {"a": {"language model": 1, "SAE training": 2,'
        ' "SAE encoding": 3, "matching": 4}}}}'
    )
    assert read_rates(plan, ["a"])["a"]["matching"] == 4
    with pytest.raises(UserError, match=r"--rates: .* no rates of model 'b'"):
        read_rates(plan, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "mapping"),
        ("language model: 1e12", "SAE training"),
        ("{language model: fast, SAE training: 1, SAE encoding: 1, matching: 1}", "fast"),
        ("{language model: 0, SAE training: 1, SAE encoding: 1, matching: 1}", "0"),
        ("{language model: .inf, SAE training: 1, SAE encoding: 1, matching: 1}", "inf"),
        ("{language model: 1, SAE training: 1, SAE encoding: 1, matching: 1, more: 1}", "more"),
        ("device: {flops_per_second: {}}", "not calibrated"),
        ("[", "YAML"),
    ],
)
def test_wrong_rates_are_the_users_mistake(text, words, tmp_path):
    path = pathlib.Path(tmp_path / "rates.yaml")
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_rates(path, ["a"])
