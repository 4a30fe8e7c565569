"""A clock that jumps, and a folder that cannot be written to."""

import ctypes
import json
import os
import random
import subprocess
import sys
import time

import pandas as pd
import pytest

from faults.kill import COMMAND, results_of
from prunelens.report import write
from prunelens.report.write import run_and_report


def test_nothing_depends_on_the_clock(finished, tmp_path, monkeypatch):
    """Every look at it gives another year; files get times from all over."""
    generator = random.Random(0)
    real_ns, real_replace = time.time_ns, os.replace

    def jumping():
        return real_ns() / 1e9 + generator.uniform(-1e8, 1e8)

    def replace(source, target, **options):
        moment = jumping()
        os.utime(source, (moment, moment))
        real_replace(source, target, **options)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    monkeypatch.setattr(os, "replace", replace)
    folder = tmp_path / "out"
    run_and_report(finished.study, folder, quiet=True)
    assert results_of(folder) == finished.results
    assert (pd.read_csv(folder / "runs.csv")["wall_seconds"] >= 0).all()
    for path in folder.glob("artifacts/*/*/meta.json"):
        assert 0 <= json.loads(path.read_text())["wall_seconds"] < 60
    assert run_and_report(finished.study, folder, quiet=True).num_executed == 0


def test_what_was_drawn_is_not_told_by_times(finished, tmp_path, monkeypatch):
    folder = finished.copy(tmp_path / "copy")
    (folder / "report.html").write_text("drawn")
    drawn = []
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: drawn.append(1))
    (folder / ".drawn").write_text(write._sha256_of_results(folder))
    os.utime(folder / "report.html", (0, 0))
    run_and_report(finished.study, folder, quiet=True)
    assert not drawn
    os.utime(folder / "report.html", (2e9, 2e9))  # "younger" than what is changed now
    (folder / ".drawn").unlink()
    run_and_report(finished.study, folder, quiet=True)
    assert drawn


def drop_the_right_to_write_everywhere():
    """Root's; a file's permissions hold for it then as for everybody."""
    dropped_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(dropped_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root's rights are dropped as Linux has it")
def test_a_read_only_folder_is_told_in_one_line(tiny_data, tmp_path):
    study, folder = tmp_path / "study.json", tmp_path / "out"
    study.write_text(json.dumps(tiny_data))
    folder.mkdir(mode=0o555)
    result = subprocess.run(
        [*COMMAND, "run", str(study), "--out", str(folder), "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=drop_the_right_to_write_everywhere,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "cannot write to" in result.stderr, result.stderr
    assert not list(folder.iterdir())
