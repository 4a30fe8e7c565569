"""What makes stages in another process, one or a group at a time; it is told identities."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import psutil

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError
from prunelens.study.artifacts.address import open_store
from prunelens.study.artifacts.disk import processes_told
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.matrix import parents_first
from prunelens.study.plan import plan_study
from prunelens.study.shared_folder import wait_until_there
from prunelens.study.stages import failure_of, try_stages
from prunelens.study.tracking import NOT_TRACKED, Tracking

SECONDS_BETWEEN_SHARES = 1.0
IMPORTS = ["prunelens.study.worker", "transformers.modeling_utils"]  # what takes workers seconds


def request_of(
    study: StudyConfig, store: Store, device: str, tracking: Tracking = NOT_TRACKED
) -> str:
    """What `make_by_identity` has to be told of a study: plain JSON."""
    facts = {
        "study": study.model_dump(mode="json"),
        "artifacts": store.address,
        "host": socket.gethostname(),
        "cache": str(store.root.absolute()),
        "device": device,
        "tracking": tracking._asdict(),
    }
    return json.dumps(facts)


def make_by_identity(
    request: str, identities: Sequence[str], log_folder: str
) -> dict[str, str | None]:
    """Make the stages with those identities in one go; says why each failed, or None.

    Args:
        request: of `request_of`.
        identities: of the stages; their parents' artifacts have been verified.
        log_folder: where a traceback goes.
    """
    facts, logs = json.loads(request), pathlib.Path(log_folder)
    stages: list[Stage] = []
    store = open_store(facts["artifacts"], _cache(facts))

    def find() -> None:
        known = stages_of(facts)
        if not set(identities) <= set(known):
            raise UserError("the study's text or model changed while it ran; run it again")
        stages.extend(known[identity] for identity in identities)
        parents = {p.identity: p for stage in stages for p in stage.parents.values()}
        if missing := wait_until_there(store, parents.values()):
            raise UserError(
                f"machine {socket.gethostname()!r} does not see {missing[0].label!r} in"
                f" {facts['artifacts']!r}, which another one made; put the study on a folder that"
                " all share, or give --artifacts s3://…"
            )

    if failure := failure_of(find, logs / f"{identities[0][:12]}.log"):
        return dict.fromkeys(identities, failure)
    report = {stage.identity: _share_writer(store, stage) for stage in stages}
    failures = try_stages(
        store,
        stages,
        device=facts["device"],
        progress=lambda stage, share: report[stage.identity](share),
        log_folder=logs,
        tracking=Tracking(**facts["tracking"]),
    )
    return dict(zip(identities, failures, strict=True))


def _cache(facts: dict[str, Any]) -> pathlib.Path | None:
    """Of an object store: that of whoever asks, on the same machine; else this machine's own."""
    return pathlib.Path(facts["cache"]) if facts["host"] == socket.gethostname() else None


def read_share(store: Store, stage: Stage) -> float:
    """How much of a stage that another process makes is done, 0 to 1."""
    try:
        return float(_share_path(store, stage).read_text())
    except (OSError, ValueError):
        return 0.0


def die_with_parent() -> None:
    """Let this process end when the one that started it is gone, and leave Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is not a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def worker_context(device: str) -> BaseContext:
    """How workers are started: forked from a process that has imported and done nothing else.

    Each on its own from the start where that is not safe: CUDA does not survive a fork, and only
    Linux's system libraries do.
    """
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


@contextlib.contextmanager
def fork_server(device: str, *, at_once: bool) -> Iterator[None]:
    """Where workers are forked, the process that they are forked from ends with this block.

    Args:
        device: that the workers are for.
        at_once: let it begin to import now, beside what this process does; else with the first
            worker.
    """
    if worker_context(device).get_start_method() != "forkserver":
        yield
        return
    try:
        if at_once:
            with processes_told():
                _start_fork_server()
        yield
    finally:
        _end_fork_server()


def _start_fork_server() -> None:
    """Ctrl-C is left to this process: a signal that is blocked here stays blocked there."""
    resource_tracker.ensure_running()  # unblocks the signal when it starts, so it goes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_fork_server() -> None:
    """At once: while it imports it would not hear that it is needed no more."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if any("multiprocessing.forkserver" in word for word in child.cmdline()):
                child.kill()
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # multiprocessing reaps it


def stages_of(facts: dict[str, Any]) -> dict[str, Stage]:
    """Every stage by identity of the study of a request, parsed; planned once per process."""
    return _stages(json.dumps(facts["study"]))


@functools.lru_cache(maxsize=2)
def _stages(study: str) -> dict[str, Stage]:
    targets = plan_study(study_from_data(json.loads(study)), check=False).targets()
    return {stage.identity: stage for stage in parents_first(targets.values())}


class _share_writer:  # noqa: N801 (a function with a memory)
    """Writes the share done to a small file, at most once a second."""

    def __init__(self, store: Store, stage: Stage) -> None:
        self._path, self._written = _share_path(store, stage), 0.0

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if now - self._written > SECONDS_BETWEEN_SHARES:
            self._written = now
            with contextlib.suppress(OSError):  # progress is not worth failing for
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(f"{share:.4f}")


def _share_path(store: Store, stage: Stage) -> pathlib.Path:
    return store.root / "unfinished" / f"{stage.name}-{stage.identity}" / "share"
