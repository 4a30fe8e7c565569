"""What is missing, what is being made, what failed: the order of work, whoever does it.

Finished artifacts are never made again; a damaged one is set aside and remade. A stage that fails
fails the runs that need it and no others. Activation stores go as soon as nothing that is still
to be made reads them. Who makes the stages is an `executor`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import AbstractContextManager
from typing import NamedTuple

from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.executor import Executor, Failures, Here, NodeLostError
from prunelens.study.matrix import STORES, Plan, Run, parents_first
from prunelens.study.progress import StudyProgress
from prunelens.study.shared_folder import wait_until_there
from prunelens.study.stages import STAGES
from prunelens.study.worker import read_share

DIED = (
    "its process died twice; was there enough memory? (A script that starts several workers has to"
    " do so under `if __name__ == '__main__':`)"
)
log = logging.getLogger(__name__)

TEXT = ("corpus", "text")  # stages that read text; they have no parents
NODES_LOST_BY_CHANCE = 3  # machines that die under a stage before it is suspected
POLL_SECONDS = 0.5  # how often the progress of other processes is looked at


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


def make_all(
    plan: Plan,
    store: Store,
    here: Here,
    opener: Callable[[Here], AbstractContextManager[Executor]],
    *,
    progress: StudyProgress,
    on_text: Callable[[], None],
    on_made: Callable[[Stage], None] = lambda _: None,
) -> Outcome:
    """Make every target of every run of `plan`.

    The text comes first, and in this process: what is wrong with it is wrong for all runs of its
    model.

    Args:
        plan: what to make.
        store: where it goes.
        here: makes the text.
        opener: gives what makes the rest, which may be `here`; called again where it broke.
        progress: told of every stage.
        on_text: called once the text is there.
        on_made: called with every stage that was made.
    Raises: UserError if the text is at fault; nothing else has been made then.
    """
    store.sweep_temporary()
    scheduler = _Scheduler(plan, store, progress, on_made)
    scheduler.start()
    scheduler.make_text(here)
    on_text()
    while scheduler.is_unfinished():
        with opener(here) as executor:
            scheduler.work_with(executor)
    return Outcome([scheduler.result(run) for run in plan.runs], scheduler.num_executed)


def finished_targets(plan: Plan, store: Store) -> set[str]:
    """Identities of the targets that are there, whole or not; a store is asked once per kind."""
    targets = plan.targets()
    kinds = {stage.name for stage in targets.values()}
    return targets.keys() & {identity for kind in kinds for identity in store.finished(kind)}


class _Scheduler:
    """What is missing, what is being made, what failed."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        progress: StudyProgress,
        on_made: Callable[[Stage], None],
    ) -> None:
        self._plan, self._store, self._progress = plan, store, progress
        self._on_made = on_made
        # Stages that are made in one go have one future, which says why each failed.
        self._running: dict[str, tuple[Stage, Future[Failures]]] = {}
        self._failures: dict[str, str] = {}
        self._crashed: set[str] = set()  # stages whose worker died once
        # What was found when an artifact was last looked at; to look again may ask a network.
        self._sound: dict[str, bool] = {}
        self._bereft: set[str] = set()  # stages that a damaged parent has failed once
        self._nodes_lost: collections.Counter[str] = collections.Counter()
        self.num_executed = 0

    def start(self) -> None:
        """Delete stores that a killed process left behind, and count what is to be done."""
        absent = self._plan.targets().keys() - finished_targets(self._plan, self._store)
        self._sound.update(dict.fromkeys(absent, False))
        self._delete_unneeded()
        self._progress.start(sum(stage.cost for stage in self._missing()))

    def make_text(self, here: Here) -> None:
        """Make the stages that read text. Raises UserError where the text is at fault."""
        for stage in [s for s in self._missing() if s.name in TEXT]:
            if failure := here.submit([stage]).result()[stage.identity]:
                raise UserError(failure)
            self._settle(stage, None)

    def is_unfinished(self) -> bool:
        """Whether there is anything left that can be made."""
        return next(self._missing(), None) is not None

    def work_with(self, executor: Executor) -> None:
        """Submit whatever is ready until nothing is left to do, or the executor has broken.

        What a dead worker was at is tried once more, alone.
        """
        while True:
            self._submit_ready(executor)
            if not self._running:
                self._delete_unneeded()
                return
            done = concurrent.futures.wait(
                self._futures(), POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            ).done
            died = {f for f in done if isinstance(f.exception(), BrokenExecutor)}
            for stage, future in list(self._running.values()):
                if future in done - died:
                    self._settle(stage, future.result()[stage.identity])
                elif future not in done:
                    self._progress.update(stage, read_share(self._store, stage))
            if died and executor.shares_fate:
                self._blame([stage for stage, _ in self._running.values()])
                return
            for future in died:
                suspects = [stage for stage, its in self._running.values() if its is future]
                if not isinstance(future.exception(), NodeLostError) or self._lose_again(suspects):
                    self._blame(suspects)

    def result(self, run: Run) -> RunResult:
        """How `run` ended: failed for the first reason that one of its targets failed for."""
        for stage in run.targets():
            if stage.identity in self._failures:
                return RunResult(run, "failed", self._failures[stage.identity])
            assert self._store.has(stage), f"{stage.label} neither failed nor is there"
        return RunResult(run, "done", "")

    def _futures(self) -> set[Future[Failures]]:
        return {future for _, future in self._running.values()}

    def _lose_again(self, stages: list[Stage]) -> bool:
        """Whether too many machines have died under these; else they are ready once more."""
        self._nodes_lost.update(stage.identity for stage in stages)
        if max(self._nodes_lost[stage.identity] for stage in stages) > NODES_LOST_BY_CHANCE:
            return True
        for stage in stages:
            del self._running[stage.identity]
            self._sound.pop(stage.identity, None)  # it may have been published before
        return False

    def _blame(self, suspects: list[Stage]) -> None:
        """One of these took its worker with it; the only suspect for the second time fails."""
        for stage in suspects:
            del self._running[stage.identity]
            self._sound.pop(stage.identity, None)  # it may have been published before
            if len(suspects) == 1 and stage.identity in self._crashed:
                self._settle(stage, DIED)
            else:
                self._crashed.add(stage.identity)

    def _submit_ready(self, executor: Executor) -> None:
        at_once = executor.at_once
        if executor.shares_fate and self._crashed:
            at_once = 1  # so that it is clear which one is at fault
        while at_once is None or len(self._futures()) < at_once:
            group = self._ready(alone=executor.at_once != 1)
            if not group:
                return
            for stage in group:
                self._progress.update(stage, 0.0)
            future = executor.submit(group)
            for stage in group:
                self._running[stage.identity] = (stage, future)
            if future.done():
                return

    def _ready(self, *, alone: bool) -> list[Stage]:
        """The first stage that can be made now, and all that are best made in one go with it.

        SAEs that could share their batches go `alone` where there are several workers: reading is
        a hundredth of a step, which is less than a worker without work loses.

        Once a worker has died, every stage goes alone: then it is clear which one is at fault.
        """
        first = next((stage for stage in self._missing() if self._is_due(stage)), None)
        if first is None:
            return []
        if not first.together or self._crashed or (alone and STAGES[first.name].one_each):
            return [first]
        key = (first.name, first.together)
        alike = [stage for stage in self._missing() if (stage.name, stage.together) == key]
        others = [stage for stage in alike if stage.identity != first.identity]
        return [first, *(stage for stage in others if self._is_due(stage))]

    def _settle(self, stage: Stage, failure: str | None) -> None:
        self._running.pop(stage.identity, None)
        self._crashed.discard(stage.identity)
        if failure is not None and self._has_lost_a_parent(stage):
            log.warning("%s: made again with what it reads (%s)", stage.label, failure)
            return
        self.num_executed += 1
        self._progress.finish(stage)
        if failure is None:
            wait_until_there(self._store, [stage])
        if failure is None and not self._is_sound(stage):
            failure = "was written but cannot be read back; is the disk sound?"
        if failure is not None:
            self._failures[stage.identity] = f"{stage.label}: {failure}"
            log.error("%s", self._failures[stage.identity])
        else:
            self._on_made(stage)
        self._delete_unneeded()

    def _is_due(self, stage: Stage) -> bool:
        """Whether it can be made now; also finds out that nothing needs a store any longer.

        What reads an activation store may have been made by another process since.
        """
        if not self._is_ready(stage):
            return False
        return stage.name not in STORES or any(
            not self._is_sound(reader)
            for reader in self._missing()
            if stage.identity in {parent.identity for parent in reader.parents.values()}
        )

    def _is_ready(self, stage: Stage) -> bool:
        """Whether all parents are there, undamaged; also finds out that one has failed."""
        if stage.identity in self._running or stage.identity in self._failures:
            return False
        for parent in stage.parents.values():
            if parent.identity in self._failures:
                self._failures[stage.identity] = self._failures[parent.identity]
                return False
        parents = stage.parents.values()
        return all(map(self._was_sound, parents)) and all(map(self._is_sound, parents))

    def _has_lost_a_parent(self, stage: Stage) -> bool:
        """Whether a parent is no longer sound; asked once of a stage, so that it comes to an end.

        A worker on another machine may be the first to see that an artifact is damaged.
        """
        if stage.identity in self._bereft:
            return False
        self._bereft.add(stage.identity)
        for parent in stage.parents.values():
            self._store.forget(parent)
        return bool([parent for parent in stage.parents.values() if not self._is_sound(parent)])

    def _is_sound(self, stage: Stage) -> bool:
        """Whether the artifact is there and what was written; a damaged one is set aside."""
        self._sound[stage.identity] = self._store.is_sound(stage)
        return self._sound[stage.identity]

    def _was_sound(self, stage: Stage) -> bool:
        """`_is_sound` when it was last asked."""
        known = self._sound.get(stage.identity)
        return self._is_sound(stage) if known is None else known

    def _missing(self) -> Iterator[Stage]:
        """Stages still to be made, parents first, in the order of the plan."""

        def is_settled(stage: Stage) -> bool:
            return stage.identity in self._failures or self._was_sound(stage)

        return parents_first(self._plan.targets().values(), but=is_settled)

    def _delete_unneeded(self) -> None:
        if self._plan.study.keep_activations:
            return
        waiting = [*self._missing(), *(stage for stage, _ in self._running.values())]
        needed = {parent.identity for stage in waiting for parent in stage.parents.values()}
        for run in self._plan.runs:
            for stage in run.temporary():
                if stage.identity not in needed and self._was_sound(stage):
                    self._store.delete(stage)
                    self._sound[stage.identity] = False
