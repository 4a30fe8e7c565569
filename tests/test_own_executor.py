"""An executor is one class behind the seam: what it makes is what this process would have made."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from faults.kill import differences, results_of
from prunelens.config import study_from_data
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.tables import write_tables
from prunelens.study import run
from prunelens.study.artifacts.store import Stage
from prunelens.study.executor import Executor, Failures, Here
from prunelens.study.folder import open_study
from prunelens.study.results import study_results
from tiny_study import run_with_pool, tiny_study, write_text


class InAThread:
    """Somebody else's: takes two orders at a time, and makes them elsewhere than the scheduler."""

    at_once, shares_fate = 2, False

    def __init__(self, here: Here, pool: ThreadPoolExecutor) -> None:
        self._here, self._pool, self.made = here, pool, list[str]()

    def submit(self, stages: list[Stage]) -> Future[Failures]:
        """One after the other, in the only thread of the pool."""
        self.made += [stage.identity for stage in stages]
        return self._pool.submit(lambda: self._here.submit(stages).result())


def tables_of(out: pathlib.Path) -> dict[str, bytes]:
    plan, store = open_study(out)
    write_paper_tables(write_tables(study_results(plan, store), out), plan.study, out)
    return results_of(out)


def test_its_tables_are_those_of_one_process(
    checkpoint_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    pool: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    study = study_from_data(
        {**data, "questions": ["survival", "persistence"], "prunings": data["prunings"][:1]}
    )
    run_with_pool(study, tmp_path / "plain", pool, run.run_study)
    opened: list[InAThread] = []

    @contextlib.contextmanager
    def in_a_thread(here: Here) -> Iterator[Executor]:
        with ThreadPoolExecutor(1) as threads:
            opened.append(InAThread(here, threads))
            assert isinstance(opened[-1], Executor)
            yield opened[-1]

    monkeypatch.setattr(run, "_on_this_machine", lambda *_: contextlib.nullcontext(in_a_thread))
    outcome = run.run_study(study, tmp_path / "own", quiet=True)
    (executor,) = opened
    assert len(executor.made) == outcome.num_executed - 1 > 10  # whoever asks reads the text
    assert {result.status for result in outcome.results} == {"done"}
    assert differences(tables_of(tmp_path / "plain"), tables_of(tmp_path / "own")) == []
