"""What stages need of a node, and what a node looks at before it makes them."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import re
from concurrent.futures import Future

import pytest

import prunelens
from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.study import cluster, node, shared_folder, stages
from prunelens.study.alone import alone_in
from prunelens.study.artifacts.disk import DiskError
from prunelens.study.artifacts.store import Store
from prunelens.study.matrix import parents_first
from prunelens.study.needs import ON_DEVICE, Needs, needs_of, node_needs
from prunelens.study.plan import plan_study
from prunelens.study.run import run_study
from prunelens.study.stages import STAGES
from prunelens.study.work import Work
from prunelens.study.worker import request_of
from tiny_study import tiny_study, write_text

CPUS = Needs(8, 0, 10**11)
GPUS = Needs(8, 4, 10**11)


@pytest.fixture(scope="module")
def data(checkpoint_folder, tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return tiny_study(checkpoint_folder, text)


@pytest.fixture(scope="module")
def plan(data):
    return plan_study(study_from_data(data))


def all_stages(plan):
    return list(parents_first(plan.targets().values()))


def test_a_gpu_goes_to_the_stages_that_compute_on_their_device_and_to_no_other(
    data, plan, tmp_path, monkeypatch
):
    """Found by watching which stages ask for it."""
    asked, made = set(), set()

    class Watched(Work):
        def __getattribute__(self, name):
            stage = object.__getattribute__(self, "stage")
            made.add(stage.name)
            if name == "device":
                asked.add(stage.name)
            return object.__getattribute__(self, name)

    monkeypatch.setattr(stages, "Work", Watched)
    study = study_from_data({**data, "prunings": data["prunings"][1:]})
    with alone_in(tmp_path / "out"):
        run_study(study, tmp_path / "out", device="cpu", quiet=True)
    assert made >= {stage.name for stage in all_stages(plan)}
    assert asked == {name for name in made if STAGES[name].work_kind in ON_DEVICE}
    assert {"sae", "perplexity", "transfer", "causal", "persistence"} <= asked
    assert {"survival", "stability", "statistics", "fates"} <= made - asked


@pytest.mark.parametrize("gpu", [False, True])
def test_every_stage_needs_its_threads_and_one_gpu_at_most(plan, gpu):
    needs = needs_of(plan, [CPUS, GPUS], gpu=gpu)
    for stage in all_stages(plan):
        need = needs[stage.identity]
        assert need.num_cpus == plan.study.threads_per_stage
        assert need.num_gpus == int(gpu and STAGES[stage.name].work_kind in ON_DEVICE)
        assert need.memory > 5e8  # a process with torch


@pytest.mark.parametrize(("max_memory", "gpus"), [(None, 4), ({"0": "1GiB", "1": "1GiB"}, 2)])
def test_a_model_that_is_spread_gets_the_gpus_it_is_spread_over(data, max_memory, gpus):
    model = {**data["models"][0], "device_map": "auto", "max_memory": max_memory}
    plan = plan_study(study_from_data({**data, "models": [model]}))
    needs = needs_of(plan, [CPUS, GPUS], gpu=True)
    found = {stage.name: needs[stage.identity].num_gpus for stage in all_stages(plan)}
    assert {found[name] for name in ("prune", "perplexity", "activations")} == {gpus}
    assert found["sae"] == 1
    assert found["survival"] == 0


def test_memory_follows_the_model_and_the_sae(data):
    """Twice the latents: SAEs need more, the model's stages do not."""
    small, large = (
        plan_study(study_from_data({**data, "sae": {**data["sae"], "expansion": expansion}}))
        for expansion in (4, 4096)
    )
    memory = []
    for plan in (small, large):
        needs = needs_of(plan, [CPUS], gpu=False)
        memory.append({stage.name: needs[stage.identity].memory for stage in all_stages(plan)})
    assert memory[1]["sae"] > memory[0]["sae"] + 1e7
    assert memory[1]["perplexity"] == memory[0]["perplexity"]
    assert memory[0]["fates"] <= min(memory[0].values())


def test_a_node_with_about_as_much_memory_will_do_and_one_with_less_is_refused(plan):
    most = max(need.memory for need in needs_of(plan, [CPUS], gpu=False).values())
    about = Needs(1, 0, int(0.8 * most))
    given = needs_of(plan, [about], gpu=False)
    assert max(need.memory for need in given.values()) == about.memory  # or Ray waits for ever
    for node_there in ([], [Needs(1, 0, int(0.5 * most))], [Needs(0, 8, 10**12)]):
        with pytest.raises(UserError, match=r"--executor: no node .* needs 1 CPU, .* GB") as told:
            needs_of(plan, node_there, gpu=False)
        assert "\n" not in str(told.value)


def test_what_ray_says_of_nodes_is_understood():
    told = [{"CPU": 4.0, "memory": 1e9, "node:10.0.0.1": 1.0}, {"GPU": 2.0, "CPU": 1.0}]
    assert node_needs(told) == [Needs(4, 0, 10**9), Needs(1, 2, 0)]


@pytest.fixture
def order(plan, tmp_path):
    """Of the first stage that has a parent, whose artifact is not there; and its store."""
    store = Store(tmp_path / "artifacts")
    stage = next(stage for stage in all_stages(plan) if stage.parents)
    request = request_of(plan.study, store, "cpu")
    told = node.order_of(request, [stage.identity], device="cpu", log_folder=str(tmp_path / "logs"))
    return told, store, stage


def test_a_node_that_does_not_see_the_folder_refuses(order):
    told, _, _ = order
    with pytest.raises(UserError, match=r"--out: node .* does not see the folder .*artifacts"):
        node.failures_of(node.carry_out(told))


def test_a_node_that_does_not_see_what_another_made_says_so(order, monkeypatch):
    told, store, stage = order
    store.root.mkdir()
    monkeypatch.setattr(shared_folder, "SECONDS_TO_APPEAR", 0.0)
    failures = node.failures_of(node.carry_out(told))
    assert set(failures) == {stage.identity}
    assert re.search(r"does not see .* in .*artifacts", failures[stage.identity])


def test_a_node_with_another_source_refuses(order, monkeypatch):
    facts = json.loads(order[0])
    facts["versions"]["prunelens's source"] = "0"
    with pytest.raises(UserError, match=r"has prunelens's source .*install the same"):
        node.failures_of(node.carry_out(json.dumps(facts)))


def test_a_full_disk_stops_a_study_from_any_node(order, monkeypatch):
    told, store, _ = order
    store.root.mkdir()

    def full(*_):
        raise DiskError("--out: the disk is full")

    monkeypatch.setattr(node, "make_by_identity", full)
    with pytest.raises(DiskError, match="full"):
        node.failures_of(node.carry_out(told))


def test_what_appears_late_is_waited_for(plan, tmp_path, monkeypatch):
    looks = []

    class Slow(Store):
        def has(self, stage):
            looks.append(stage)
            return len(looks) > 3

    monkeypatch.setattr(shared_folder, "SECONDS_BETWEEN_LOOKS", 0.0)
    stage = all_stages(plan)[0]
    assert shared_folder.wait_until_there(Slow(tmp_path), [stage]) == []
    assert len(looks) == 4
    monkeypatch.setattr(shared_folder, "SECONDS_TO_APPEAR", 0.0)
    assert shared_folder.wait_until_there(Store(tmp_path), [stage]) == [stage]


def test_one_module_alone_imports_ray():
    """Everything else works, and is tested, without it."""
    package = pathlib.Path(prunelens.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) ray\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {"study/cluster.py"}


class NoNodesLeft:
    """What `Tasks` uses of Ray: a cluster whose last large node has died."""

    def __init__(self, resources):
        self.resources = resources

    def nodes(self):
        return [{"Alive": True, "Resources": self.resources}]

    def remote(self, function_or_order):
        return NoAnswer() if isinstance(function_or_order, str) else self

    def options(self, **_options):
        return self


class NoAnswer:
    def future(self):
        return Future()


@pytest.mark.parametrize(("num_cpus", "is_given_up"), [(1, True), (8, False)])
def test_a_stage_that_no_node_is_left_for_ends_the_study_in_one_line(
    plan, monkeypatch, caplog, num_cpus, is_given_up
):
    monkeypatch.setattr(cluster, "SECONDS_FOR_ANOTHER_NODE", 0.05)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.01)
    ray = NoNodesLeft({"CPU": num_cpus, "memory": 10**11})
    stage = next(stage for stage in all_stages(plan) if stage.name == "sae")
    needs = {stage.identity: Needs(8, 0, 10**9)}
    tasks = cluster.Tasks(ray, needs, request="{}", log_folder="logs", at_once=None)
    with tasks.watched():
        told = tasks.submit([stage])
        concurrent.futures.wait([told], timeout=5 if is_given_up else 0.5)
    assert told.done() == is_given_up
    if is_given_up:
        assert re.search(
            r"no node .* can make 'sae .*needs 8 CPU.*have: 1 CPU", str(told.exception())
        )
        assert len([r for r in caplog.records if "waiting up to" in r.getMessage()]) == 1
