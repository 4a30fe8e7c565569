"""Ctrl-C and SIGTERM: an end within seconds, one line, and the same command goes on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

from faults.kill import (
    leftovers,
    num_artifacts,
    on_a_busy_machine,
    results_of,
    start,
    start_at_once,
    wait_for_orphans,
)

SECONDS = 5.0
# seconds to wait after so many artifacts; workers; signal; whether the whole group gets it
MOMENTS = [
    (0.0, 0, 1, signal.SIGTERM, False),  # while it imports
    (0.0, 0, 1, signal.SIGINT, True),
    (1.0, 0, 1, signal.SIGINT, True),
    (2.5, 0, 2, signal.SIGTERM, False),
    (0.2, 3, 1, signal.SIGINT, False),
    (0.5, 8, 2, signal.SIGINT, True),
    (0.3, 14, 1, signal.SIGTERM, True),
    (0.5, 20, 2, signal.SIGTERM, False),
    (0.2, 26, 2, signal.SIGINT, False),
]


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux tells it")
@pytest.mark.timeout(1200)
def test_stopped_again_and_again_it_ends_with_the_same_files(finished, tiny_data, tmp_path):
    study, folder = tmp_path / "study.json", tmp_path / "out"
    study.write_text(json.dumps(tiny_data))
    for delay, artifacts, workers, number, whole_group in MOMENTS:
        moment = (delay, artifacts, workers, number, whole_group)
        if artifacts:
            process = start_at_once(str(study), folder, workers=workers)
        else:
            process = start(str(study), folder, workers=workers, stderr=subprocess.PIPE)
        while process.poll() is None and not (
            _listens(process.pid) and num_artifacts(folder) >= artifacts
        ):
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, f"{moment} came too late"
        sent = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - sent < on_a_busy_machine(SECONDS), moment
        assert process.returncode == (130 if number == signal.SIGINT else 143), (moment, said)
        assert said == "prunelens: stopped; the same command goes on from here\n", moment
        assert not wait_for_orphans(process.pid, on_a_busy_machine(SECONDS)), moment
    process = start_at_once(str(study), folder, workers=2)
    assert process.wait(600) == 0
    assert results_of(folder) == finished.results and not leftovers(folder)


def _listens(process: int) -> bool:
    """Whether it has taken SIGTERM over: before that Python itself is still starting."""
    status = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
