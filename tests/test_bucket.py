"""A bucket's address may be a folder's, which shows what is the local disk's fault."""

import errno
import pathlib
import shutil

import pytest

from prunelens.study.artifacts.bucket import Bucket, UnreachableError
from prunelens.study.artifacts.disk import DiskError, stopped_by_disk
from prunelens.study.artifacts.object_store import ObjectStore
from prunelens.study.artifacts.store import Stage

STAGE = Stage("sae", 1, {"k": 4, "threads": 1}, {})
CONTENT = b"0123456789" * 1000


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here gets better by being tried again."""

    def refuse(seconds):
        pytest.fail(f"it waited for {seconds} s")

    monkeypatch.setattr("prunelens.study.artifacts.bucket.time.sleep", refuse)


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "key").write_bytes(CONTENT)
    return Bucket(f"file://{tmp_path}/bucket")


@pytest.mark.parametrize("chunk", [7, 5000, 10**6])
def test_a_file_comes_and_goes_in_parts(bucket, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("prunelens.study.artifacts.bucket.CHUNK", chunk)
    assert bucket.download("key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    bucket.upload(tmp_path / "file", "other")
    assert bucket.get("other") == CONTENT


def test_an_empty_file_is_one_and_an_absent_one_is_none(bucket, tmp_path):
    (tmp_path / "bucket" / "empty").touch()
    assert bucket.download("empty", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""
    assert not bucket.download("absent", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert bucket.get("absent") is None
    bucket.delete("absent")


def test_a_read_that_fails_once_goes_on_where_it_was(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("prunelens.study.artifacts.bucket.CHUNK", 3000)
    monkeypatch.setattr("prunelens.study.artifacts.bucket.WAITS", (0.0, 0.0))
    monkeypatch.setattr("prunelens.study.artifacts.bucket.time.sleep", lambda _: None)
    real, failures = bucket._fs, [OSError("AWS Error NETWORK_CONNECTION")] * 2

    class Shaky:
        def open_input_file(self, path):
            self.file = real.open_input_file(path)
            return self

        def read_at(self, size, start):
            if start and failures:
                raise failures.pop()
            return self.file.read_at(size, start)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    bucket._fs = Shaky()
    assert bucket.download("key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and failures == []


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_as_one(bucket, tmp_path):
    with pytest.raises(OSError) as error:
        bucket.download("key", pathlib.Path("/dev/full"))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(DiskError, match=r"disk of .* is full") as told, stopped_by_disk(tmp_path):
        bucket.download("key", pathlib.Path("/dev/full"))
    assert not isinstance(told.value, UnreachableError)


def test_a_folder_that_is_gone_is_no_absent_object(bucket, tmp_path):
    with pytest.raises(FileNotFoundError):
        bucket.download("key", tmp_path / "gone" / "file")
    with pytest.raises(FileNotFoundError):
        bucket.upload(tmp_path / "gone" / "file", "key")
    assert bucket.get("key") == CONTENT


def test_a_cache_that_vanishes_costs_no_object(bucket, tmp_path, monkeypatch):
    (tmp_path / "bucket" / "sae" / STAGE.identity).mkdir(parents=True)
    with ObjectStore(bucket, tmp_path / "maker").writing(STAGE) as folder:
        (folder / "a.txt").write_text("content")
    before, real = bucket.keys(""), Bucket.download

    def download(self, key, path):
        shutil.rmtree(tmp_path / "reader")
        return real(self, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", download)
        with pytest.raises(FileNotFoundError):
            ObjectStore(bucket, tmp_path / "reader").is_sound(STAGE)
    assert bucket.keys("") == before
    assert ObjectStore(bucket, tmp_path / "reader").is_sound(STAGE)
