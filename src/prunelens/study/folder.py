"""A study folder beside its artifacts: `study.yaml`, `environment.json`, `runs.csv`."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from io import StringIO
from typing import Any

import pandas as pd
import torch
from ruamel.yaml import YAML

from prunelens.columns import meanings_of
from prunelens.config import StudyConfig, study_from_data
from prunelens.csv_table import as_csv, as_written
from prunelens.errors import UserError
from prunelens.study.artifacts.address import artifacts_of, remember_artifacts
from prunelens.study.artifacts.seal import library_versions
from prunelens.study.artifacts.store import DamagedArtifactError, Stage, Store
from prunelens.study.matrix import Plan
from prunelens.study.plan import plan_study
from prunelens.study.results import method_columns
from prunelens.study.schedule import RunResult, finished_targets
from prunelens.study_file import parse_yaml, read_text
from prunelens.temporary import replacing

RUN_MEANINGS = meanings_of("""
    run model layer method scope pattern sparsity
    status: `done` or `failed`.
    reason: Why it failed, in one line; empty where it did not.
    wall_seconds: What its stages took when they were made, shared ones too.
""")
RUN_COLUMNS = list(RUN_MEANINGS)
WORDS = ("run", "model", "method", "scope", "pattern", "status", "reason")


def describe_study(out: pathlib.Path, study: StudyConfig, store: Store, device: str) -> None:
    """Say in the folder what is done in it, where its artifacts are and what does it."""
    _write(out / "study.yaml", _as_yaml(study))
    _write(out / "environment.json", json.dumps(environment(device), indent=1))
    remember_artifacts(out, store)


def write_runs(out: pathlib.Path, results: list[RunResult], store: Store) -> None:
    """Write `runs.csv`, a row per run."""
    _write(out / "runs.csv", as_csv(_runs_table(results, store)))


def open_study(out: pathlib.Path, artifacts: str | None = None) -> tuple[Plan, Store]:
    """The plan and the artifacts of a study folder that `run_study` left.

    Args:
        out: the folder.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
    """
    path = out / "study.yaml"
    if not path.is_file():
        raise UserError(f"study folder: {str(out)!r} has no study.yaml; give the folder of a study")
    study = study_from_data(parse_yaml(read_text(path), where=str(path)))
    store = artifacts_of(out, artifacts)
    return plan_study(study, check=False), store


def study_status(out: pathlib.Path, artifacts: str | None = None) -> list[dict[str, Any]]:
    """Per run: run, status (done, failed, unfinished), present and stages (counts), reason.

    Arguments as `open_study`.
    """
    plan, store = open_study(out, artifacts)
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
    path, words = out / "runs.csv", dict.fromkeys(WORDS, str)  # a reason may be a number
    if not path.is_file():  # nor a pipe, which would be waited for
        return pd.DataFrame(columns=RUN_COLUMNS)
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=words)[RUN_COLUMNS]
    except (OSError, ValueError, KeyError):  # pandas' parser errors are ValueErrors
        return pd.DataFrame(columns=RUN_COLUMNS)
    return table.map(as_written)


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


def _wall_seconds(store: Store, stage: Stage) -> float:
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
    """Replace a file whole, also where another process does so at the same time."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")
