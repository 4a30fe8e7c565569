"""A process that makes one stage at a time for `local`; it is told identities, in JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import threading
import time

from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.study.plan import plan_study
from prunelens.study.stages import failure_of, make_stage
from prunelens.study.store import Stage, Store

SECONDS_BETWEEN_SHARES = 1.0


def make_by_identity(request: str, identity: str, log_folder: str) -> str | None:
    """Make the stage with that identity; returns why it failed, or None.

    Args:
        request: JSON with the study, the folder of its artifacts and the device.
        identity: of the stage; its parents' artifacts have been verified.
        log_folder: where a traceback goes.
    """
    facts = json.loads(request)
    store = Store(pathlib.Path(facts["artifacts"]))

    def make() -> None:
        stages = _stages(json.dumps(facts["study"]))
        if identity not in stages:
            raise UserError("the study's text or model changed while it ran; run it again")
        stage = stages[identity]
        report = _share_writer(store, stage)
        make_stage(store, stage, device=facts["device"], progress=report)

    return failure_of(make, pathlib.Path(log_folder) / f"{identity[:12]}.log")


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
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=2)
def _stages(study: str) -> dict[str, Stage]:
    """Every stage of a study by identity; planned once per process."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.identity not in found:
            found[stage.identity] = stage
            for parent in stage.parents.values():
                add(parent)

    for target in plan_study(study_from_data(json.loads(study))).targets().values():
        add(target)
    return found


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
