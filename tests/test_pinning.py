"""A study goes on with the commits it began with; a new folder takes what the hub has now."""

import shutil

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from prunelens import hub
from prunelens.config import study_from_data
from prunelens.report.write import run_and_report, write_report
from prunelens.study import pinning
from prunelens.study.folder import _as_yaml, open_study
from prunelens.study.pinning import pinned
from prunelens.study.plan import plan_study
from prunelens.study_file import parse_yaml
from tiny_study import tiny_study, write_text

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def main_is(tmp_path, checkpoint_folder, monkeypatch):
    """Two commits of me/model in the hub's cache, and a function that moves its default branch."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = cache / "models--me--model"
    for commit in (FIRST, SECOND):
        shutil.copytree(checkpoint_folder, folder / "snapshots" / commit)
    path = folder / "snapshots" / SECOND / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    (folder / "refs").mkdir()

    def move(commit: str) -> None:
        (folder / "refs" / "main").write_text(commit)
        hub.snapshot.cache_clear()

    move(FIRST)
    yield move
    hub.snapshot.cache_clear()


@pytest.fixture
def data(checkpoint_folder, tmp_path):
    found = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    model = {"name": "me/model", "layers": [1]}
    return found | {"models": [model], "questions": ["persistence"], "prunings": []}


def revisions(study):
    return [model.revision for model in study.models]


def test_a_folder_keeps_its_commit(data, tmp_path, main_is, caplog):
    study, out = study_from_data(data), tmp_path / "out"
    assert run_and_report(study, out, device="cpu", quiet=True).num_executed > 0
    assert not caplog.records
    written = parse_yaml((out / "study.yaml").read_text(), where="study.yaml")
    assert written["models"][0]["revision"] == FIRST
    tables = {path.name: path.read_bytes() for path in (out / "tables").iterdir()}
    main_is(SECOND)
    assert run_and_report(study, out, device="cpu", quiet=True).num_executed == 0
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if f"me/model@{FIRST[:12]}" in line] == told
    assert len(told) == 1
    write_report(out)
    assert {path.name: path.read_bytes() for path in (out / "tables").iterdir()} == tables
    assert revisions(open_study(out)[0].study) == [FIRST]
    assert revisions(pinned(study, tmp_path / "another")) == [SECOND]


def test_identities_are_those_of_a_study_that_names_the_commit(data, tmp_path, main_is):
    data["perplexity"] = {"context_tokens": [16]}
    named = [{**data["models"][0], "revision": FIRST}]
    ours = plan_study(pinned(study_from_data(data), tmp_path))
    theirs = plan_study(study_from_data(data | {"models": named}))
    open_ones = plan_study(study_from_data(data))
    assert set(ours.targets()) == set(theirs.targets()) == set(open_ones.targets())


def test_a_data_sets_commit_is_no_second_time_in_identities(data, tmp_path, main_is, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda *_names, revision, **_options: revision or FIRST)
    corpus = {k: v for k, v in data["corpus"].items() if k not in ("paths", "document")}
    corpus |= {"source": "hub", "dataset": "me/text"}
    open_study_ = study_from_data(data | {"corpus": corpus})
    closed = pinned(open_study_, tmp_path)
    assert closed.corpus.revision == FIRST
    assert set(plan_study(open_study_).targets()) == set(plan_study(closed).targets())


def test_what_is_local_or_named_stays(data, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda *_names, **_options: pytest.fail("hub asked"))
    local = study_from_data(data | {"models": [{"name": str(checkpoint_folder), "layers": [1]}]})
    assert pinned(local, tmp_path) is local
    named = study_from_data(data | {"models": [{**data["models"][0], "revision": "main"}]})
    assert pinned(named, tmp_path) is named


def test_everything_on_the_hub_is_pinned_and_found_again(data, tmp_path, monkeypatch):
    asked = []

    def commit(name, *, field, kind, revision):
        asked.append((name, field, kind, revision))
        return FIRST

    monkeypatch.setattr(hub, "commit", commit)
    text = {"source": "hub", "dataset": "me/text"}
    data |= {"corpus": text, "perplexity": {"corpus": {**text, "dataset": "me/scored"}}}
    data["prunings"] = [{"checkpoint": "me/pruned"}]
    data["probes"] = {"concepts": "tags", "corpus": {**text, "dataset": "me/labelled"}}
    study = study_from_data(data)
    first = pinned(study, tmp_path)
    assert sorted(asked) == [
        ("me/labelled", "probes.corpus.dataset", "dataset", None),
        ("me/model", "models.name", "model", None),
        ("me/pruned", "prunings.checkpoint", "model", None),
        ("me/scored", "perplexity.corpus.dataset", "dataset", None),
        ("me/text", "corpus.dataset", "dataset", None),
    ]
    assert first.perplexity.corpus.revision == first.prunings[0].revision == FIRST
    (tmp_path / "study.yaml").write_text(_as_yaml(first))
    asked.clear()
    assert pinned(study, tmp_path) == first
    assert asked == []


def test_another_entry_of_the_same_repository_does_not_lend_its_commit(data, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda *_names, **_options: SECOND)
    model = data["models"][0]
    old = {**model, "revision": FIRST, "short_name": "old"}
    study = study_from_data(data | {"models": [model, old]})
    (tmp_path / "study.yaml").write_text(_as_yaml(pinned(study, tmp_path)))
    monkeypatch.setattr(hub, "commit", lambda *_names, **_options: pytest.fail("hub asked"))
    assert revisions(pinned(study, tmp_path)) == [SECOND, FIRST]


def test_a_damaged_description_is_told_and_made_anew(data, tmp_path, main_is, caplog):
    (tmp_path / "study.yaml").write_text("[")
    assert revisions(pinned(study_from_data(data), tmp_path)) == [FIRST]
    assert "commits are asked for anew" in caplog.text
    assert pinning.COMMIT.fullmatch(FIRST)
