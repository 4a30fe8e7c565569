"""The local executor: makes what is missing, in order, on this machine.

Finished artifacts are never made again; a damaged one is set aside and remade. A stage that fails
fails the runs that need it and no others. Activation stores go as soon as nothing that is still
to be made reads them.
"""

from __future__ import annotations

import logging
import pathlib
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch

from prunelens.errors import UserError
from prunelens.study.plan import Plan, Run
from prunelens.study.progress import StudyProgress
from prunelens.study.stages import Work, execute
from prunelens.study.store import DamagedArtifactError, Stage, Store

log = logging.getLogger(__name__)

SHARED_BY_ALL = ("corpus", "text")  # a mistake here is the user's and ends the study


class RunResult(NamedTuple):
    """How a run ended."""

    run: Run
    status: str
    """`done` or `failed`."""
    reason: str
    """Why it failed, in one line; empty if it did not."""


class Outcome(NamedTuple):
    """How a study ended."""

    results: list[RunResult]
    num_executed: int
    """Stages that had to be made; 0 when everything was there."""


class _FailedError(Exception):
    """A stage, or one that it needs, cannot be made."""


def run_locally(
    plan: Plan, store: Store, *, device: str, progress: StudyProgress, log_folder: pathlib.Path
) -> Outcome:
    """Make every target of every run of `plan`.

    Raises: UserError if the text itself is at fault, before any run has begun.
    """
    executor = _Executor(plan, store, device, progress, log_folder)
    store.sweep_temporary()
    progress.start(executor.missing_cost())
    results = []
    for run in plan.runs:
        reason = ""
        for stage in run.targets():
            try:
                executor.ensure(stage)
            except _FailedError as failure:
                reason = reason or str(failure)
        results.append(RunResult(run, "failed" if reason else "done", reason))
    return Outcome(results, executor.num_executed)


class _Executor:
    def __init__(
        self,
        plan: Plan,
        store: Store,
        device: str,
        progress: StudyProgress,
        log_folder: pathlib.Path,
    ) -> None:
        self._plan, self._store, self._device = plan, store, device
        self._progress, self._log_folder = progress, log_folder
        self._failures: dict[str, str] = {}
        self.num_executed = 0

    def ensure(self, stage: Stage) -> pathlib.Path:
        """The verified artifact of `stage`, made now if need be."""
        if stage.identity in self._failures:
            raise _FailedError(self._failures[stage.identity])
        if self._store.has(stage):
            try:
                return self._store.read(stage)
            except DamagedArtifactError as damage:
                where = self._store.set_aside(stage)
                log.warning("damaged artifact %s: moved to %s and made again", damage, where.name)
        try:
            parents = {role: self.ensure(parent) for role, parent in stage.parents.items()}
        except _FailedError as failure:
            self._failures[stage.identity] = str(failure)
            raise
        self._execute(stage, parents)
        self._delete_unneeded()
        return self._store.read(stage)

    def missing_cost(self) -> float:
        """Work in all stages that are not there."""
        return sum(stage.cost for stage in self._missing())

    def _execute(self, stage: Stage, parents: dict[str, pathlib.Path]) -> None:
        try:
            with (
                self._progress.stage(stage) as report,
                self._store.writing(stage, device=self._device) as folder,
            ):
                partial = lambda: self._store.partial(stage)  # noqa: E731
                execute(Work(stage, parents, folder, partial, self._device, report))
        except UserError as error:
            if stage.name in SHARED_BY_ALL:
                raise
            self._fail(stage, str(error))
        except torch.OutOfMemoryError as error:
            self._fail(stage, f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # one run's failure, of any kind, must not stop the others
            self._log_folder.mkdir(parents=True, exist_ok=True)
            path = self._log_folder / f"{stage.name}-{stage.identity[:12]}.log"
            path.write_text(traceback.format_exc(), encoding="utf-8")
            first = (str(error).splitlines() or [""])[0][:200]
            self._fail(stage, f"{type(error).__name__}: {first} (traceback in logs/{path.name})")
        self.num_executed += 1

    def _fail(self, stage: Stage, reason: str) -> None:
        self._failures[stage.identity] = f"{stage.label}: {reason}"
        log.error("%s", self._failures[stage.identity])
        self._delete_unneeded()
        raise _FailedError(self._failures[stage.identity]) from None

    def _missing(self) -> Iterator[Stage]:
        """Stages still to be made, parents first."""
        seen: set[str] = set()

        def walk(stage: Stage) -> Iterator[Stage]:
            if stage.identity in seen or stage.identity in self._failures:
                return
            seen.add(stage.identity)
            if self._store.has(stage):
                return
            for parent in stage.parents.values():
                yield from walk(parent)
            yield stage

        for target in self._plan.targets().values():
            yield from walk(target)

    def _delete_unneeded(self) -> None:
        if self._plan.study.keep_activations:
            return
        needed = {parent.identity for stage in self._missing() for parent in stage.parents.values()}
        for run in self._plan.runs:
            for stage in run.temporary():
                if stage.identity not in needed and self._store.has(stage):
                    self._store.delete(stage)
