"""The local executor: makes stages in this process, or in several beside it."""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor

from prunelens.study.artifacts.disk import DiskError, processes_told
from prunelens.study.artifacts.store import Stage
from prunelens.study.executor import Failures
from prunelens.study.worker import die_with_parent, make_by_identity, worker_context


class Processes:
    """Processes that no thread and no CUDA of this one can disturb."""

    shares_fate = True

    def __init__(self, pool: futures.Executor, at_once: int, request: str, log_folder: str):
        self._pool, self.at_once = pool, at_once
        self._request, self._log_folder = request, log_folder

    def submit(self, stages: list[Stage]) -> Future[Failures]:
        """Ends with `BrokenExecutor` for all that were submitted once one process has died."""
        order = self._request, [stage.identity for stage in stages], self._log_folder
        try:
            with processes_told():  # they are started when they are needed
                return self._pool.submit(make_by_identity, *order)
        except BrokenExecutor as error:
            broken: Future[Failures] = Future()
            broken.set_exception(error)
            return broken


@contextlib.contextmanager
def processes(
    workers: int, *, device: str, request: str, log_folder: pathlib.Path
) -> Iterator[Processes]:
    """Open `workers` processes; Ctrl-C ends them, and a full disk.

    Args:
        workers: how many.
        device: that they work on.
        request: what `make_by_identity` is told of the study.
        log_folder: where tracebacks go.
    """
    context, others = worker_context(device), set(multiprocessing.active_children())
    with processes_told():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent)
    try:
        yield Processes(pool, workers, request, str(log_folder))
    except (KeyboardInterrupt, DiskError):
        # What they were at can be made again. All that began since is ended, whoever began it:
        # which of a process's children are the pool's is private.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
