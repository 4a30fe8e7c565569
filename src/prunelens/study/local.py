"""The local executor: makes what is missing, in this process or in several.

Finished artifacts are never made again; a damaged one is set aside and remade. A stage that fails
fails the runs that need it and no others. Activation stores go as soon as nothing that is still
to be made reads them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from prunelens.errors import UserError
from prunelens.study.matrix import Plan, Run
from prunelens.study.progress import StudyProgress
from prunelens.study.stages import try_stages
from prunelens.study.store import DamagedArtifactError, Stage, Store
from prunelens.study.worker import die_with_parent, make_by_identity, read_share, worker_context

DIED = (
    "its process died twice; was there enough memory? (A script that starts several workers has to"
    " do so under `if __name__ == '__main__':`)"
)
log = logging.getLogger(__name__)

TEXT = ("corpus", "text")  # stages that read text; they have no parents
POLL_SECONDS = 0.5  # how often the progress of other processes is looked at
Result = TypeVar("Result")


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
    failures: tuple[str, ...] = ()
    """What failed that belongs to no single run."""


def run_locally(
    plan: Plan,
    store: Store,
    *,
    device: str,
    workers: int,
    progress: StudyProgress,
    log_folder: pathlib.Path,
    on_text: Callable[[], None],
) -> Outcome:
    """Make every target of every run of `plan`, in `workers` processes (1: in this one).

    The text comes first: what is wrong with it is wrong for all runs of its model.
    Raises: UserError if the text is at fault; nothing else has been made then.
    """
    store.sweep_temporary()
    scheduler = _Scheduler(plan, store, device, progress, log_folder)
    scheduler.start()
    scheduler.make_text()
    on_text()
    while scheduler.is_unfinished():
        with _pool(workers, device) as pool, contextlib.suppress(BrokenProcessPool):
            scheduler.work_in(pool, limit=workers)
    return Outcome([scheduler.result(run) for run in plan.runs], scheduler.num_executed)


class _Scheduler:
    """What is missing, what is being made, what failed."""

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
        # Stages that are made in one go have one future, which says why each failed.
        self._running: dict[str, tuple[Stage, Future[dict[str, str | None]]]] = {}
        self._failures: dict[str, str] = {}
        self._crashed: set[str] = set()  # stages whose process died once
        self.num_executed = 0

    def start(self) -> None:
        """Delete stores that a killed process left behind, and count what is to be done."""
        self._delete_unneeded()
        self._progress.start(sum(stage.cost for stage in self._missing()))

    def make_text(self) -> None:
        """Make the stages that read text, here. Raises UserError where the text is at fault."""
        for stage in [s for s in self._missing() if s.name in TEXT]:
            if failure := self._make_here([stage])[stage.identity]:
                raise UserError(failure)
            self._settle(stage, None)

    def is_unfinished(self) -> bool:
        """Whether there is anything left that can be made."""
        return next(self._missing(), None) is not None

    def work_in(self, pool: Executor, *, limit: int) -> None:
        """Submit whatever is ready, at most `limit` at a time, until nothing is left to do.

        Raises: BrokenProcessPool where a worker died; its stages are tried once more, each alone.
        """
        while True:
            self._submit_ready(pool, 1 if self._crashed else limit)
            if not self._running:
                self._delete_unneeded()
                return
            done = concurrent.futures.wait(
                self._futures(), POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            ).done
            for stage, future in list(self._running.values()):
                if future in done:
                    self._settle(stage, self._outcome(stage, future))
                else:
                    self._progress.update(stage, read_share(self._store, stage))

    def result(self, run: Run) -> RunResult:
        """How `run` ended: failed for the first reason that one of its targets failed for."""
        for stage in run.targets():
            if stage.identity in self._failures:
                return RunResult(run, "failed", self._failures[stage.identity])
            assert self._store.has(stage), f"{stage.label} neither failed nor is there"
        return RunResult(run, "done", "")

    def _futures(self) -> set[Future[dict[str, str | None]]]:
        return {future for _, future in self._running.values()}

    def _outcome(self, stage: Stage, future: Future[dict[str, str | None]]) -> str | None:
        """Why the stage failed, or None; what a dead worker was at is tried once more."""
        try:
            return future.result()[stage.identity]
        except BrokenProcessPool:
            running = [s for s, _ in self._running.values()]
            self._running.clear()
            for other in running:
                if len(running) == 1 and other.identity in self._crashed:
                    self._settle(other, DIED)
                else:
                    self._crashed.add(other.identity)
            raise

    def _submit_ready(self, pool: Executor, limit: int) -> None:
        while len(self._futures()) < limit:
            group = self._ready(alone=limit > 1)
            if not group:
                return
            for stage in group:
                self._progress.update(stage, 0.0)
            if isinstance(pool, _Here):
                future = pool.submit(self._make_here, group)
            else:
                identities = [stage.identity for stage in group]
                future = pool.submit(
                    make_by_identity, self._request, identities, str(self._log_folder)
                )
            for stage in group:
                self._running[stage.identity] = (stage, future)
            if future.done():
                return

    def _ready(self, *, alone: bool) -> list[Stage]:
        """The first stage that can be made now, and all that are best made in one go with it.

        SAEs that could share their batches go `alone` where there are several workers: reading is
        a hundredth of a step, which is less than a worker without work loses.

        Once a process has died, every stage goes alone: then it is clear which one is at fault.
        """
        first = next((stage for stage in self._missing() if self._is_ready(stage)), None)
        if first is None:
            return []
        if not first.together or self._crashed or (alone and first.name == "sae"):
            return [first]
        key = (first.name, first.together)
        alike = [stage for stage in self._missing() if (stage.name, stage.together) == key]
        return [stage for stage in alike if self._is_ready(stage)]

    @property
    def _request(self) -> str:
        """What another process needs to know: plain JSON."""
        folder = str(self._store.root.absolute())
        study = self._plan.study.model_dump(mode="json")
        return json.dumps({"study": study, "artifacts": folder, "device": self._device})

    def _make_here(self, stages: list[Stage]) -> dict[str, str | None]:
        failures = try_stages(
            self._store,
            stages,
            device=self._device,
            progress=self._progress.update,
            log_folder=self._log_folder,
        )
        return {stage.identity: why for stage, why in zip(stages, failures, strict=True)}

    def _settle(self, stage: Stage, failure: str | None) -> None:
        self._running.pop(stage.identity, None)
        self._crashed.discard(stage.identity)
        self.num_executed += 1
        self._progress.finish(stage)
        if failure is None and not self._is_sound(stage):
            failure = "was written but cannot be read back; is the disk sound?"
        if failure is not None:
            self._failures[stage.identity] = f"{stage.label}: {failure}"
            log.error("%s", self._failures[stage.identity])
        self._delete_unneeded()

    def _is_ready(self, stage: Stage) -> bool:
        """Whether all parents are there, undamaged; also finds out that one has failed."""
        if stage.identity in self._running or stage.identity in self._failures:
            return False
        for parent in stage.parents.values():
            if parent.identity in self._failures:
                self._failures[stage.identity] = self._failures[parent.identity]
                return False
        return all(self._is_sound(parent) for parent in stage.parents.values())

    def _is_sound(self, stage: Stage) -> bool:
        """Whether the artifact is there and what was written; a damaged one is set aside."""
        if not self._store.has(stage):
            return False
        try:
            self._store.read(stage)
        except DamagedArtifactError as damage:
            where = self._store.set_aside(stage)
            log.warning("damaged artifact %s: moved to %s and made again", damage, where.name)
            return False
        return True

    def _missing(self) -> Iterator[Stage]:
        """Stages still to be made, parents first, in the order of the plan."""
        seen: set[str] = set()

        def walk(stage: Stage) -> Iterator[Stage]:
            if stage.identity in seen or stage.identity in self._failures:
                return
            seen.add(stage.identity)
            if self._is_sound(stage):
                return
            for parent in stage.parents.values():
                yield from walk(parent)
            yield stage

        for target in self._plan.targets().values():
            yield from walk(target)

    def _delete_unneeded(self) -> None:
        if self._plan.study.keep_activations:
            return
        waiting = [*self._missing(), *(stage for stage, _ in self._running.values())]
        needed = {parent.identity for stage in waiting for parent in stage.parents.values()}
        for run in self._plan.runs:
            for stage in run.temporary():
                if stage.identity not in needed and self._store.has(stage):
                    self._store.delete(stage)


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _pool(workers: int, device: str) -> Iterator[Executor]:
    """Processes that no thread and no CUDA of this one can disturb, or none."""
    if workers == 1:
        yield _Here()
        return
    context = worker_context(device)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent)
    try:
        yield pool
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):  # what they were at can be made again
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
