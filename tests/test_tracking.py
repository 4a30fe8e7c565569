"""Tracking: what is logged, and that nothing else depends on it."""

import importlib.machinery
import json
import pathlib
import subprocess
import sys
import types

import pytest

from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.write import run_and_report
from prunelens.study.plan import plan_study
from prunelens.study.tracking import NOT_TRACKED, TRACKERS, RunFacts, check_tracking, open_tracker
from tiny_study import tiny_study, write_text

TRAINING = ("dead_share", "fvu", "learning_rate", "loss", "mean_init_retention")


@pytest.fixture(scope="module")
def data(checkpoint_folder, tmp_path_factory):
    """One pruning, two SAEs each, hardly a question."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    study = tiny_study(checkpoint_folder, text)
    return {**study, "prunings": study["prunings"][1:], "questions": ["stability"]}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)


def facts(folder):
    return RunFacts("study", "sae a/b 0-0", "0123456789abcdef" * 4, folder, {"k": 4})


class FakeService:
    """Stands in the place of wandb or trackio, and notes what is asked of it."""

    def __init__(self, fails: str = ""):
        self.opened, self.logged, self.closed, self._fails = [], [], 0, fails

    def init(self, **options):
        if self._fails == "init":
            raise ConnectionError("no network")
        self.opened.append(options)
        return self

    def log(self, numbers, step):
        if self._fails == "log":
            raise ConnectionError("no network")
        self.logged.append((step, numbers))

    def finish(self):
        self.closed += 1

    def install(self, monkeypatch, name):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = self.init
        module.Settings = dict
        monkeypatch.setitem(sys.modules, name, module)


def results(out):
    """Of a study, all that does not tell the time it took."""
    files = {path.name: path.read_bytes() for path in (out / "tables").glob("*.csv")}
    for path in out.glob("artifacts/*/*/*"):
        if path.name != "meta.json":
            files[path.relative_to(out).as_posix()] = path.read_bytes()
    assert files
    return files


def saes(data):
    runs = plan_study(study_from_data(data)).runs
    return {stage.identity: stage for run in runs for stage in run.saes.values()}


def test_nothing_is_tracked_by_default():
    check_tracking(None)
    tracker = NOT_TRACKED.open("x", "0", {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()


@pytest.mark.parametrize("kind", ["mlflow", *TRACKERS])
def test_what_is_not_there_is_told_before_anything_runs(data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    told = f"pip install {kind}" if kind in TRACKERS else "is not known"
    with pytest.raises(UserError, match=told):
        run_and_report(study_from_data(data), tmp_path / "s", quiet=True, track=kind)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_calls_of_a_service(kind, tmp_path, monkeypatch):
    service = FakeService()
    service.install(monkeypatch, kind)
    check_tracking(kind)
    tracker = open_tracker(kind, facts(tmp_path))
    tracker.log(3, {"loss": 1.5, "fvu": float("nan")})
    tracker.close()
    tracker.close()
    (options,) = service.opened
    assert options["config"] == {"k": 4} and options["resume"] == "allow"
    assert "0123456789ab" in (options["id"] if kind == "wandb" else options["name"])
    assert options["group" if kind == "wandb" else "project"] == "study"
    assert service.logged == [(3, {"loss": 1.5})] and service.closed == 1


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_service_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch, caplog, fails):
    service = FakeService(fails)
    service.install(monkeypatch, "wandb")
    tracker = open_tracker("wandb", facts(tmp_path))
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(caplog.records) == 1 and "the study goes on" in caplog.text
    assert "no network" in caplog.text and service.logged == []


def test_a_study_is_the_same_with_and_without(data, tmp_path, monkeypatch):
    service = FakeService()
    service.install(monkeypatch, "trackio")
    study = study_from_data(data)
    run_and_report(study, tmp_path / "without", quiet=True)
    outcome = run_and_report(study, tmp_path / "with", quiet=True, track="trackio")
    assert results(tmp_path / "with") == results(tmp_path / "without")
    assert not (tmp_path / "without" / "tracking").exists()
    trained = saes(data)
    assert len(service.opened) == service.closed == len(trained) + 1
    labels = [options["name"].rsplit(" ", 1)[0] for options in service.opened]
    assert labels == ["study", *(stage.label for stage in trained.values())]
    names = {name for _, numbers in service.logged for name in numbers}
    assert {f"train/{name}" for name in TRAINING} < names
    assert {"quality/fvu", "quality/l0", "wall_seconds/sae", "wall_seconds/corpus"} < names
    assert sum(any("wall" in n for n in numbers) for _, numbers in service.logged) == (
        outcome.num_executed
    )
    # A study that is there has nothing to tell of SAEs, and another service is another matter.
    again = run_and_report(study, tmp_path / "with", quiet=True)
    assert again.num_executed == 0 and len(service.opened) == len(trained) + 1


@pytest.mark.usefixtures("warm_workers")
def test_tensorboard_files_from_two_workers(data, tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    study, out = study_from_data(data), tmp_path / "s"
    run_and_report(study, out, quiet=True, workers=2, device="cpu", track="tensorboard")
    found = {}
    for folder in (out / "tracking" / "tensorboard").iterdir():
        events = accumulators.EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()["scalars"]
        found[folder.name[-12:]] = {tag: events.Scalars(tag) for tag in tags}
    for identity, stage in saes(data).items():
        points = found.pop(identity[:12])
        assert {f"train/{name}" for name in TRAINING} < set(points)
        steps = [event.step for event in points["train/loss"]]
        assert steps == sorted(steps) and steps[-1] == data["sae"]["steps"]
        artifact = out / "artifacts" / "sae" / stage.identity
        quality = json.loads((artifact / "quality.json").read_text())
        assert points["quality/fvu"][0].value == pytest.approx(quality["fvu"])
    ((_, points),) = found.items()
    assert set(points) >= {"wall_seconds/sae", "wall_seconds/activations"}


OFFLINE = """
import pathlib, sys
from prunelens.study.tracking import RunFacts, open_tracker
tracker = open_tracker("wandb", RunFacts("s", "sae x", "ab" * 32, pathlib.Path(sys.argv[1]), {}))
tracker.log(1, {"train/loss": 2.0})
tracker.log(2, {"train/loss": 1.0})
tracker.close()
"""


def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ends here" not in done.stderr, done.stderr
    (run,) = (tmp_path / "t" / "wandb").glob("offline-run-*")
    (written,) = run.glob("*.wandb")
    assert run.name.endswith("ab" * 16) and b"train/loss" in written.read_bytes()
    assert not list(pathlib.Path(tmp_path).rglob("*.pkl"))
