"""Files of a study folder that comes from someone else, or was damaged: told, not obeyed."""

import json
import os

import pytest

from prunelens.report.page import _environment_rows
from prunelens.study.folder import RUN_COLUMNS, read_runs

HEAD = ",".join(RUN_COLUMNS)


def test_a_reason_that_looks_like_a_number_is_text(tmp_path):
    (tmp_path / "runs.csv").write_text(f"{HEAD}\n007,m,0,dense,,,0,failed,1,2\n")
    (row,) = read_runs(tmp_path).to_dict("records")
    assert (row["run"], row["status"], row["reason"]) == ("007", "failed", "1")
    assert (row["layer"], row["wall_seconds"]) == (0, 2)


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_table_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "runs.csv")
    os.mkfifo(tmp_path / "environment.json")
    assert read_runs(tmp_path).empty
    assert _environment_rows(tmp_path / "environment.json") == []


@pytest.mark.parametrize(
    "content",
    [b"[1]", b'"text"', b"1", b"null", b"\xff", b"{", b"[" * 100_000, b'{"libraries": 5}'],
)
def test_a_broken_environment_is_told_on_the_page(tmp_path, content):
    path = tmp_path / "environment.json"
    path.write_bytes(content)
    assert _environment_rows(path) == [("environment.json", "damaged")]
    path.write_text(json.dumps({"python": 3, "libraries": {"torch": "2"}}))
    assert _environment_rows(path) == [("python", "3"), ("torch", "2")]
