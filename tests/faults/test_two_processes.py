"""Two processes on one study folder: with its lock, and where the lock is of no help."""

import collections
import contextlib
import json
import os
import subprocess
import sys
import time

import pytest

from faults.kill import leftovers, results_of, start

# Notes every stage that is made, and by whom. After its first SAE the first process waits until the
# other one has begun a stage, because on a busy machine it might have ended by then.
NOTING = """
import os, time
from prunelens.study import stages
from prunelens.study.artifacts.claims import Claims
begin, hold, begun = stages.Work.__init__, Claims.holding, set()
def noting(self, stage, *rest):
    begun.add(stage.name)
    with open(os.environ["MADE"], "a") as made:
        made.write(f"{os.getpid()} {stage.name} {stage.identity}\\n")
    begin(self, stage, *rest)
def patient(self, identity):
    until = time.monotonic() + 200
    while "sae" in begun and len(makers()) == 1 and time.monotonic() < until:
        time.sleep(0.02)
    return hold(self, identity)
def makers():
    with open(os.environ["MADE"]) as made:
        return {line.split()[0] for line in made}
stages.Work.__init__, Claims.holding = noting, patient
from prunelens.cli import main
main()
"""


@pytest.fixture
def study(tiny_data, tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps(tiny_data))
    return path


def noting(study, folder, made):
    command = [sys.executable, "-c", NOTING, "run", str(study), "--out", str(folder), "--quiet"]
    return subprocess.Popen(
        [*command, "--workers", "1", "--device", "cpu"],
        env={**os.environ, "MADE": str(made)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(900)
def test_with_and_without_the_lock(finished, study, tmp_path):
    folder, made = tmp_path / "out", tmp_path / "made"
    first = noting(study, folder, made)
    while not (made.is_file() and " sae " in made.read_text()):
        assert first.poll() is None
        time.sleep(0.01)
    refused = start(str(study), folder, stderr=subprocess.PIPE)
    _, said = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert said.count("\n") == 1 and "another prunelens works in" in said, said
    with contextlib.suppress(FileNotFoundError):
        (folder / ".lock").unlink()
    second = noting(study, folder, made)
    (_, said_first), (_, said_second) = first.communicate(timeout=600), second.communicate()
    assert (first.returncode, second.returncode) in ((2, 0), (0, 0)), (said_first, said_second)
    if first.returncode == 2:
        assert said_first.count("\n") == 1 and "was removed while this worked" in said_first
    lines = [line.split() for line in made.read_text().splitlines()]
    assert {pid for pid, *_ in lines} == {str(first.pid), str(second.pid)}, "both took part"
    kept = collections.Counter(identity for _, name, identity in lines if name != "activations")
    assert sum(count - 1 for count in kept.values()) <= 1, kept.most_common(3)
    assert results_of(folder) == finished.results and not leftovers(folder)


def test_an_artifact_that_another_process_has_published_stays(tmp_path):
    """Where neither lock nor claim can be seen, as on another host."""
    from prunelens.study.artifacts.store import Stage, Store

    stage = Stage("sae", 1, {"k": 4}, {})
    store, other = Store(tmp_path), Store(tmp_path)
    with store.writing(stage) as mine:
        (mine / "a.txt").write_text("same")
        with other.writing(stage) as theirs:
            (theirs / "a.txt").write_text("same")
        published = (store.folder(stage) / "a.txt").stat().st_ino
    assert (store.read(stage) / "a.txt").stat().st_ino == published
    assert [path.name for path in (tmp_path / "sae").iterdir()] == [stage.identity]


CLAIMING = """
import pathlib, sys, time
from prunelens.study.artifacts.claims import Claims
with Claims(pathlib.Path(sys.argv[1])).holding("x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_claim_ends_with_its_process(tmp_path):
    from prunelens.study.artifacts.claims import Claims

    claims = Claims(tmp_path / ".claims")
    command = [sys.executable, "-c", CLAIMING, str(tmp_path / ".claims")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert not claims.is_free("x") and claims.is_free("y")
        process.kill()
    assert claims.is_free("x")
    with claims.holding("x"):
        pass


def test_what_is_being_written_is_not_swept(tmp_path):
    from prunelens.study.artifacts.store import Store

    left = tmp_path / "sae" / "x.123.tmp"
    left.mkdir(parents=True)
    command = [sys.executable, "-c", CLAIMING, str(tmp_path / ".claims")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        Store(tmp_path).sweep_temporary()
        assert left.exists()
        process.kill()
    Store(tmp_path).sweep_temporary()
    assert not left.exists()
