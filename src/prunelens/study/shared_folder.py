"""A folder that several machines share may show late what another one wrote to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from prunelens.study.artifacts.store import Stage, Store

SECONDS_TO_APPEAR = 70.0  # NFS looks at a folder again after 60 seconds at the latest
SECONDS_BETWEEN_LOOKS = 0.5


def wait_until_there(store: Store, stages: Iterable[Stage]) -> list[Stage]:
    """Wait for artifacts that have been published elsewhere; returns those that do not appear."""
    missing = [stage for stage in stages if not store.has(stage)]
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while missing and time.monotonic() < deadline:
        for stage in missing:  # reading a folder asks its server what is in it
            with contextlib.suppress(OSError):
                next(store.folder(stage).parent.iterdir(), None)
        missing = [stage for stage in missing if not store.has(stage)]
        if missing:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return missing
