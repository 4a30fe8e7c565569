"""Who makes stages: the seam between the order of work and processes or machines.

`Here` is this process; `local` has several processes, `cluster` the nodes of a Ray cluster.
"""

from __future__ import annotations

import pathlib
from concurrent.futures import BrokenExecutor, Future
from typing import Protocol, runtime_checkable

from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.progress import StudyProgress
from prunelens.study.stages import try_stages
from prunelens.study.tracking import NOT_TRACKED, Tracking

Failures = dict[str, str | None]  # by identity: why a stage failed, or None


class NodeLostError(BrokenExecutor):
    """A worker is gone with its whole machine, which need not be the stage's fault."""


@runtime_checkable
class Executor(Protocol):
    """Who makes stages."""

    @property
    def at_once(self) -> int | None:
        """How many it makes side by side; None: it queues as many as there are."""

    @property
    def shares_fate(self) -> bool:
        """A worker that dies takes the others along; the executor is of no use then."""

    def submit(self, stages: list[Stage]) -> Future[Failures]:
        """Make stages in one go, their parents being there.

        The future ends with `BrokenExecutor` where the worker died and did not say how the stage
        ended, with `NodeLostError` where its machine did.
        """


class Here:
    """Makes what is submitted at once, in this process."""

    at_once, shares_fate = 1, False

    def __init__(
        self,
        store: Store,
        device: str,
        progress: StudyProgress,
        log_folder: pathlib.Path,
        tracking: Tracking = NOT_TRACKED,
    ) -> None:
        self._store, self._device, self._tracking = store, device, tracking
        self._progress, self._log_folder = progress, log_folder

    def submit(self, stages: list[Stage]) -> Future[Failures]:
        """The future is done when this returns."""
        failures = try_stages(
            self._store,
            stages,
            device=self._device,
            progress=self._progress.update,
            log_folder=self._log_folder,
            tracking=self._tracking,
        )
        future: Future[Failures] = Future()
        future.set_result({s.identity: why for s, why in zip(stages, failures, strict=True)})
        return future
