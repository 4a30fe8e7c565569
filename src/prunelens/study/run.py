"""From a study's description to a finished study folder (all but tables and figures)."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from prunelens.config import StudyConfig
from prunelens.errors import UserError
from prunelens.model import model_shape, usable_device
from prunelens.study.artifacts.address import artifacts_of
from prunelens.study.artifacts.store import Store
from prunelens.study.conclude import conclude
from prunelens.study.executor import Executor, Here
from prunelens.study.folder import describe_study, write_runs
from prunelens.study.local import processes
from prunelens.study.matrix import Plan
from prunelens.study.pinning import pinned
from prunelens.study.plan import plan_study
from prunelens.study.preflight.before import refuse_hopeless
from prunelens.study.preflight.room import machine_memory
from prunelens.study.progress import StudyProgress
from prunelens.study.schedule import Outcome, finished_targets, make_all
from prunelens.study.tracking import Tracking, check_tracking, stage_times
from prunelens.study.worker import fork_server, request_of

log = logging.getLogger(__name__)

WORKER_BYTES = 700_000_000  # a process with torch, transformers and a batch of activations
EXECUTORS = ("local", "ray")
Opener = Callable[[Here], AbstractContextManager[Executor]]


def run_study(
    study: StudyConfig,
    out: pathlib.Path,
    *,
    device: str = "auto",
    workers: int | None = 1,
    executor: str = "local",
    address: str | None = None,
    quiet: bool = False,
    artifacts: str | None = None,
    track: str | None = None,
) -> Outcome:
    """Make everything that `study` asks for and is not yet in the folder `out`.

    Call it inside `alone_in(out)`. Leaves `artifacts/`, `study.yaml`, `environment.json` and
    `runs.csv`. May be killed at any moment and called again; a finished study does no work.

    Args:
        study: what to do.
        out: the study's folder.
        device: `auto`, `cpu`, `cuda`, …
        workers: processes that make stages side by side; None: as many as cores and memory allow.
            With Ray the most stages at one time; None: as many as the cluster bears.
        executor: `local`, or `ray` for the nodes of a cluster.
        address: of the Ray cluster; None: what RAY_ADDRESS names, else one on this machine.
        quiet: show no progress.
        artifacts: where they are, as `open_store` takes it, if not in `out`.
        track: a tracking service that is told of it, a key of `tracking.TRACKERS`.
    Raises: UserError for a wrong study or text, before anything is written.
    """
    check_tracking(track)
    if executor not in EXECUTORS:
        raise UserError(f"--executor: {executor!r} is none of {', '.join(EXECUTORS)}; give one")
    if address is not None and executor != "ray":
        raise UserError(f"--address: {address!r} is of a Ray cluster; give --executor ray as well")
    asked, device = device, "cpu" if executor == "ray" else resolve_device(device)
    is_new = not (out / "runs.csv").is_file()  # a study that has ended may need no workers
    several = executor == "local" and (workers or _most_workers(study, device)) > 1
    with fork_server(device, at_once=several and is_new):
        store = artifacts_of(out, artifacts, to_write=True)
        store.check_usable()
        tracking = Tracking(track, study.name, str((out / "tracking").absolute()))
        study = pinned(study, out)
        plan = plan_study(study)
        if not _is_all_there(plan, store):  # what is finished needs no room
            refuse_hopeless(plan, store.place, device, here=executor == "local")
        logs = out / "logs"
        if executor == "ray":
            request = request_of(study, store, asked, tracking)
            opener = _on_cluster(plan, store, request, asked, address, workers, logs)
        else:
            number = workers or workers_that_fit(study, device)
            request = request_of(study, store, device, tracking)
            opener = _on_this_machine(number, device, request, logs)
        return _run_plan(plan, out, store, opener, tracking=tracking, device=device, quiet=quiet)


def _run_plan(
    plan: Plan,
    out: pathlib.Path,
    store: Store,
    opener: AbstractContextManager[Opener],
    *,
    tracking: Tracking,
    device: str,
    quiet: bool,
) -> Outcome:
    describe = functools.partial(describe_study, out, plan.study, store, device)
    with StudyProgress(quiet=quiet) as progress, opener as opened:
        here = Here(store, device, progress, out / "logs", tracking)
        with stage_times(tracking, store) as told:
            outcome = make_all(
                plan, store, here, opened, progress=progress, on_text=describe, on_made=told
            )
        outcome = _concluded(plan, store, outcome, progress, out)
    write_runs(out, outcome.results, store)
    return outcome


@contextlib.contextmanager
def _on_this_machine(
    workers: int, device: str, request: str, log_folder: pathlib.Path
) -> Iterator[Opener]:
    """In this process, or in several, which are begun anew where they died."""
    if workers == 1:
        yield contextlib.nullcontext
    else:
        yield lambda _here: processes(
            workers, device=device, request=request, log_folder=log_folder
        )


@contextlib.contextmanager
def _on_cluster(
    plan: Plan,
    store: Store,
    request: str,
    device: str,
    address: str | None,
    workers: int | None,
    log_folder: pathlib.Path,
) -> Iterator[Opener]:
    """On the nodes of a Ray cluster; where everything is there, only once damage has been found."""

    def connected() -> AbstractContextManager[Executor]:
        from prunelens.study.cluster import cluster  # ray, which only few have

        return cluster(
            plan,
            address=address,
            device=device,
            request=request,
            log_folder=log_folder,
            at_once=workers,
        )

    if _is_all_there(plan, store):
        yield lambda _here: connected()
        return
    with connected() as tasks:
        yield lambda _here: contextlib.nullcontext(tasks)


def _is_all_there(plan: Plan, store: Store) -> bool:
    """Whether every target has been made; it may be damaged."""
    return plan.targets().keys() == finished_targets(plan, store)


def _concluded(
    plan: Plan, store: Store, outcome: Outcome, progress: StudyProgress, out: pathlib.Path
) -> Outcome:
    """The outcome with what was made from all runs together."""
    executed, failure = conclude(plan, store, progress=progress, log_folder=out / "logs")
    if failure:
        log.error("%s", failure)
    return outcome._replace(
        num_executed=outcome.num_executed + executed,
        failures=(failure,) if failure else (),
    )


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one, else cpu. Raises UserError for an absent device."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(device)


def workers_that_fit(study: StudyConfig, device: str) -> int:
    """As many processes as the cores allow at `threads_per_stage`, and memory at a model each.

    One on a GPU, which stages would only share.
    """
    most = _most_workers(study, device)
    if most == 1:
        return 1
    shapes = [model_shape(model) for model in study.models]
    weights = max(12 * s.num_blocks * s.d_model**2 + s.vocabulary_size * s.d_model for s in shapes)
    each = WORKER_BYTES + 8 * weights  # float32 weights, and as much again while loading
    by_memory = int(machine_memory()[1] // (2 * each))
    return max(1, min(by_memory, most))


def _most_workers(study: StudyConfig, device: str) -> int:
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // study.threads_per_stage)
