"""A disk that fills up stops the study at once, in one line, and nothing is corrupt."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import tempfile
import time

import pytest
from safetensors import SafetensorError

from faults.kill import leftovers, num_artifacts, results_of, start_at_once
from prunelens.config import study_from_data
from prunelens.report.write import run_and_report
from prunelens.study import local
from prunelens.study.artifacts.disk import DiskError, stopped_by_disk
from prunelens.study.plan import plan_study

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.timeout(1200)
def test_a_full_disk_at_every_kind_of_stage(finished, tmp_path, monkeypatch):
    """Each kind in turn cannot be flushed; the next attempt goes on from there."""
    from prunelens.study.artifacts import store

    folder, full, stopped = tmp_path / "out", set(), []
    real = store.flush
    kinds = {stage.name for run in plan_study(finished.study).runs for stage in run.stages.values()}
    kinds |= {"sae", "predictor"}

    def flush(path):
        kind = next((kind for kind in full if f"/{kind}/" in f"{path}/"), None)
        if kind is not None and path.is_file():
            stopped.append(kind)
            raise FULL
        real(path)

    monkeypatch.setattr(store, "flush", flush)
    full.update(kinds)
    while full:
        before = len(stopped)
        with pytest.raises(
            DiskError, match=r"the disk of .*out' is full \(.* free there\)"
        ) as told:
            run_and_report(finished.study, folder, quiet=True)
        assert "\n" not in str(told.value)
        assert len(stopped) == before + 1, "the first stage that cannot be written ends the study"
        assert not list(folder.rglob("*.tmp"))
        full.remove(stopped[-1])
    assert set(stopped) == kinds
    outcome = run_and_report(finished.study, folder, quiet=True)
    assert {result.status for result in outcome.results} == {"done"}
    assert results_of(folder) == finished.results


def told(error, folder):
    with pytest.raises(DiskError) as caught, stopped_by_disk(folder):
        raise error
    return str(caught.value)


def system_error(number, filename=None):
    return OSError(number, os.strerror(number), *((str(filename),) if filename else ()))


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    """The study's disk, another one, the folder for temporary files; a limit is no full disk."""
    out, scratch, other = tmp_path / "out", tmp_path / "scratch", tmp_path / "other"
    for folder in (out, scratch, other):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for place, field in ((out, "--out"), (scratch, "TMPDIR"), (other, "disk")):
        for number in (errno.ENOSPC, errno.EROFS, errno.EFBIG):
            said = told(system_error(number, place / "x"), out)
            assert said.startswith(f"{field}: ") and repr(str(place)) in said
    assert "larger than its file system takes" in told(system_error(errno.EFBIG), out)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40960, 40960))
    error = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    assert told(error, out) == (
        f"--out: a file in {str(out)!r} would be larger than the 40,960 bytes that this process may"
        " write (`ulimit -f`); raise that limit, then run the same command again"
    )


def test_a_limit_on_files_stops_a_study_and_damages_nothing(tiny_data, tmp_path, monkeypatch):
    """The first large file; before, every stage failed for itself."""
    from prunelens.study import model_stages

    def fail(*_, **__):
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr(model_stages, "save_file", fail)
    with pytest.raises(DiskError, match="would be larger than"):
        run_and_report(study_from_data(tiny_data), tmp_path / "out", quiet=True)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/artifacts/damaged").exists()


def test_what_several_processes_need_is_named(tmp_path, monkeypatch):
    """Semaphores in /dev/shm: not the study's disk."""

    def no_semaphores(*_, **__):
        raise system_error(errno.EROFS)

    monkeypatch.setattr(local, "ProcessPoolExecutor", no_semaphores)
    with (
        pytest.raises(DiskError) as caught,
        stopped_by_disk(tmp_path),
        local.processes(2, device="cpu", request="", log_folder=tmp_path),
    ):
        raise AssertionError
    said = str(caught.value)
    assert said.startswith("--workers: ") and "/dev/shm" in said and "--workers 1" in said
    assert str(tmp_path) not in said


@pytest.mark.parametrize("place", ["tables", "latents.parquet", "figures", "report.html"])
def test_a_full_disk_while_results_are_written(finished, tmp_path, monkeypatch, place):
    import pandas as pd

    from prunelens.report import tables, write

    folder = finished.copy(tmp_path / "copy")
    for path in (folder / "tables").iterdir():
        path.unlink()

    def fail(*_, **__):
        raise FULL

    with pytest.MonkeyPatch.context() as patch:
        if place == "tables":
            patch.setattr(tables, "replacing", fail)
        elif place == "latents.parquet":
            patch.setattr(pd.DataFrame, "to_parquet", fail)
        else:
            patch.setattr(write, "write_figures" if place == "figures" else "write_page", fail)
        with pytest.raises(DiskError, match="is full"):
            run_and_report(finished.study, folder, quiet=True)
    drawn = []
    monkeypatch.setattr(write, "write_page", lambda *_: drawn.append(1))
    assert run_and_report(finished.study, folder, quiet=True).num_executed == 0
    assert drawn, "what was not drawn is drawn now"
    assert results_of(folder) == finished.results


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own; skips where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk, and not in every container")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path):
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.timeout(900)
def test_a_real_full_disk_and_a_real_read_only_one(finished, tiny_data, tmp_path):
    """The error comes from the system, through whichever library writes, in a worker."""
    study = tmp_path / "study.json"
    study.write_text(json.dumps(tiny_data))
    disk = tmp_path / "disk"

    def run(*, fill_at=None):
        process = start_at_once(str(study), disk / "out", workers=2)
        while fill_at and num_artifacts(disk / "out") < fill_at and process.poll() is None:
            time.sleep(0.01)
        if fill_at:
            fill(disk / "ballast")
        _, said = process.communicate(timeout=600)
        return process.returncode, said.strip().splitlines()

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

    with small_disk(disk, "64m"):
        there = num_artifacts(finished.copy_without(disk / "out", "sae", "transfer"))
        code, said = run(fill_at=there + 3)
        assert code == 2 and len(said) == 1, said
        assert "disk of" in said[0] and "is full" in said[0] and "free there" in said[0]
        (disk / "ballast").unlink()
        remount("ro")
        code, said = run()
        assert code == 2 and len(said) == 1 and "cannot write to" in said[0], said
        remount("rw")
        code, said = run()
        assert code == 0, said
        assert results_of(disk / "out") == finished.results and not leftovers(disk / "out")
