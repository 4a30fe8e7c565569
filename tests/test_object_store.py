"""Artifacts in a bucket: moto's S3 server on 127.0.0.1."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import pytest
from pyarrow import fs
from typer.testing import CliRunner

from faults.kill import start_at_once, wait_for_orphans
from prunelens.cli.app import app
from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.write import run_and_report, write_report
from prunelens.study.artifacts.address import PLACE_FILE, artifacts_of, checked, open_store
from prunelens.study.artifacts.bucket import Bucket, UnreachableError
from prunelens.study.artifacts.object_store import ObjectStore
from prunelens.study.artifacts.seal import sealed, unsealed
from prunelens.study.artifacts.store import DamagedArtifactError, Stage, Store
from prunelens.study.folder import study_status
from prunelens.study.plan import plan_study
from s3_server import s3_server
from tiny_study import run_with_pool, tiny_study, write_text

STAGE = Stage("sae", 1, {"k": 4, "threads": 1}, {})
CHILD = Stage("survival", 1, {"threads": 1}, {"sae": STAGE})
QUESTIONS = ["stability", "survival", "persistence", "transfer", "fragility"]
ACTIVATIONS = Stage("activations", 1, {"threads": 1}, {})


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def address(server, tmp_path):
    return f"{server.bucket}/{tmp_path.name}"


@pytest.fixture
def store(address, tmp_path):
    return open_store(address, tmp_path / "cache")


@pytest.fixture
def elsewhere(address, tmp_path):
    """The same artifacts on another machine."""
    return open_store(address, tmp_path / "other")


@pytest.fixture
def objects(address):
    """The bucket as others see it."""
    return opened(address)


def opened(address):
    system, path = fs.FileSystem.from_uri(address)
    return fs.SubTreeFileSystem(path, system)


def write(store, stage=STAGE, content="x"):
    with store.writing(stage) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b.txt").write_text("b")


def put(objects, key, content):
    with objects.open_output_stream(key) as stream:
        stream.write(content)


def get(objects, key):
    with objects.open_input_stream(key) as stream:
        return stream.read()


def keys(objects, folder=""):
    found = objects.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return sorted(entry.path for entry in found if entry.type == fs.FileType.File)


def key(stage, name):
    return f"{stage.name}/{stage.identity}/{name}"


def test_what_one_machine_writes_another_reads_verified(store, elsewhere, objects, tmp_path):
    assert not elsewhere.has(STAGE) and not elsewhere.is_sound(STAGE)
    write(store)
    assert keys(objects) == [key(STAGE, n) for n in ("a.txt", "deeper/b.txt", "meta.json")]
    assert elsewhere.has(STAGE) and elsewhere.finished("sae") == {STAGE.identity}
    assert elsewhere.finished("survival") == set()
    folder = elsewhere.read(STAGE)
    assert folder.is_relative_to(tmp_path / "other")
    assert (folder / "deeper" / "b.txt").read_text() == "b"
    assert elsewhere.meta(STAGE) == store.meta(STAGE)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_goes_in_parts(store, elsewhere, monkeypatch):
    monkeypatch.setattr("prunelens.study.artifacts.bucket.CHUNK", 1000)
    content = "".join(map(str, range(6000)))
    write(store, content=content)
    assert (elsewhere.read(STAGE) / "a.txt").read_text() == content


def test_meta_json_is_written_last_and_is_the_commit(store, elsewhere, objects, monkeypatch):
    real, sent = Bucket.upload, []

    def killed(self, path, where):
        if sent:
            raise KeyboardInterrupt
        sent.append(where)
        real(self, path, where)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", killed)
        with pytest.raises(KeyboardInterrupt):
            write(store, content="half")
    assert keys(objects) == [key(STAGE, "a.txt")]
    assert not elsewhere.has(STAGE) and not elsewhere.is_sound(STAGE)
    assert elsewhere.finished("sae") == set()
    write(elsewhere, content="whole")
    assert (store.read(STAGE) / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("damage", ["flip", "remove", "meta", "names", "swap"])
def test_damage_in_the_bucket_is_found_and_set_aside(store, elsewhere, objects, damage, tmp_path):
    write(store, content="content")
    write(store, CHILD)
    meta = get(objects, key(STAGE, "meta.json"))
    if damage == "flip":
        put(objects, key(STAGE, "a.txt"), b"contens")
    elif damage == "remove":
        objects.delete_file(key(STAGE, "a.txt"))
    elif damage == "meta":
        put(objects, key(STAGE, "meta.json"), meta.replace(b'"k": 4', b'"k": 5'))
    elif damage == "names":
        facts = unsealed(meta.decode())
        facts["files"] = {"../../../out.txt": facts["files"]["a.txt"]}
        put(objects, key(STAGE, "meta.json"), sealed(facts).encode())
        put(objects, "out.txt", b"content")
    else:
        put(objects, key(STAGE, "meta.json"), get(objects, key(CHILD, "meta.json")))
    with pytest.raises(DamagedArtifactError):
        elsewhere.read(STAGE)
    assert not list(tmp_path.rglob("out.txt")) and not list(tmp_path.rglob("*.tmp"))
    assert not elsewhere.is_sound(STAGE)
    assert not store.has(STAGE) and not keys(objects, f"sae/{STAGE.identity}")
    assert len(keys(objects, "damaged")) == (2 if damage == "remove" else 3)
    assert elsewhere.is_sound(CHILD), "others are left alone"
    write(elsewhere, content="content")
    assert store.is_sound(STAGE)


def test_a_damaged_copy_in_the_cache_is_fetched_again(store, address, tmp_path):
    write(store, content="content")
    (store.folder(STAGE) / "a.txt").write_text("contens")
    again = open_store(address, tmp_path / "cache")
    assert (again.read(STAGE) / "a.txt").read_text() == "content"
    assert not (tmp_path / "cache" / "damaged").exists()


def test_what_was_made_again_elsewhere_replaces_the_copy(store, elsewhere, address, tmp_path):
    write(store, content="first")
    elsewhere.delete(STAGE)
    write(elsewhere, content="second")
    again = open_store(address, tmp_path / "cache")
    assert (again.read(STAGE) / "a.txt").read_text() == "second"


def test_of_two_makers_the_first_to_end_is_kept(store, elsewhere, objects):
    with store.writing(STAGE) as slow:
        (slow / "a.txt").write_text("same")
        with elsewhere.writing(STAGE) as quick:
            (quick / "a.txt").write_text("same")
        before = get(objects, key(STAGE, "meta.json"))
    assert get(objects, key(STAGE, "meta.json")) == before
    assert store.is_sound(STAGE) and elsewhere.is_sound(STAGE)


def test_an_activation_store_is_not_fetched_to_be_judged_and_leaves_the_caches(
    store, elsewhere, objects, address, tmp_path
):
    write(store, ACTIVATIONS)
    assert elsewhere.is_sound(ACTIVATIONS)
    assert not elsewhere.folder(ACTIVATIONS).exists()
    elsewhere.read(ACTIVATIONS)
    elsewhere.delete(ACTIVATIONS)
    assert keys(objects) == [] and not elsewhere.folder(ACTIVATIONS).exists()
    assert store.folder(ACTIVATIONS).exists()
    open_store(address, tmp_path / "cache").sweep_temporary()
    assert not store.folder(ACTIVATIONS).exists()


def test_one_that_lacks_a_file_is_no_activation_store(store, elsewhere, objects):
    write(store, ACTIVATIONS)
    objects.delete_file(key(ACTIVATIONS, "a.txt"))
    assert not elsewhere.is_sound(ACTIVATIONS)


def test_a_network_that_comes_back_is_waited_for(store, elsewhere, monkeypatch, caplog):
    write(store)
    monkeypatch.setattr("prunelens.study.artifacts.bucket.WAITS", (0.0, 0.0))
    real, failures = Bucket._put_bytes, [OSError("AWS Error NETWORK_CONNECTION")] * 2

    def shaky(self, *arguments):
        if failures:
            raise failures.pop()
        real(self, *arguments)

    monkeypatch.setattr(Bucket, "_put_bytes", shaky)
    elsewhere.check_usable()
    assert caplog.text.count("trying again") == 2
    failures[:] = [OSError("AWS Error NETWORK_CONNECTION")] * 3
    with pytest.raises(UnreachableError, match="cannot be used"):
        elsewhere.check_usable()


def test_the_address_is_read_as_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checked("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert checked("s3://bucket/a?region=x") == "s3://bucket/a?region=x"
    assert checked("here") == str(tmp_path / "here") == checked(f"file://{tmp_path}/here")
    assert open_store(f"file://{tmp_path}/here").root == tmp_path / "here"
    odd = open_store("file:////[x")
    assert isinstance(odd, Store) and str(odd.root) == "//[x"
    for secret in ("s3://someone:topsecret@bucket/x", "s3://someone:topsecret@[bucket/x"):
        with pytest.raises(UserError) as error:
            checked(secret)
        assert "topsecret" not in str(error.value) and "bucket/x" in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        *("ftp://host/x", "s3://bucket", "s3:///x", "s3://bucket/../x", "s3://b/x#y", " "),
        *("s3://[x/y", "gs://x]/y", "s3://[1]/y", "//[x/y", "s3://\u2100/x", "~nobody-here/x"),
    ],
)
def test_a_wrong_address_is_told_in_one_line(wrong):
    with pytest.raises(UserError, match=r"--artifacts: .*give "):
        checked(wrong)


@pytest.mark.parametrize("wrong", ["bucket", "network"])
def test_what_cannot_be_reached_is_told_before_anything_runs(
    server, tiny, tmp_path, monkeypatch, wrong
):
    monkeypatch.setattr("prunelens.study.artifacts.bucket.WAITS", ())
    study = tmp_path / "study.json"
    study.write_text(json.dumps(tiny))
    place = "s3://absent/x" if wrong == "bucket" else "s3://bucket/x"
    if wrong == "network":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    arguments = ["run", str(study), "--out", str(tmp_path / "s"), "--artifacts", place]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UnreachableError)
    assert place in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def tiny(checkpoint_folder, tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    study = tiny_study(checkpoint_folder, text)
    return {**study, "prunings": study["prunings"][1:], "questions": QUESTIONS}


@pytest.fixture(scope="module")
def small(tiny):
    """Hardly a question: for what is about the order of events."""
    return {**tiny, "questions": ["stability"]}


@pytest.fixture(scope="module")
def undrawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        patch.setattr("prunelens.report.write.write_page", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def small_tables(small, tmp_path_factory, undrawn, pool):
    """Of that study with its artifacts in its folder."""
    out = tmp_path_factory.mktemp("small") / "s"
    run_with_pool(study_from_data(small), out, pool)
    return tables(out)


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory, undrawn, pool):
    """The tables of the study whose artifacts are in its folder."""
    out = tmp_path_factory.mktemp("local") / "s"
    run_with_pool(study_from_data(tiny), out, pool)
    return tables(out)


@pytest.fixture(scope="module")
def remote(server, tiny, tmp_path_factory, undrawn):
    """A finished study whose artifacts are in the bucket, and the address."""
    out, place = tmp_path_factory.mktemp("remote") / "s", f"{server.bucket}/remote"
    outcome = run_and_report(study_from_data(tiny), out, quiet=True, artifacts=place)
    assert outcome.num_executed > 20
    return out, place


def tables(out):
    found = {path.name: path.read_bytes() for path in (out / "tables").glob("*.csv")}
    assert found
    return found | {"latents": (out / "latents.parquet").read_bytes()}


def copied(remote, tmp_path):
    """The study's folder on a machine that has read nothing yet."""
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("study.yaml", PLACE_FILE, "runs.csv"):
        shutil.copy(remote[0] / name, out / name)
    return out


def test_tables_are_those_of_a_local_study(local, remote, tiny, undrawn):
    assert tables(remote[0]) == local
    assert json.loads((remote[0] / PLACE_FILE).read_text()) == {"artifacts": remote[1]}
    again = run_and_report(study_from_data(tiny), remote[0], quiet=True, artifacts=remote[1])
    assert again.num_executed == 0
    with pytest.raises(
        UserError, match=f"to go on there, give --artifacts '?{re.escape(remote[1])}"
    ):
        run_and_report(study_from_data(tiny), remote[0], quiet=True)
    with pytest.raises(UserError, match="give that, or another --out"):
        run_and_report(study_from_data(tiny), remote[0], quiet=True, artifacts="s3://bucket/other")
    assert isinstance(artifacts_of(remote[0], remote[1]), Store)


def test_another_folder_needs_the_study_and_the_address(local, remote, tmp_path, undrawn):
    out = copied(remote, tmp_path)
    assert {row["status"] for row in study_status(out)} == {"done"}
    assert not (out / "artifacts" / "sae").exists(), "status fetches nothing"
    write_report(out)
    assert tables(out) == local


def test_a_flipped_bit_in_the_bucket_is_mended(local, remote, tiny, tmp_path, undrawn, caplog):
    bucket = opened(remote[1])
    run = next(run for run in plan_study(study_from_data(tiny)).runs if run.pruning)
    flipped = [*list(run.saes.values())[:1], run.stages["perplexity"]]
    for stage in flipped:
        name = next(n for n in keys(bucket, f"{stage.name}/{stage.identity}") if "meta" not in n)
        content = bytearray(get(bucket, name))
        content[len(content) // 2] ^= 4
        put(bucket, name, bytes(content))
    out = copied(remote, tmp_path)
    outcome = run_and_report(study_from_data(tiny), out, quiet=True, artifacts=remote[1])
    assert caplog.text.count("damaged artifact") == len(flipped)
    # Both, and the activations that the SAE was trained on, which were deleted.
    assert outcome.num_executed >= len(flipped) and tables(out) == local
    assert len({path.split("/")[1] for path in keys(bucket, "damaged")}) == len(flipped)


def test_a_parent_that_a_worker_finds_damaged_is_made_again(
    server, small_tables, small, tmp_path, undrawn, monkeypatch
):
    """The worker is on another machine: what is in the cache of this one is of no help to it."""
    real, done = Bucket.upload, []

    def flipping(self, path, where):
        if where.startswith("activations/") and where.endswith("train.safetensors") and not done:
            done.append(where)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path = tmp_path / "flipped"
            path.write_bytes(content)
        real(self, path, where)

    publish = ObjectStore._publish

    def losing(self, stage, temporary):
        publish(self, stage, temporary)
        self._drop_cached(stage)

    monkeypatch.setattr(Bucket, "upload", flipping)
    monkeypatch.setattr(ObjectStore, "_publish", losing)
    out = tmp_path / "s"
    place = f"{server.bucket}/{tmp_path.name}"
    outcome = run_and_report(study_from_data(small), out, quiet=True, artifacts=place)
    assert done and {result.status for result in outcome.results} == {"done"}
    assert tables(out) == small_tables


def test_two_workers_and_a_kill_change_nothing(server, small_tables, small, tmp_path):
    study = tmp_path / "study.json"
    study.write_text(json.dumps(small))
    out, place = tmp_path / "s", f"{server.bucket}/{tmp_path.name}"
    bucket = opened(place)

    def start():
        return start_at_once(str(study), out, "--artifacts", place, workers=2)

    killed = start()
    while len(keys(bucket)) < 25 and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert not wait_for_orphans(killed.pid)  # until then what they write is theirs
    assert len(keys(bucket)) >= 25
    assert start().wait(120) == 0
    assert tables(out) == small_tables
    assert not list(pathlib.Path(out).glob("artifacts/*/*.tmp"))
