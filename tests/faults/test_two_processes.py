"""Two processes on one study folder: with its lock, and where the lock is of no help."""

import collections
import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings

import pytest

import warm
from faults.kill import leftovers, results_of, start_at_once
from prunelens.errors import UserError
from prunelens.report.write import run_and_report, write_report
from prunelens.study.alone import alone_in
from prunelens.study.artifacts.locks import NO_LOCKS, warn_of_no_locks
from prunelens.study.executor import Here
from prunelens.study.run import run_study
from prunelens.study.work import Work

fcntl = pytest.importorskip("fcntl", reason="Windows has neither such locks nor these faults")

# Notes every stage that is made, and by whom. After its first SAE the first process waits until the
# other one has begun a stage, because on a busy machine it might have ended by then.
NOTING = """
import os, time
from prunelens.study import stages
from prunelens.study.artifacts.locks import Locks
begin, hold, begun = stages.Work.__init__, Locks.holding, set()
def noting(self, stage, *rest):
    begun.add(stage.name)
    with open(os.environ["MADE"], "a") as made:
        read = [parent.identity for parent in stage.parents.values()]
        made.write(" ".join([str(os.getpid()), stage.name, stage.identity, *read]) + "\\n")
    begin(self, stage, *rest)
def patient(self, identity):
    until = time.monotonic() + 200
    while "sae" in begun and len(makers()) == 1 and time.monotonic() < until:
        time.sleep(0.02)
    return hold(self, identity)
def makers():
    with open(os.environ["MADE"]) as made:
        return {line.split()[0] for line in made}
stages.Work.__init__, Locks.holding = noting, patient
from prunelens.report import write
write.write_figures = write.write_page = lambda *_: None  # which would take longer than the study
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
    return warm.Popen(
        [*command, "--workers", "1", "--device", "cpu"],
        env={**os.environ, "MADE": str(made)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(900)
def test_with_and_without_the_lock(finished, study, tmp_path):
    folder, made = tmp_path / "out", tmp_path / "made"
    finished.copy_without(folder, "sae", "survival", "transfer")
    first = noting(study, folder, made)
    while not (made.is_file() and " sae " in made.read_text()):
        assert first.poll() is None
        time.sleep(0.01)
    refused = start_at_once(str(study), folder)
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
    kept = collections.Counter(line[2] for line in lines if line[1] != "activations")
    assert sum(count - 1 for count in kept.values()) <= 1, kept.most_common(3)
    stores = [(number, line[2]) for number, line in enumerate(lines) if line[1] == "activations"]
    read = [any(identity in line[3:] for line in lines[number:]) for number, identity in stores]
    assert read.count(False) <= 1, "activations were made that nobody read"
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
from prunelens.study.artifacts.locks import Locks
with Locks(pathlib.Path(sys.argv[1])).holding("x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_claim_ends_with_its_process(tmp_path):
    from prunelens.study.artifacts.locks import Locks

    claims = Locks(tmp_path / ".claims")
    command = [sys.executable, "-c", CLAIMING, str(tmp_path / ".claims")]
    with warm.Popen(command, stdout=subprocess.PIPE, text=True) as process:
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
    with warm.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        Store(tmp_path).sweep_temporary()
        assert left.exists()
        process.kill()
    Store(tmp_path).sweep_temporary()
    assert not left.exists()


def test_what_the_other_has_made_meanwhile_needs_no_activations(finished, tmp_path, monkeypatch):
    """The other process ends the study while this one is about to make its second SAE."""
    folder = finished.copy_without(tmp_path / "out", "sae", "persistence")
    made, submit = [], Here.submit

    def noting(work, stage, *rest):
        made.append(stage)
        begin(work, stage, *rest)

    def overtaken(here, group):
        if group[0].name == "sae" and any(stage.name == "sae" for stage in made):
            monkeypatch.setattr(Here, "submit", submit)
            run_study(finished.study, folder, device="cpu", quiet=True)
            made.clear()
        return submit(here, group)

    begin = Work.__init__
    monkeypatch.setattr(Work, "__init__", noting)
    monkeypatch.setattr(Here, "submit", overtaken)
    run_and_report(finished.study, folder, quiet=True)
    assert Here.submit is submit and not made, [stage.label for stage in made]
    assert results_of(folder) == finished.results and not leftovers(folder)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_it_is_said_once_and_the_study_is_made(
    finished, tmp_path, monkeypatch, caplog, number
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    folder = finished.copy(tmp_path / "copy")
    shutil.rmtree(folder / "artifacts" / "fragility")
    (folder / ".lock").write_text("left by a process that was killed")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(action="error"):
        outcome = run_and_report(finished.study, folder, quiet=True)
    assert outcome.num_executed > 0
    assert [record.getMessage() for record in caplog.records] == [
        "the study folder cannot be locked: run one prunelens there at a time"
    ]
    assert results_of(folder) == finished.results


def test_no_right_to_lock_is_no_want_of_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="cannot write to"), alone_in(tmp_path / "out"):
        pass


def test_nothing_is_drawn_beside_a_run(finished, tmp_path):
    """What a run changes meanwhile would be certified as what was drawn."""
    folder = finished.copy(tmp_path / "copy")
    before = contents(folder)
    with alone_in(folder), pytest.raises(UserError, match="another prunelens works in"):
        write_report(folder)
    assert contents(folder) == before
    write_report(folder)
    assert (folder / ".drawn").is_file()


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


WRITING = """
import pathlib, sys
from prunelens.study.folder import _write
for number in range(300):
    _write(pathlib.Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_a_file_of_the_folder_bears_two_writers(tmp_path):
    """Where the lock is gone, both tell what the study is before one of them finds out."""
    path = tmp_path / "runs.csv"
    dead, live = (tmp_path / f".runs.csv.{part}.tmp" for part in (_owner(2**22 + 1), _owner(1)))
    dead.write_text("half")
    live.write_text("half")
    writers = [warm.Popen([sys.executable, "-c", WRITING, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(tmp_path.iterdir()) == [live, path]


def _owner(process):
    from prunelens.temporary import temporary_beside

    name = temporary_beside(pathlib.Path("x")).name
    return name.split(".")[1].replace(f"-{os.getpid()}-", f"-{process}-")
