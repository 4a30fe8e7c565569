"""The Ray executor on a real cluster of several nodes, all of them on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from faults.kill import differences, on_a_busy_machine, results_of
from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.tables import write_tables
from prunelens.study import cluster as executor
from prunelens.study import node as on_node
from prunelens.study.alone import alone_in
from prunelens.study.folder import open_study
from prunelens.study.results import study_results
from prunelens.study.run import run_study
from s3_server import s3_server
from tiny_study import run_with_pool, tiny_study, write_text

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'prunelens[ray]'", allow_module_level=True)

os.environ.update(executor.NO_TELEMETRY | executor.LOOPBACK)  # before Ray is imported
# Ray gives the server of a client from outside 30 s to start, too little on a busy machine.
os.environ["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "150"

WORKER = {"num_cpus": 1, "memory": 8e9, "object_store_memory": 80_000_000}
CLIENT_PORT = 20000 + os.getpid() % 10000  # no two test processes share one
HERE = {"node_ip_address": "127.0.0.1"}
UNDRAWN = """
from prunelens.cli import main
from prunelens.report import write
write.write_figures = write.write_page = lambda *_: None  # which would take longer than the study
main()
"""


@pytest.fixture(scope="module")
def two_prunings(checkpoint_folder, tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    study = tiny_study(checkpoint_folder, text)
    return {**study, "questions": ["stability", "survival", "persistence"]}


@pytest.fixture(scope="module")
def data(two_prunings):
    return {**two_prunings, "prunings": two_prunings["prunings"][1:]}


@pytest.fixture(scope="module")
def local(data, tmp_path_factory, pool):
    """The study of one process on one machine."""
    out = tmp_path_factory.mktemp("local") / "out"
    run_with_pool(study_from_data(data), out, pool, run_study)
    return out


@pytest.fixture(scope="module")
def expected(local):
    """The tables that it gives."""
    return tables_of(local)


@pytest.fixture(scope="module")
def bucket():
    """Of an object store whose address and keys are in the environment that nodes inherit."""
    with s3_server() as server:
        yield server.bucket


@pytest.fixture(scope="module")
def nodes(bucket):
    """A cluster of a head that computes nothing and two nodes that do; one counts a GPU."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**WORKER, **HERE, "num_cpus": 0, "include_dashboard": False}
    head["ray_client_server_port"] = CLIENT_PORT
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for gpus in (0, 1):
            cluster.add_node(**WORKER, **HERE, num_gpus=gpus)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(data, out, **options):
    options = {"executor": "ray", "device": "cpu", "quiet": True, **options}
    with alone_in(out):
        return run_study(study_from_data(data), out, **options)


def tables_of(out):
    plan, store = open_study(out)
    write_paper_tables(write_tables(study_results(plan, store), out), plan.study, out)
    return results_of(out)


def begun(local, out, *kinds):
    """The study of one process, in which artifacts of these kinds and all results are missing."""
    shutil.copytree(local, out)
    for part in ("tables", *(f"artifacts/{kind}" for kind in kinds)):
        shutil.rmtree(out / part)
    for name in ("latents.parquet", "runs.csv"):
        (out / name).unlink()
    return out


def tasks_of(node):
    """What the processes of a node are at, by process: Ray names them after their tasks."""
    raylet = node.all_processes["raylet"][0].process
    found = {}
    for process in psutil.Process(raylet.pid).children():
        words = " ".join(process.cmdline())
        if words.startswith("ray::") and not words.startswith("ray::IDLE"):
            found[process.pid] = words.removeprefix("ray::")
    return found


def still_works(process):
    """A zombie does not: in a container nobody may ever ask how an orphan ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "127.0.0.1:1"}, ["--address", "'127.0.0.1:1'", "refused", "10.0.0.1:6379"]),
        ({"address": "ray://127.0.0.1:1"}, ["--address", "refused"]),
        ({"address": "nonsense"}, ["--address", "'nonsense'", "auto"]),
        ({"address": "[x"}, ["--address", "'[x'", "10.0.0.1:6379"]),
        ({"address": "ray://[x"}, ["--address", "'ray://[x'", "10.0.0.1:6379"]),
        ({"address": "http://127.0.0.1:1"}, ["--address", "'http://127.0.0.1:1'", "ray://"]),
        ({"executor": "local", "address": "auto"}, ["--address", "--executor ray"]),
        ({"executor": "dask"}, ["--executor", "'dask'", "local, ray"]),
    ],
)
def test_a_wrong_address_is_told_in_one_line(data, tmp_path, options, words):
    with pytest.raises(UserError) as told:
        run(data, tmp_path / "out", **options)
    assert all(word in str(told.value) for word in words), told.value
    assert "\n" not in str(told.value)


def test_without_ray_the_extra_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'prunelens\[ray\]'"):
        run(data, tmp_path / "out")


IN_A_FRESH_PROCESS = """
import json, os, sys
if sys.argv[1] == "imported":
    import ray
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # too late
from prunelens.errors import UserError
from prunelens.study import cluster
NAMES = ["RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
NAMES += ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN"]
seen, variables = [], lambda: [os.environ.get(name) for name in NAMES]
cluster._connect = lambda *_: seen.append(variables())
before = variables()
try:
    for _ in range(2):
        with cluster._connected(None):
            pass
except UserError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps(seen))
assert variables() == before, variables()
"""


def test_a_ray_of_this_machine_is_closed_and_leaves_the_environment_as_it_was():
    """And a second one of the same process gets the same token: Ray reads it but once."""
    first, second = in_a_fresh_process("not imported", {})
    assert first == second
    assert first[:3] == ["0", "0", "token"] and len(first[3]) == 64


def test_a_ray_that_would_be_open_is_refused():
    told = in_a_fresh_process("imported", {})
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before ray is imported" in told
    assert "--address" in told and "\n" not in told
    first, second = in_a_fresh_process("imported", executor.LOOPBACK)
    assert first == second == ["0", "0", None, None], "Ray has read by now how it is to be asked"


def in_a_fresh_process(order, given):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, order]
    done = subprocess.run(command, env=environment | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_study_that_loses_a_node_ends_with_the_tables_of_one_process(
    data, local, expected, nodes, tmp_path
):
    """The node that is killed is training an SAE."""
    begun(local, tmp_path / "out", "sae", "prune", "survival", "persistence")
    lost = []

    def kill_a_node_that_trains() -> None:
        while not lost:
            for node in list(nodes.worker_nodes):
                if any(label.startswith("sae ") for label in tasks_of(node).values()):
                    nodes.remove_node(node, allow_graceful=False)
                    lost.append(node)
                    return
            time.sleep(0.01)

    watcher = threading.Thread(target=kill_a_node_that_trains, daemon=True)
    watcher.start()
    outcome = run(data, tmp_path / "out")
    assert lost
    assert {result.status for result in outcome.results} == {"done"}
    assert differences(expected, tables_of(tmp_path / "out")) == []
    assert run(data, tmp_path / "out").num_executed == 0
    nodes.add_node(**WORKER, **HERE, num_gpus=lost[0]._ray_params.num_gpus)


def test_artifacts_in_an_object_store_give_the_same_tables(data, expected, nodes, bucket, tmp_path):
    outcome = run(data, tmp_path / "out", artifacts=f"{bucket}/ray")
    assert {result.status for result in outcome.results} == {"done"}
    assert differences(expected, tables_of(tmp_path / "out")) == []


def test_damage_in_a_finished_study_is_mended_by_the_cluster_alone(data, local, tmp_path):
    """Not by this process, which may have another device, and would say nothing of it."""
    folder = shutil.copytree(local, tmp_path / "copy")
    assert run(data, folder, address="127.0.0.1:1").num_executed == 0  # which is not asked
    sae = next((folder / "artifacts" / "sae").iterdir())
    (sae / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"--address: .*'127\.0\.0\.1:1'"):
        run(data, folder, address="127.0.0.1:1")


def test_a_stage_that_kills_its_process_twice_fails_its_run_alone(
    two_prunings, nodes, tmp_path, monkeypatch
):
    kills = tmp_path / "kills"
    kills.mkdir()

    def deadly(order):
        from prunelens.study.worker import stages_of

        facts = json.loads(order)
        if any("wanda" in stages_of(facts["request"])[i].label for i in facts["identities"]):
            (kills / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return on_node.carry_out(order)

    monkeypatch.setattr(executor, "carry_out", deadly)
    outcome = run({**two_prunings, "questions": ["survival"]}, tmp_path / "out")
    ends = {result.run.name.rpartition("/")[2]: result for result in outcome.results}
    failed = {name for name, result in ends.items() if result.status == "failed"}
    assert failed == {"wanda-row-0.30"}
    assert "died twice" in ends["wanda-row-0.30"].reason
    assert len(list(kills.iterdir())) % 2 == 0  # and Ray tried none of them again by itself


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"threads_per_stage": 99}, {}, ["99 CPU", "1 CPU", "threads_per_stage"]),
        ({}, {"device": "cuda:1"}, ["--device", "'cuda:1'", "auto, cpu, cuda"]),
        ({}, {"address": "127.0.0.1:1"}, ["--address", "'127.0.0.1:1'", "connected to"]),
    ],
)
def test_what_no_node_can_give_is_told_in_one_line(data, nodes, tmp_path, change, options, words):
    with pytest.raises(UserError) as told:
        run({**data, **change}, tmp_path / "out", **options)
    assert all(word in str(told.value) for word in words)
    assert "\n" not in str(told.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used here")
def test_a_gpu_that_torch_cannot_use_is_told_and_not_passed_over(data, nodes, tmp_path):
    with pytest.raises(UserError, match=r"Ray counts a GPU on node .* cannot use one"):
        run(data, tmp_path / "out", device="auto")


def test_nodes_with_other_code_are_refused(data, nodes, tmp_path, monkeypatch):
    driver = {**on_node.what_numbers_depend_on(), "torch": "1.0"}
    monkeypatch.setattr(on_node, "what_numbers_depend_on", lambda: driver)
    with pytest.raises(UserError, match=r"node .* has torch .*, the machine .* 1\.0; install"):
        run(data, tmp_path / "out")


@pytest.mark.timeout(600)
def test_a_ray_of_this_machine_is_closed_to_others_ends_at_once_and_leaves_nothing(
    data, local, expected, nodes, tmp_path
):
    """Ctrl-C in the middle; then the cluster, reached from outside, finishes what was begun."""
    study, out = tmp_path / "study.json", begun(local, tmp_path / "out", "sae", "persistence")
    study.write_text(json.dumps(data))
    command = [
        sys.executable,
        "-c",
        UNDRAWN,
        "run",
        str(study),
        "--out",
        str(out),
        "--executor",
        "ray",
    ]
    command += ["--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not list(out.glob("artifacts/sae/*/meta.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        listening = [
            connection.laddr.ip.removeprefix("::ffff:")
            for member in [psutil.Process(process.pid), *family]
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        seconds = time.monotonic() - started
    assert set(listening) == {"127.0.0.1"}
    assert process.returncode == 130
    assert seconds < on_a_busy_machine(5.0)
    assert [member for member in family if still_works(member)] == []
    command += ["--address", f"ray://127.0.0.1:{CLIENT_PORT}", "--json"]
    environment |= executor.LOOPBACK
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["executed"] > 0
    assert differences(expected, tables_of(out)) == []
