"""From a study's description to a finished study folder (all but tables and figures)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import filelock
import pandas as pd
import psutil
import torch
from ruamel.yaml import YAML

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import model_shape, usable_device
from prunelens.study.conclude import conclude
from prunelens.study.local import processes
from prunelens.study.matrix import Plan
from prunelens.study.plan import plan_study
from prunelens.study.progress import StudyProgress
from prunelens.study.results import method_columns
from prunelens.study.schedule import Executor, Here, Outcome, RunResult, make_all
from prunelens.study.store import DamagedArtifactError, Store, library_versions
from prunelens.study.worker import fork_server, request_of
from prunelens.study_file import parse_yaml, read_text

log = logging.getLogger(__name__)

WORKER_BYTES = 700_000_000  # a process with torch, transformers and a batch of activations
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
    quiet: bool = False,
) -> Outcome:
    """Make everything that `study` asks for and is not yet in the folder `out`.

    Call it inside `alone_in(out)`. Leaves `artifacts/`, `study.yaml`, `environment.json` and
    `runs.csv`. May be killed at any moment and called again; a finished study does no work.

    Args:
        study: what to do.
        out: the study's folder.
        device: `auto`, `cpu`, `cuda`, …
        workers: processes that make stages side by side; None: as many as cores and memory allow.
        quiet: show no progress.
    Raises: UserError for a wrong study or text, before anything is written.
    """
    device = resolve_device(device)
    is_new = not (out / "runs.csv").is_file()  # a study that has ended may need no workers
    several = (workers or _most_workers(study, device)) > 1
    with fork_server(device, at_once=several and is_new):
        return _run_study(study, out, device=device, workers=workers, quiet=quiet)


def _run_study(
    study: StudyConfig, out: pathlib.Path, *, device: str, workers: int | None, quiet: bool
) -> Outcome:
    plan = plan_study(study)
    store = Store(out / "artifacts")
    workers = workers or workers_that_fit(study, device)

    def describe() -> None:
        _write(out / "study.yaml", _as_yaml(study))
        _write(out / "environment.json", json.dumps(environment(device), indent=1))

    with StudyProgress(quiet=quiet) as progress:
        here = Here(store, device, progress, out / "logs")

        def executor() -> AbstractContextManager[Executor]:
            if workers == 1:
                return contextlib.nullcontext(here)
            request = request_of(study, store, device)
            return processes(workers, device=device, request=request, log_folder=out / "logs")

        outcome = make_all(plan, store, here, executor, progress=progress, on_text=describe)
        outcome = _concluded(plan, store, outcome, progress, out)
    _write(out / "runs.csv", _runs_table(outcome.results, store).to_csv(index=False))
    return outcome


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
    return plan_study(study), Store(out / "artifacts")


def study_status(out: pathlib.Path) -> list[dict[str, Any]]:
    """Per run: run, status (done, failed, unfinished), present and stages (counts), reason."""
    plan, store = open_study(out)
    table = read_runs(out)
    reasons = dict(zip(table["run"], table["reason"], strict=True))
    rows = []
    for run in plan.runs:
        targets = {stage.identity: stage for stage in run.targets()}
        present = sum(store.has(stage) for stage in targets.values())
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
        return pd.read_csv(out / "runs.csv", keep_default_na=False)[RUN_COLUMNS]
    except (OSError, ValueError, KeyError):  # pandas' parser errors are ValueErrors
        return pd.DataFrame(columns=RUN_COLUMNS)


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
def alone_in(out: pathlib.Path) -> Iterator[None]:
    """Hold the folder's lock; folders that this call made and left empty are removed again.

    Raises: UserError where another process holds it, or the folder cannot be written to.
    """
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
        yield
    except UserError:
        if out in made and not any(_contents(out)):
            shutil.rmtree(out)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # someone else put something in it
                    folder.rmdir()
        raise
    finally:
        lock.release()


def _contents(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a study folder but for its lock."""
    return (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")


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
