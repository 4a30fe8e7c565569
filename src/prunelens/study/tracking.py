"""Optional tracking of a study in TensorBoard, Weights & Biases or trackio: one small seam.

Off unless asked for. What is logged has been measured anyway, and nothing that is computed depends
on it; a service that fails is dropped with one warning. Each SAE in training is a run of its own,
grouped by the study's name, and the run `study` has the seconds of each finished stage. Runs go on
by identity: an SAE that is resumed, or made again, goes on where it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import math
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from prunelens.errors import UserError, one_line
from prunelens.study.artifacts.store import Stage, Store

log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """One run in a tracking service."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name at a step."""

    def close(self) -> None:
        """Nothing more comes."""


class RunFacts(NamedTuple):
    """What a service is told of a run."""

    study: str
    """The study's name: the project or group."""
    label: str
    """What a person calls the run."""
    identity: str
    """The same for a run that is resumed."""
    folder: pathlib.Path
    """Where local files go."""
    config: Mapping[str, Any]
    """JSON data."""


class Tracking(NamedTuple):
    """What is tracked, as workers are told it: plain JSON."""

    kind: str | None = None
    """A key of TRACKERS; None: nothing is tracked."""
    study: str = ""
    """The study's name."""
    folder: str = ""
    """Where local files go."""

    def open(self, label: str, identity: str, config: Mapping[str, Any]) -> Tracker:
        """Open a run; one that cannot be opened logs nothing, with one warning."""
        if self.kind is None:
            return _Off()
        return open_tracker(
            self.kind, RunFacts(self.study, label, identity, pathlib.Path(self.folder), config)
        )


NOT_TRACKED = Tracking()


def open_tracker(kind: str, facts: RunFacts) -> Tracker:
    """A run in the service `kind`; it never raises but for an unknown `kind`."""
    return _Forgiving(kind, lambda: TRACKERS[kind](facts))


def check_tracking(kind: str | None) -> None:
    """Raises UserError for a service that is not known or whose package is not installed."""
    if kind is None:
        return
    if kind not in TRACKERS:
        raise UserError(f"--track: {kind!r} is not known; give one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(kind) is None:
        raise UserError(f"--track: {kind} is not installed; run `pip install {kind}`")


@contextlib.contextmanager
def stage_times(tracking: Tracking, store: Store) -> Iterator[Callable[[Stage], None]]:
    """The run `study`: the seconds of every stage that it is told of, in the order of their end."""
    with contextlib.closing(tracking.open("study", uuid.uuid4().hex, {})) as tracker:
        count = itertools.count(1)

        def made(stage: Stage) -> None:
            if tracking.kind is not None:
                seconds = store.meta(stage).get("wall_seconds", math.nan)
                tracker.log(next(count), {f"wall_seconds/{stage.name}": float(seconds)})

        yield made


class _Off:
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _Forgiving:
    """A tracker that is dropped, with one warning, as soon as it fails."""

    def __init__(self, kind: str, opened: Callable[[], Tracker]) -> None:
        self._kind = kind
        self._tracker: Tracker | None = None
        self._tracker = self._try(opened)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        finite = {name: float(n) for name, n in numbers.items() if math.isfinite(n)}
        if self._tracker is not None and finite:
            tracker = self._tracker
            self._try(lambda: tracker.log(step, finite))

    def close(self) -> None:
        if self._tracker is not None:
            self._try(self._tracker.close)
        self._tracker = None

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # of a service and its network: no study fails for it
            self._tracker = None
            why = one_line(f"{type(error).__name__}: {error}")[:200]
            log.warning("tracking by %s ends here, the study goes on (%s)", self._kind, why)
            return None


class _TensorBoard:
    """Event files in a folder for each run; one that goes on adds a file."""

    def __init__(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        name = f"{_plain(facts.label)}-{facts.identity[:12]}"
        self._writer = SummaryWriter(str(facts.folder / "tensorboard" / name))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """What wandb and trackio, which follows it, have in common."""

    _run: Any

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb(_Run):
    """A run of the project `prunelens`, in the study's group."""

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        facts.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="prunelens",
            group=facts.study,
            name=facts.label,
            id=facts.identity[:32],
            resume="allow",
            dir=str(facts.folder),
            config=dict(facts.config),
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )


class _Trackio(_Run):
    """A run of the project named as the study."""

    def __init__(self, facts: RunFacts) -> None:
        import trackio

        name = f"{facts.label} {facts.identity[:12]}"
        self._run = trackio.init(
            project=_plain(facts.study), name=name, resume="allow", config=dict(facts.config)
        )


TRACKERS: dict[str, Callable[[RunFacts], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _plain(text: str) -> str:
    """Text as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.") or "run"
