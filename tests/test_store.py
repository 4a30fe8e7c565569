import errno
import io
import json
import os
import re

import pytest

from prunelens.study.artifacts.seal import sealed, unsealed
from prunelens.study.artifacts.store import DamagedArtifactError, Stage, Store


def stage(**changes):
    fields = {"name": "sae", "version": 1, "config": {"k": 4}, "parents": {}, **changes}
    return Stage(**fields)


def write(store, of, content="x"):
    with store.writing(of) as folder:
        (folder / "a.txt").write_text(content)


def test_identity_covers_name_version_config_and_parents_and_nothing_else():
    base = stage()
    different = [
        stage(name="prune"),
        stage(version=2),
        stage(config={"k": 5}),
        stage(config={"k": 4, "steps": 1}),
        stage(parents={"a": stage()}),
        stage(parents={"b": stage()}),
        stage(parents={"a": stage(config={"k": 5})}),
    ]
    assert len({s.identity for s in [base, *different]}) == len(different) + 1
    assert stage(label="other", estimate=lambda: 9.0).identity == base.identity
    assert stage(config={"b": 1, "a": 2}).identity == stage(config={"a": 2, "b": 1}).identity


def test_an_artifact_is_whole_or_absent(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writing(stage()) as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert not store.has(stage())
    assert not list(tmp_path.glob("*/*"))
    write(store, stage())
    assert store.has(stage())
    meta = json.loads((store.read(stage()) / "meta.json").read_text())
    assert meta["config"] == {"k": 4}
    assert set(meta["files"]) == {"a.txt"}
    assert {"libraries", "parents", "wall_seconds", "platform"} <= set(meta)


@pytest.mark.parametrize("damage", ["flip", "remove", "meta"])
def test_damage_is_found_on_reading_and_set_aside(tmp_path, damage):
    write(Store(tmp_path), stage(), "content")
    store = Store(tmp_path)  # a fresh process: nothing verified yet
    path = store.folder(stage()) / "a.txt"
    if damage == "flip":
        path.write_text("contens")
    elif damage == "remove":
        path.unlink()
    else:
        path.with_name("meta.json").write_text("{")
    with pytest.raises(DamagedArtifactError):
        store.read(stage())
    moved = store.set_aside(stage())
    assert moved.exists()
    assert not store.has(stage())


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    store = Store(tmp_path)
    left = tmp_path / "sae" / f"{stage().identity}.123.tmp"
    left.mkdir(parents=True)
    store.sweep_temporary()
    assert not left.exists()


def test_checkpoints_go_when_the_artifact_is_published(tmp_path):
    store = Store(tmp_path)
    partial = store.partial(stage())
    (partial / "checkpoint").write_text("1")
    assert store.partial(stage()) == partial
    write(store, stage())
    assert not partial.exists()


def test_checkpoints_of_what_was_published_just_before_a_kill_are_swept(tmp_path):
    store, other = Store(tmp_path), stage(config={"k": 5})
    write(store, stage())
    for of in (stage(), other):
        (store.partial(of) / "checkpoint").write_text("1")
    store.sweep_temporary()
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == [f"sae-{other.identity}"]


def test_what_another_machine_may_be_writing_is_swept_only_when_old(tmp_path, monkeypatch):
    """Where the file system has no locks, a claim looks free to everybody."""
    store = Store(tmp_path)
    monkeypatch.setattr(store.locks, "is_free", lambda _identity: True)
    with store.writing(stage()) as ours:
        theirs = ours.with_name(f"{stage().identity}.elsewhere-1-ab.tmp")
        dead = ours.with_name(ours.name.replace(f"-{os.getpid()}-", "-999999999-"))
        for folder in (theirs, dead):
            folder.mkdir()
        store.sweep_temporary()
        assert ours.exists() and theirs.exists() and not dead.exists()
        os.utime(theirs, (0, 0))
        store.sweep_temporary()
        assert ours.exists() and not theirs.exists()
        (ours / "a.txt").write_text("x")
    assert store.is_sound(stage())


def test_a_folder_without_meta_json_gives_way(tmp_path, caplog):
    store = Store(tmp_path)
    store.folder(stage()).mkdir(parents=True)
    (store.folder(stage()) / "left.txt").write_text("x")
    write(store, stage())
    assert store.is_sound(stage()) and "without meta.json" in caplog.text
    assert [path.name for path in tmp_path.glob("damaged/*/*")] == ["left.txt"]


@pytest.mark.parametrize("name", ["../../out.txt", "/etc/hostname", "a/../b", "", "a\\b"])
def test_names_that_lead_elsewhere_are_damage(tmp_path, name):
    write(Store(tmp_path), stage())
    path = Store(tmp_path).folder(stage()) / "meta.json"
    facts = unsealed(path.read_text())
    facts["files"] = {name: facts["files"]["a.txt"]}
    path.write_text(sealed(facts))
    with pytest.raises(DamagedArtifactError):
        Store(tmp_path).read(stage())


@pytest.mark.parametrize("name", ["a.txt", "meta.json"])
@pytest.mark.parametrize(
    ("number", "is_damage"),
    [
        *((number, True) for number in (errno.EIO, errno.ENOENT, errno.ENOTDIR)),
        *((number, False) for number in (errno.EACCES, errno.EMFILE, errno.ESTALE)),
    ],
)
def test_what_the_disk_cannot_read_is_damage_and_what_may_pass_is_not(
    tmp_path, monkeypatch, name, number, is_damage
):
    write(Store(tmp_path), stage())
    store, opened = Store(tmp_path), io.open

    def refuse(path, *rest, **options):
        if str(path).endswith(f"{stage().identity}/{name}"):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(io, "open", refuse)  # what pathlib opens with
    if is_damage:
        assert not store.is_sound(stage())
        assert len(list((tmp_path / "damaged").iterdir())) == 1
        write(store, stage())
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            store.is_sound(stage())
    monkeypatch.undo()
    assert store.is_sound(stage())
