"""`prunelens clean` finds what a study can do without, all of it and nothing else."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import filelock
import pytest

import warm
from faults.kill import leftovers as half_done
from faults.kill import results_of
from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.write import run_and_report
from prunelens.study.artifacts.store import Store
from prunelens.study.clean import DAMAGED, KILLED, READ, UNASKED, UNFINISHED, clean_study, leftovers
from prunelens.study.folder import open_study

DEAD = 2**22 + 1  # no process has this number


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of the finished study, as `prunelens` is told of it: by a relative path."""
    finished.copy(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return pathlib.Path("out")


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def artifact(folder, kind):
    return sorted((folder / "artifacts" / kind).iterdir())[0]


def killed(folder):
    """As `temporary_beside` names it, of a process of this machine that is gone."""
    from prunelens.temporary import temporary_beside

    name = temporary_beside(folder).name.replace(f"-{os.getpid()}-", f"-{DEAD}-")
    return folder.with_name(name)


def why(folder):
    return {one.path: one.why for one in leftovers(folder)}


def test_a_finished_study_has_nothing_to_free(folder):
    before = files_of(folder)
    assert leftovers(folder) == [] and clean_study(folder) == []
    assert {p: b for p, b in files_of(folder).items() if p.name != ".lock"} == {
        p: b for p, b in before.items() if p.name != ".lock"
    }


def test_everything_that_can_go_is_found_and_freed_and_nothing_else(folder, finished, tiny_data):
    before = files_of(folder / "artifacts")
    # other settings, in the same folder: their artifacts are asked for by nobody afterwards
    run_and_report(study_from_data({**tiny_data, "taus": [0.6, 0.7]}), folder, quiet=True)
    run_and_report(finished.study, folder, quiet=True)
    other = {p.parent for p in files_of(folder / "artifacts").keys() - before.keys()}
    other = {p for p in other if p.parent.parent.name == "artifacts"}
    assert len(other) > 3
    sae = artifact(folder, "sae")
    expected = {path.relative_to(folder).as_posix(): UNASKED for path in other}
    for path, reason in (
        (folder / "artifacts/damaged/sae-0123456789ab-ffffff", DAMAGED),
        (folder / f"artifacts/unfinished/sae-{sae.name}", UNFINISHED),
        (killed(sae), KILLED),
        (killed(folder / ".explorer"), KILLED),
    ):
        path.mkdir(parents=True)
        (path / "x.safetensors").write_bytes(bytes(1000))
        expected[path.relative_to(folder).as_posix()] = reason
    assert why(folder) == expected
    sizes = {one.path: one.num_bytes for one in leftovers(folder)}
    for path, size in sizes.items():
        assert size == sum(p.stat().st_size for p in (folder / path).rglob("*") if p.is_file())
    labels = {one.path: one.label for one in leftovers(folder)}
    assert all(labels[path] for path, reason in expected.items() if reason == UNASKED)
    assert {one.path for one in clean_study(folder)} == expected.keys()
    kept = {p: b for p, b in files_of(folder / "artifacts").items() if p.name != ".claims"}
    assert kept == {p: b for p, b in before.items() if p.name != ".claims"}
    assert leftovers(folder) == [] and half_done(folder) == []
    assert run_and_report(finished.study, folder, quiet=True).num_executed == 0
    assert results_of(folder) == finished.results


def test_activations_that_were_kept_go_and_the_study_stays_finished(tiny_data, tmp_path, finished):
    study = study_from_data({**tiny_data, "keep_activations": True})
    out = shutil.copytree(finished.with_activations, tmp_path / "out")
    stores = {f"artifacts/activations/{p.name}" for p in (out / "artifacts/activations").iterdir()}
    assert len(stores) == 3 and why(out) == dict.fromkeys(stores, READ)
    clean_study(out)
    assert run_and_report(study, out, quiet=True).num_executed == 0
    assert results_of(out) == finished.results


def test_what_an_unfinished_study_goes_on_from_stays(tiny_data, tmp_path, finished):
    study = study_from_data({**tiny_data, "keep_activations": True})
    out = shutil.copytree(finished.with_activations, tmp_path / "out")
    plan, store = open_study(out)
    sae = next(stage for run in plan.runs if run.pruning for stage in run.saes.values())
    needed = sae.parents["activations"].identity
    shutil.rmtree(store.folder(sae))
    checkpoint = store.partial(sae)
    unasked = out / "artifacts/sae" / ("0" * 64)
    unasked.mkdir()
    found = why(out)
    assert set(found.values()) == {READ} and len(found) == 2
    assert f"artifacts/activations/{needed}" not in found
    clean_study(out)
    assert checkpoint.is_dir() and unasked.is_dir() and store.folder(sae.parents["activations"])
    assert results_of(out) == finished.results
    run_and_report(study, out, quiet=True)  # it has ended now, and the rest can go
    assert f"artifacts/sae/{unasked.name}" in why(out)


def test_what_prunelens_did_not_put_there_stays(folder):
    for path in ("artifacts/sae/notes", "artifacts/mine/abc", "artifacts/sae/0" + "A" * 63):
        (folder / path).mkdir(parents=True)
    inside = folder / "tables" / ("1" * 64)
    inside.mkdir()
    (folder / "artifacts" / "linked").symlink_to((folder / "tables").absolute())
    (folder / "artifacts/sae" / ("2" * 64)).symlink_to(inside.absolute())
    assert leftovers(folder) == []


def test_what_a_killed_prune_left_beside_its_out_is_found(tmp_path, monkeypatch):
    """In a folder of the user's own, by names that are ours alone; no lock is left there."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / ".pruned.notes.tmp"
    left = killed(tmp_path / ".pruned")
    for path in (tmp_path / "pruned", mine, left):
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(1000))
    assert why(tmp_path) == {left.name: KILLED}
    (found,) = clean_study(tmp_path)
    assert (found.path, found.num_bytes) == (left.name, 1000)
    assert sorted(tmp_path.iterdir()) == [mine, tmp_path / "pruned"]
    with pytest.raises(UserError, match=r"study\.yaml"):
        leftovers(tmp_path)


def test_a_label_cannot_write_to_the_terminal(folder):
    made = folder / "artifacts/sae" / ("3" * 64)
    made.mkdir()
    (made / "meta.json").write_text(json.dumps({"label": "\x1b[2Jgone\n[red]"}))
    assert [one.label for one in leftovers(folder)] == ["[2Jgone[red]"]
    for text in ("{", "[]", '{"label": {}}', "{}", "[" * 100_000):
        (made / "meta.json").write_text(text)
        assert len(leftovers(folder)) == 1


def test_the_command_shows_and_frees_only_when_told(folder, prunelens):
    assert prunelens("clean", folder).stdout == "nothing to free\n"
    made = folder / "artifacts/damaged/x"
    made.mkdir(parents=True)
    (made / "y").write_bytes(bytes(2_000_000))
    shown = prunelens("clean", folder)
    assert (
        shown.returncode == 0 and "artifacts/damaged/x" in shown.stdout and DAMAGED in shown.stdout
    )
    assert "2.0 MB in 1 folder; free them with: prunelens clean out --yes" in shown.stdout
    assert made.is_dir()
    told = json.loads(prunelens("clean", folder, "--json").stdout)
    assert told["freed"] is False and [one["num_bytes"] for one in told["leftovers"]] == [2_000_000]
    assert made.is_dir()
    freed = prunelens("clean", folder, "--yes")
    assert freed.returncode == 0 and "freed 2.0 MB in 1 folder" in freed.stdout
    assert not made.exists()


def test_wrong_folders_end_in_one_line_and_change_nothing(tmp_path, folder, prunelens):
    for words in ((tmp_path / "nowhere",), (tmp_path / "nowhere", "--yes")):
        refused = prunelens("clean", *words)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "nowhere" in refused.stderr and not (tmp_path / "nowhere").exists()
    (folder / "artifacts.json").write_text(json.dumps({"artifacts": str(tmp_path / "shared")}))
    with pytest.raises(UserError, match="other studies may need them"):
        leftovers(folder)
    (folder / "artifacts.json").write_text(
        json.dumps({"artifacts": str((folder / "artifacts").absolute())})
    )
    assert leftovers(folder) == []
    with filelock.FileLock(folder / ".lock"), pytest.raises(UserError, match="another prunelens"):
        clean_study(folder)
    (folder / "artifacts/damaged").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of"):
        leftovers(folder)


def test_what_another_process_is_writing_stays(folder):
    """It holds the stage's claim, as a worker of a killed run may."""
    sae = artifact(folder, "sae")
    killed(sae).mkdir()
    code = (
        "import pathlib, sys\nfrom prunelens.study.artifacts.store import Store\n"
        "with Store(pathlib.Path(sys.argv[1])).locks.holding(sys.argv[2]):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(folder / "artifacts"), sae.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with warm.Popen(words, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        assert leftovers(folder) == []
        process.communicate()
    assert [one.why for one in leftovers(folder)] == [KILLED]
    assert isinstance(open_study(folder)[1], Store)
