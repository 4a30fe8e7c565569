"""Workers: how they are started, and that nothing of them is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from prunelens.study.worker import fork_server, worker_context

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


@linux
@pytest.mark.parametrize("at_once", [True, False])
def test_the_process_that_workers_are_forked_from_ends_with_its_block(at_once):
    """Also where it is still importing, and where it was never needed; and another one follows."""
    with fork_server("cpu", at_once=at_once):
        servers = _fork_servers()
        assert len(servers) == at_once
    assert not _fork_servers()
    if at_once:
        context = worker_context("cpu")
        with fork_server("cpu", at_once=False):
            process = context.Process(target=os.getpid)
            process.start()
            process.join()
            assert process.exitcode == 0 and not set(_fork_servers()) & set(servers)


def _fork_servers():
    """Those of this process that run."""
    children = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    return [c for c in children if any("forkserver" in word for word in c.cmdline())]


def test_no_worker_for_a_gpu_is_forked():
    assert worker_context("cuda").get_start_method() == "spawn"


_WAITING = """
import multiprocessing, sys, time
from prunelens.study.worker import die_with_parent
def wait():
    die_with_parent()
    time.sleep(60)
if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=wait)
    process.start()
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "method", [m for m in ("spawn", "forkserver") if m in multiprocessing.get_all_start_methods()]
)
def test_a_worker_ends_when_what_started_it_is_killed(method, tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(_WAITING)
    command = [sys.executable, str(script), method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = psutil.Process(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 50
    while (
        worker.is_running()
        and worker.status() != psutil.STATUS_ZOMBIE
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
