"""Stages that are made in one go: the same artifacts as one by one, and failures stay apart."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pytest

from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.write import run_and_report
from prunelens.study import local, schedule
from prunelens.study.artifacts.seal import sha256_of
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.plan import plan_study
from prunelens.study.progress import StudyProgress
from prunelens.study.stages import STAGES

REAL = STAGES["activations"]
WORDS = ["The quick brown fox", "jumps over it", "def greet(name):", "return 'hello ' + name"]


@pytest.fixture(scope="module")
def study(checkpoint_folder, tmp_path_factory):
    """Two layers, one pruned condition, one seed."""
    generator = np.random.default_rng(0)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(generator.choice(WORDS, 6)) + f" {n}" for n in range(200)]
    text.write_text("\n".join(lines))
    data = {
        "name": "layers",
        "models": [{"name": str(checkpoint_folder), "layers": [0, 1]}],
        "corpus": {
            "source": "files",
            "paths": [str(text)],
            "document": "line",
            "context_tokens": 16,
            "train_tokens": 1600,
            "eval_tokens": 800,
            "calibration_tokens": 160,
        },
        "perplexity": {"context_tokens": [16]},
        "prunings": [{"criterion": "magnitude", "scope": "global", "sparsities": [0.5]}],
        "sae": {"expansion": 2, "k": 4, "steps": 8, "batch_tokens": 64, "seeds": [0]},
        "questions": ["persistence"],
        "keep_activations": True,
        "threads_per_stage": 1,
    }
    return study_from_data(data)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures and page take longer than the study itself."""
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)


@pytest.fixture
def groups(monkeypatch):
    """The layers of every call for activations."""
    called = []

    def counted(works):
        called.append([work.config["layer"] for work in works])
        REAL.made(works)

    monkeypatch.setitem(STAGES, "activations", replace(REAL, make_together=counted))
    return called


def files_of(out):
    """What was made, but for what says when and how long it took."""
    paths = [p for p in out.rglob("*") if p.is_file()]
    aside = {"meta.json", "environment.json", "runs.csv", ".drawn", ".lock"}
    return {str(p.relative_to(out)): sha256_of(p) for p in paths if p.name not in aside}


def test_in_one_go_and_one_by_one_give_the_same_files(study, tmp_path, monkeypatch, groups):
    told = {}
    update = StudyProgress.update

    def note(self, stage, share):
        told.setdefault(stage.label, []).append(share)
        update(self, stage, share)

    monkeypatch.setattr(StudyProgress, "update", note)
    together = run_and_report(study, tmp_path / "together", quiet=True)
    assert groups == [[0, 1], [0, 1]]  # dense, pruned
    shares = {name: told[name] for name in told if name.startswith("activations")}
    assert len(shares) == 4
    for found in shares.values():
        assert found == sorted(found) and found[0] == 0 and found[-1] == pytest.approx(1)

    groups.clear()
    ready = schedule._Scheduler._ready
    monkeypatch.setattr(
        schedule._Scheduler, "_ready", lambda self, *, alone: ready(self, alone=alone)[:1]
    )
    alone = run_and_report(study, tmp_path / "alone", quiet=True)
    assert groups == [[0], [1], [0], [1]]
    assert together.num_executed == alone.num_executed
    assert {r.status for r in (*together.results, *alone.results)} == {"done"}
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")


def test_what_goes_together_differs_in_the_layer_alone(study):
    plan = plan_study(study)
    stores = {stage.identity: stage for run in plan.runs for stage in run.temporary()}.values()
    assert len(stores) == 4
    assert len({stage.together for stage in stores}) == 2  # dense and pruned
    assert "" not in {stage.together for stage in stores}
    for changed in ({"storage": "bfloat16"}, {"skip_first": 2}):
        other = study.model_copy(
            update={"activations": study.activations.model_copy(update=changed)}
        )
        keys = {stage.together for run in plan_study(other).runs for stage in run.temporary()}
        assert not keys & {stage.together for stage in stores}
    plain = Stage("sae", 1, {"k": 4}, {})
    assert Stage("sae", 1, {"k": 4}, {}, together="x").identity == plain.identity


def test_one_that_fails_costs_its_own_run_alone(study, tmp_path, monkeypatch, caplog):
    def failing(works):
        if any(work.config["layer"] == 1 and "prune" in work.parents for work in works):
            raise UserError("activations: NaN; use bfloat16")
        REAL.made(works)

    monkeypatch.setitem(STAGES, "activations", replace(REAL, make_together=failing))
    outcome = run_and_report(study, tmp_path, quiet=True)
    status = {result.run.name.partition("/")[2]: result.status for result in outcome.results}
    assert status == {
        "L0/dense": "done",
        "L1/dense": "done",
        "L0/magnitude-global-0.50": "done",
        "L1/magnitude-global-0.50": "failed",
    }
    (reason,) = {result.reason for result in outcome.results if result.reason}
    assert reason.startswith("activations tiny-llama/L1/magnitude-global-0.50: activations: NaN")
    assert "2 activations stages are made one by one" in caplog.text


def test_a_group_that_only_fails_as_one_is_made_one_by_one(study, tmp_path, monkeypatch):
    """Whether memory is short, which is told, or something is wrong, whose traceback is kept."""
    errors = iter([MemoryError(), RuntimeError("a bug of ours")])

    def too_large(works):
        if len(works) > 1:
            raise next(errors)
        REAL.made(works)

    monkeypatch.setitem(STAGES, "activations", replace(REAL, make_together=too_large))
    outcome = run_and_report(study, tmp_path, quiet=True)
    assert {result.status for result in outcome.results} == {"done"}
    assert len(list((tmp_path / "logs").glob("*-and-1-more.log"))) == 1
    assert not list((tmp_path / "artifacts").glob("*/*.tmp"))


class _DyingOnGroups(Executor):
    """A pool whose process dies when it is given more than one stage."""

    def submit(self, fn, /, request, identities, log_folder):
        future: Future = Future()
        if len(identities) > 1:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(fn(request, identities, log_folder))
        return future


@pytest.mark.usefixtures("warm_workers")
def test_members_of_a_group_that_kills_its_process_are_tried_alone(
    study, tmp_path, monkeypatch, groups
):
    monkeypatch.setattr(local, "ProcessPoolExecutor", lambda *_, **__: _DyingOnGroups())
    outcome = run_and_report(study, tmp_path, workers=2, quiet=True)
    assert {result.status for result in outcome.results} == {"done"}
    assert groups == [[0], [1], [0], [1]]


class _InThisProcess(Executor):
    """What a worker does, without its process."""

    def submit(self, fn, /, *args):
        future: Future = Future()
        future.set_result(fn(*args))
        return future


@pytest.mark.usefixtures("warm_workers")
def test_workers_make_groups_and_only_what_is_missing(study, tmp_path, monkeypatch, groups):
    monkeypatch.setattr(local, "ProcessPoolExecutor", lambda *_, **__: _InThisProcess())
    first = run_and_report(study, tmp_path, workers=2, quiet=True)
    assert {result.status for result in first.results} == {"done"}
    assert groups == [[0, 1], [0, 1]]
    store = Store(tmp_path / "artifacts")
    run = plan_study(study).runs[-1]
    (pruned,) = (s for s in run.temporary() if "prune" in s.parents)
    store.delete(pruned)
    store.delete(run.stages["persistence"])
    again = run_and_report(study, tmp_path, workers=2, quiet=True)
    assert again.num_executed == 2
    assert groups[2:] == [[1]]


def test_what_a_failed_group_has_published_stays(study, tmp_path, monkeypatch, groups):
    """One of two cannot be written at the first try: only that one is made again."""
    real, failed = Store._finish, []

    def full_disk(self, stage, folder, facts):
        if stage.name == "activations" and stage.config["layer"] == 0 and not failed:
            failed.append(stage)
            raise OSError("no space left")
        real(self, stage, folder, facts)

    monkeypatch.setattr(Store, "_finish", full_disk)
    outcome = run_and_report(study, tmp_path, quiet=True)
    assert {result.status for result in outcome.results} == {"done"}
    assert groups == [[0, 1], [0], [0, 1]]
