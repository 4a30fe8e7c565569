"""From a study's description to a finished study folder (all but tables and figures)."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import filelock
import pandas as pd
import psutil
import torch
from ruamel.yaml import YAML

from prunelens.config import StudyConfig, study_from_data
from prunelens.csv_table import as_csv, as_written
from prunelens.errors import UserError
from prunelens.model import model_shape, usable_device
from prunelens.study.address import artifacts_of, remember_artifacts
from prunelens.study.before import refuse_hopeless
from prunelens.study.conclude import conclude
from prunelens.study.executor import Executor, Here
from prunelens.study.links import refuse_links_out
from prunelens.study.local import processes
from prunelens.study.matrix import Plan
from prunelens.study.pinning import pinned
from prunelens.study.plan import plan_study
from prunelens.study.progress import StudyProgress
from prunelens.study.results import method_columns
from prunelens.study.schedule import (
    Outcome,
    RunResult,
    finished_targets,
    make_all,
)
from prunelens.study.seal import library_versions
from prunelens.study.store import CLAIMS_FILE, DamagedArtifactError, Store
from prunelens.study.tracking import Tracking, check_tracking, stage_times
from prunelens.study.worker import fork_server, request_of
from prunelens.study_file import parse_yaml, read_text

log = logging.getLogger(__name__)

WORKER_BYTES = 700_000_000  # a process with torch, transformers and a batch of activations
EXECUTORS = ("local", "ray")
Opener = Callable[[Here], AbstractContextManager[Executor]]
RUN_COLUMNS = [
    "run", "model", "layer", "method", "scope", "pattern", "sparsity",
    "status", "reason", "wall_seconds",
]  # fmt: skip


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
        artifacts: where they are, as `open_store` takes it, if not in `out`; the folder remembers.
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
        store = artifacts_of(out, artifacts)
        store.check_usable()
        tracking = Tracking(track, study.name, str((out / "tracking").absolute()))
        study = pinned(study, out)
        plan = plan_study(study)
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
    def describe() -> None:
        _write(out / "study.yaml", _as_yaml(plan.study))
        _write(out / "environment.json", json.dumps(environment(device), indent=1))
        remember_artifacts(out, store)

    with StudyProgress(quiet=quiet) as progress, opener as opened:
        here = Here(store, device, progress, out / "logs", tracking)
        with stage_times(tracking, store) as told:
            outcome = make_all(
                plan, store, here, opened, progress=progress, on_text=describe, on_made=told
            )
        outcome = _concluded(plan, store, outcome, progress, out)
    _write(out / "runs.csv", as_csv(_runs_table(outcome.results, store)))
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
    """On the nodes of a Ray cluster; none is needed where everything is there."""
    if all(store.has(stage) for stage in plan.targets().values()):
        yield contextlib.nullcontext
        return
    from prunelens.study.cluster import cluster  # ray, which only few have

    with cluster(
        plan,
        address=address,
        device=device,
        request=request,
        log_folder=log_folder,
        at_once=workers,
    ) as tasks:
        yield lambda _here: contextlib.nullcontext(tasks)


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


def open_study(out: pathlib.Path) -> tuple[Plan, Store]:
    """The plan and the artifacts of a study folder that `run_study` left."""
    path = out / "study.yaml"
    if not path.is_file():
        raise UserError(f"study folder: {str(out)!r} has no study.yaml; give the folder of a study")
    study = study_from_data(parse_yaml(read_text(path), where=str(path)))
    return plan_study(study), artifacts_of(out)


def study_status(out: pathlib.Path) -> list[dict[str, Any]]:
    """Per run: run, status (done, failed, unfinished), present and stages (counts), reason."""
    plan, store = open_study(out)
    table = read_runs(out)
    there = finished_targets(plan, store)
    reasons = dict(zip(table["run"], table["reason"], strict=True))
    rows = []
    for run in plan.runs:
        targets = {stage.identity: stage for stage in run.targets()}
        present = len(targets.keys() & there)
        reason = reasons.get(run.name, "")
        unfinished = "failed" if reason else "unfinished"
        status = "done" if present == len(targets) else unfinished
        rows.append(
            {
                "run": run.name,
                "status": status,
                "present": present,
                "stages": len(targets),
                "reason": reason,
            }
        )
    return rows


def read_runs(out: pathlib.Path) -> pd.DataFrame:
    """The table of runs; without rows where the study has not ended yet, or it is damaged."""
    try:
        table = pd.read_csv(out / "runs.csv", keep_default_na=False)[RUN_COLUMNS]
    except (OSError, ValueError, KeyError):  # pandas' parser errors are ValueErrors
        return pd.DataFrame(columns=RUN_COLUMNS)
    return table.map(as_written)


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
    by_memory = psutil.virtual_memory().available // (2 * each)
    return max(1, min(by_memory, most))


def _most_workers(study: StudyConfig, device: str) -> int:
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // study.threads_per_stage)


def environment(device: str) -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "libraries": library_versions(),
    }


@contextlib.contextmanager
def alone_in(out: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock; folders that this call made and left empty are removed again.

    Gives a function that raises UserError where somebody has removed the lock meanwhile.
    Raises: UserError where another process holds it, or the folder cannot be written to.
    """
    refuse_links_out(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # deepest first
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock", blocking=False)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"--out: another prunelens works in {str(out)!r}; wait for it or choose another folder"
        ) from None
    except OSError as error:
        why = f"cannot write to {str(out)!r} ({error.strerror})"
        raise UserError(f"--out: {why}; name a folder that you can write to") from None
    try:
        yield functools.partial(_check_lock, out, (out / ".lock").stat().st_ino)
    except UserError:
        if out in made and not any(_contents(out)):
            shutil.rmtree(out)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # someone else put something in it
                    folder.rmdir()
        raise
    finally:
        lock.release()


def _check_lock(out: pathlib.Path, held: int) -> None:
    """Artifacts bear two processes; tables and figures, which are written in place, do not."""
    lock = out / ".lock"
    if not lock.exists() or lock.stat().st_ino != held:
        raise UserError(
            f"--out: the file {str(lock)!r} was removed while this worked, so another prunelens may"
            " write there; what was made is kept: run the same command again once it has ended"
        )


def _contents(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a study folder but for its locks."""
    locks = (".lock", CLAIMS_FILE)
    return (path for path in out.rglob("*") if path.is_file() and path.name not in locks)


def _runs_table(results: list[RunResult], store: Store) -> pd.DataFrame:
    rows = []
    for run, status, reason in results:
        rows.append(
            {
                "run": run.name,
                "model": run.model,
                "layer": run.layer,
                **method_columns(run),
                "status": status,
                "reason": reason,
                "wall_seconds": round(sum(_wall_seconds(store, s) for s in run.targets()), 1),
            }
        )
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def _wall_seconds(store: Store, stage: Any) -> float:
    """What the stage took when it was made; 0 if it is not there."""
    if not store.has(stage):
        return 0.0
    try:
        return float(store.meta(stage).get("wall_seconds", 0.0))
    except DamagedArtifactError:
        return 0.0


def _as_yaml(study: StudyConfig) -> str:
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(study.model_dump(mode="json"), stream)
    return stream.getvalue()


def _write(path: pathlib.Path, text: str) -> None:
    """Replace a file whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
