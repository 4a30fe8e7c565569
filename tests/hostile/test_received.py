"""Files of a study folder that comes from someone else, or was damaged: told, not obeyed."""

import json
import os
import socket

import pytest

from prunelens.errors import UserError
from prunelens.report.page import _environment_rows
from prunelens.study.artifacts.address import PLACE_FILE, artifacts_of
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


@pytest.fixture
def their_server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


def of_a_stranger(folder, address):
    """A study folder whose artifacts are said to be at an address."""
    (folder / "study.yaml").write_text(
        "models: [{name: bundled, layers: [2]}]\ncorpus: {source: stdlib}\n"
    )
    (folder / PLACE_FILE).write_text(json.dumps({"artifacts": address}))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "status DIR", "report DIR", "report DIR --explorer", "view DIR --no-browser", "clean DIR",
        "predict DIR --sparsity 0.5", "export DIR --format hub --out OUT",
        "export DIR --format checkpoint --condition wanda-row-0.50 --out OUT",
    ],
)  # fmt: skip
def test_their_server_is_not_contacted(prunelens, tmp_path, their_server, command):
    """It would be told the access key, a signature and the session token, over plain HTTP."""
    host, port = their_server.getsockname()
    address = f"s3://b/p?endpoint_override={host}:{port}&scheme=http"
    folder = of_a_stranger(tmp_path, address)
    names = {"DIR": str(folder), "OUT": str(tmp_path / "out")}
    ended = prunelens(*(names.get(word, word) for word in command.split()))
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert address in ended.stderr and ("--artifacts" in ended.stderr or command[:5] == "clean")
    with pytest.raises(BlockingIOError):
        their_server.accept()


@pytest.mark.parametrize(
    "address",
    ["s3://me@b/p", "s3://b:9000/p", "gs://anonymous@b/p", "s3://b/p?region=x", "file:////host/p"],
)
def test_only_a_bucket_and_a_prefix_are_remembered_or_a_folder(tmp_path, address):
    with pytest.raises(UserError, match="not contacted; if you trust it, give --artifacts"):
        artifacts_of(of_a_stranger(tmp_path, address))


def test_how_the_bucket_is_reached_is_for_the_reader_to_say(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "prunelens.study.artifacts.bucket.Bucket.__init__",
        lambda self, address: opened.append(address),
    )
    mine = "s3://b/p?endpoint_override=mine.example"
    for theirs in ("s3://b/p", "s3://b/p?endpoint_override=theirs.example"):
        artifacts_of(of_a_stranger(tmp_path, theirs), mine)
    with pytest.raises(UserError, match="give that, or another --out"):
        artifacts_of(tmp_path, "s3://b/other")
    artifacts_of(of_a_stranger(tmp_path, "s3://b/p"))
    assert opened == [mine, mine, "s3://b/p"]
