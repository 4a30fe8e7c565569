import json

import pytest

from prunelens.study.store import DamagedArtifactError, Stage, Store


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
    assert stage(label="other", cost=9.0).identity == base.identity
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
