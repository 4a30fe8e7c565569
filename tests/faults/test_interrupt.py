"""Ctrl-C and SIGTERM: an end within seconds, one line, and the same command goes on."""

import json
import os
import signal
import subprocess
import time

import pytest

from faults.kill import leftovers, num_artifacts, results_of, start, wait_for_orphans

SECONDS = 5.0
# seconds to wait, or artifacts to wait for; workers; signal; whether the whole group gets it
MOMENTS = [
    (1.0, 0, 1, signal.SIGINT, True),
    (2.5, 0, 2, signal.SIGTERM, False),
    (0.2, 3, 1, signal.SIGINT, False),
    (0.5, 8, 2, signal.SIGINT, True),
    (0.3, 14, 1, signal.SIGTERM, True),
    (0.5, 20, 2, signal.SIGTERM, False),
    (0.2, 26, 2, signal.SIGINT, False),
]


@pytest.mark.timeout(1200)
def test_stopped_again_and_again_it_ends_with_the_same_files(finished, tiny_data, tmp_path):
    study, folder = tmp_path / "study.json", tmp_path / "out"
    study.write_text(json.dumps(tiny_data))
    for delay, artifacts, workers, number, whole_group in MOMENTS:
        moment = (delay, artifacts, workers, number, whole_group)
        process = start(str(study), folder, workers=workers, stderr=subprocess.PIPE)
        while num_artifacts(folder) < artifacts and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, f"{moment} came too late"
        sent = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - sent < SECONDS, moment
        assert process.returncode == (130 if number == signal.SIGINT else 143), (moment, said)
        assert said == "prunelens: stopped; the same command goes on from here\n", moment
        assert not wait_for_orphans(process.pid, SECONDS), moment
    process = start(str(study), folder, workers=2)
    assert process.wait(600) == 0
    assert results_of(folder) == finished.results and not leftovers(folder)
