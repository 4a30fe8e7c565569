"""Names that become paths, and links in a study folder: nothing outside is touched."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import pytest

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError
from prunelens.report.explorer.study import write_study_explorer
from prunelens.report.write import write_report
from prunelens.study.alone import alone_in
from prunelens.study.artifacts.links import is_plain, refuse_links_out
from prunelens.study.artifacts.store import DamagedArtifactError, Stage, Store
from prunelens.study.run import run_study

STAGE = Stage("sae", 1, {"k": 4}, {})
# What a store would take for its own: a description, and what a killed process left.
FILES = {"precious.txt", "deep/precious.txt", "meta.json", "old.1.tmp/x", "deep/old.1.tmp/x"}


@pytest.fixture
def outside(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that is nobody's business, with a file that is to stay."""
    folder = tmp_path / "outside"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


def untouched(outside: pathlib.Path) -> bool:
    found = {str(p.relative_to(outside)): p for p in outside.rglob("*") if p.is_file()}
    assert all(path.read_text() == "precious" for path in found.values())
    return set(found) == FILES


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", ".", "a/b", "a\\b", "", "a\n", "-x", "~"])
def test_names_of_folders_are_plain(name: str) -> None:
    """The study's name is a folder of runs/; short names and labels are in names of folders."""
    for data in (
        {"name": name},
        {"models": [{"name": "x", "short_name": name}]},
        {"prunings": [{"checkpoint": "x/y", "name": name}]},
    ):
        with pytest.raises(UserError, match="name"):
            study_from_data(data)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-has-this-home/x", "x" * 5000, "", "a\x1bb"])
def test_places_that_the_system_does_not_take(name: str) -> None:
    for data in (
        {"models": [{"name": name}]},
        {"models": [{"name": "x", "revision": name}]},
        {"models": [{"pretrained": [{"layer": 3, "folder": name, "name": "x"}]}]},
        {"corpus": {"source": "files", "paths": [name]}},
        {"corpus": {"source": "hub", "dataset": name}},
        {"prunings": [{"checkpoint": name, "name": "x"}]},
    ):
        with pytest.raises(UserError, match=r"name|revision|folder|paths|dataset|checkpoint"):
            study_from_data(data)


# --- artifacts ------------------------------------------------------------------------------------


def written(root: pathlib.Path, content: str = "x") -> Store:
    with Store(root).writing(STAGE) as folder:
        (folder / "a.txt").write_text(content)
    return Store(root)  # as another process: nothing verified yet


@pytest.mark.parametrize(
    "name", ["../b.txt", "../../outside/precious.txt", "ABSOLUTE", "deep/../../b"]
)
def test_files_above_an_artifact_are_none_of_it(
    name: str, tmp_path: pathlib.Path, outside: pathlib.Path
) -> None:
    store = written(tmp_path / "artifacts")
    folder = store.folder(STAGE)
    (folder.parent / "b.txt").write_text("precious")
    name = str(outside / "precious.txt") if name == "ABSOLUTE" else name
    sha = "5d02e5a0d9b9d4d7b6bb2fa9f1ec7d9d1e8ac0c0ba0b2ef0e2c4a2ad7f1d2f00"
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {name: sha}
    meta.pop("sha256", None)
    (folder / "meta.json").write_text(
        json.dumps({k: v for k, v in meta.items() if k != "cpu_seconds"})
    )
    with pytest.raises(DamagedArtifactError, match=r"sae"):
        store.read(STAGE)
    assert not is_plain(folder, name)
    assert untouched(outside)


@pytest.mark.parametrize("what", ["file", "artifact", "meta", "linked meta"])
def test_links_are_damage(what: str, tmp_path: pathlib.Path, outside: pathlib.Path) -> None:
    """Even to the very same bytes: they may be others tomorrow. Set aside and made again."""
    store = written(tmp_path / "artifacts")
    folder = store.folder(STAGE)
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    if what == "file":
        (folder / "a.txt").unlink()
        (folder / "a.txt").symlink_to(twin / "a.txt")
    elif what == "artifact":
        shutil.rmtree(folder)
        folder.symlink_to(twin)
    elif what == "linked meta":
        (folder / "meta.json").unlink()
        (folder / "meta.json").symlink_to(twin / "meta.json")
    else:
        (folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(DamagedArtifactError):
        store.read(STAGE)
    assert not store.is_sound(STAGE)
    written(tmp_path / "artifacts").read(STAGE)
    assert (twin / "a.txt").read_text() == "x"


@pytest.mark.parametrize("target", ["outside", "nowhere"])
def test_deleting_and_sweeping_follow_no_link(
    target: str, tmp_path: pathlib.Path, outside: pathlib.Path
) -> None:
    store = Store(tmp_path / "artifacts")
    folder = store.folder(STAGE)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / target)
    store.delete(STAGE)
    assert not folder.is_symlink()
    folder.symlink_to(tmp_path / target)
    store.is_sound(STAGE)
    written(store.root)
    assert store.is_sound(STAGE)
    (store.root / "linked").symlink_to(outside)
    (folder.parent / "x.1.tmp").symlink_to(outside)
    store.sweep_temporary()
    assert untouched(outside)


def test_no_artifact_is_written_through_a_link(
    tmp_path: pathlib.Path, outside: pathlib.Path
) -> None:
    store = Store(tmp_path / "artifacts")
    store.root.mkdir()
    (store.root / "sae").symlink_to(outside)
    with pytest.raises(UserError, match="sae"), store.writing(STAGE):
        raise AssertionError
    assert untouched(outside)


# --- the study folder -----------------------------------------------------------------------------

LINKS = ["study.yaml", ".study.yaml.tmp", "report.html", ".report.html.tmp", "runs.csv", "tables"]
LINKS += ["tables/claims.csv", "figures", "figures/survival.png", "logs", "logs/x.log", ".lock"]
LINKS += ["artifacts", "artifacts/sae", "artifacts/unfinished", "artifacts/unfinished/sae-x/y"]
LINKS += ["artifacts/damaged", "artifacts/.claims", "explorer", "explorer/data"]


def make_alone(out: pathlib.Path) -> None:
    with alone_in(out):
        raise AssertionError


def test_a_foreign_folder_does_not_choose_where_a_run_writes(
    tmp_path: pathlib.Path, outside: pathlib.Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "artifacts.json").write_text(json.dumps({"artifacts": str(outside)}))
    with pytest.raises(UserError, match="to go on there, give --artifacts"), alone_in(out):
        run_study(StudyConfig(), out, quiet=True)
    assert untouched(outside)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("action", [make_alone, write_report, write_study_explorer])
def test_a_study_folder_with_links_out_of_it_is_refused(
    name: str,
    action: Callable[[pathlib.Path], object],
    tmp_path: pathlib.Path,
    outside: pathlib.Path,
) -> None:
    """Before anything is written: a folder that came from elsewhere may point anywhere."""
    out = tmp_path / "study"
    (out / name).parent.mkdir(parents=True)
    if name != "study.yaml":
        (out / "study.yaml").write_text("models: [{name: planted, layers: [0]}]\nquestions: []\n")
    is_folder = "." not in pathlib.Path(name).name.strip(".") and name != ".lock"
    (out / name).symlink_to(outside if is_folder else outside / "precious.txt")
    with pytest.raises(UserError, match=r"link|study"):
        action(out)
    assert untouched(outside)


def test_links_within_are_fine_and_the_folder_may_be_one(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "study"
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "a.csv").write_text("x")
    (out / "again.csv").symlink_to("tables/a.csv")
    (tmp_path / "link").symlink_to(out)
    refuse_links_out(tmp_path / "link")
    (out / "artifacts" / "sae" / "id").mkdir(parents=True)
    (out / "artifacts" / "sae" / "id" / "a.txt").symlink_to(tmp_path)  # the store's to judge
    refuse_links_out(out)


def test_a_plan_of_hostile_names_makes_no_folder(tmp_path: pathlib.Path) -> None:
    study = study_from_data({"models": [{"name": "<b>/../..", "short_name": "x"}]})
    assert isinstance(study, StudyConfig)
    assert not list(tmp_path.iterdir())
