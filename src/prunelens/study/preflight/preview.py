"""What a study will do, need and take, told before anything runs and without a download."""

from __future__ import annotations

import collections
import math
import os
import pathlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from prunelens.config import CheckpointConfig, StudyConfig
from prunelens.model import model_shape
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost
from prunelens.study.footprint import Disk, Memory
from prunelens.study.matrix import Run, parents_first
from prunelens.study.pinning import repositories_of
from prunelens.study.plan import plan_study
from prunelens.study.preflight.access import access_checks
from prunelens.study.preflight.before import cheap_checks
from prunelens.study.preflight.calibrate import Rate, calibrate
from prunelens.study.preflight.hours import Rates, Task, cost_of, hours_of, simulate, study_tasks
from prunelens.study.preflight.model_checks import site_checks
from prunelens.study.preflight.room import machine_memory
from prunelens.study.preflight.text_checks import text_checks
from prunelens.study.run import resolve_device

GIGABYTE = 1e9
CALIBRATION_SECONDS = 40.0
Row = dict[str, Any]


class Preflight(NamedTuple):
    """The matrix, its work and its needs. Plain data, for JSON as it is."""

    runs: list[Row]
    """run, model, layer, method, scope, sparsity, seeds, saes (without control_saes), stages (all
    that it rests on), shared (those of them that runs above it rest on as well), and what it adds
    to the runs above: forward_tokens, sae_tokens, flops, hours (None without calibration)."""
    stages: dict[str, int]
    """How many distinct stages of each kind."""
    totals: Row
    """runs, stages, saes, control_saes, forward_tokens, sae_tokens, flops; shared stages once."""
    disk: dict[str, float]
    """The fields of `footprint.Disk`, each as `…_gigabytes`."""
    memory: dict[str, float]
    """The fields of `footprint.Memory`, each as `…_gigabytes`, for one worker."""
    hours: dict[str, float] | None
    """Per kind of work, and `total`, with one worker on this device; None without calibration."""
    device: Row
    """device, name, memory_gigabytes, cores, threads_per_stage, calibration_seconds, and
    flops_per_second: model -> kind -> rate (empty without calibration)."""
    settings: dict[str, str]
    """The fields that `--set` replaced."""
    notes: list[str]
    """What the numbers assume or leave out."""
    checks: list[Row]
    """The fields of `finding.Finding`, of every check."""
    schedule: list[Row]
    """The fields of `hours.Schedule` for each number of workers that was asked for; idle_share
    is None where nothing takes any time. Empty without hours."""


def preflight(
    study: StudyConfig,
    *,
    settings: Mapping[str, str] | None = None,
    device: str = "auto",
    calibration_seconds: float = CALIBRATION_SECONDS,
    rates: Rates | None = None,
    workers: Sequence[int] = (),
    out: pathlib.Path | None = None,
) -> Preflight:
    """Lay a study out without running it, and check what can go wrong.

    No weights are downloaded. Where a model or a text is on the hub, the hub is asked whether it
    may be read, and for the config of a model that is neither one of the paper's nor in the cache;
    a little text is read from it where the model is on this machine, to see that they fit. Of text
    on this machine as much is read as the study would.

    Args:
        study: what would be run.
        settings: the `--set` overrides that are already in `study`, to be listed.
        device: `auto`, `cpu`, `cuda`, …: what is calibrated and whose memory is reckoned with.
        calibration_seconds: about how long to measure this device's speed, over all models; 0: do
            not, tell no hours, and load no model to see whether it can read the text.
        rates: of `read_rates`, instead of measuring this device's.
        workers: numbers of workers whose schedule is simulated.
        out: the folder that it would run in; None: runs/<name>.
    Raises: UserError as `plan_study`, or for an absent device.
    """
    device = resolve_device(device)
    plan = plan_study(study, resolve=not repositories_of(study))
    shapes = {model.label: model_shape(model) for model in study.models}
    folder = out or pathlib.Path("runs") / study.name
    room = cheap_checks(plan, shapes, folder / "artifacts", device)
    checks = list(room.findings)
    for model in study.models:
        if not model.is_planted:
            checks += [found for found in site_checks(model) if found not in checks]
    if any(found[:2] == ("error", "architecture") for found in checks):
        calibration_seconds = 0.0  # it cannot be run: that is told at once
    loads = calibration_seconds > 0
    access = list(access_checks(study))
    answers = all(found.level == "ok" for found in access)
    checks += access
    checks += text_checks(study, hub_answers=answers, device=device, load=loads)
    started, timed = time.perf_counter(), {}
    if not rates and calibration_seconds > 0:
        each = calibration_seconds / len(study.models)
        timed = {m.label: calibrate(study, m, device=device, seconds=each) for m in study.models}
        rates = {
            model: {kind: rate.flops_per_second for kind, rate in kinds.items()}
            for model, kinds in timed.items()
        }
    rates = rates or {}
    device_row = _device(study, device, rates, time.perf_counter() - started if timed else 0.0)
    rows: list[Row] = []
    costs: dict[str, tuple[Stage, Cost]] = {}
    for run in plan.runs:
        stages = list(parents_first(run.targets()))
        added = [stage for stage in stages if stage.identity not in costs]
        new = {stage.identity: (stage, cost_of(stage, shapes, study)) for stage in added}
        rows.append(
            _row(run, study)
            | {"stages": len(stages), "shared": len(stages) - len(new)}
            | _sums(Cost._fields, (cost._asdict() for _, cost in new.values()))
            | {"hours": sum(hours_of(new.values(), rates).values()) if rates else None}
        )
        costs |= new
    hours = hours_of(costs.values(), rates)
    tasks = study_tasks(plan, shapes, rates)
    return Preflight(
        rows,
        dict(collections.Counter(stage.name for stage, _ in costs.values())),
        {"runs": len(rows), "stages": len(costs)}
        | _sums(("saes", "control_saes", *Cost._fields), rows),
        _in_gigabytes(room.disk),
        _in_gigabytes(room.memory),
        {**hours, "total": sum(hours.values())} if rates else None,
        device_row,
        dict(settings or {}),
        list(_notes(study, timed, is_given=bool(rates))),
        [finding._asdict() for finding in checks],
        [_schedule(tasks, number) for number in workers] if rates else [],
    )


def _schedule(tasks: list[Task], workers: int) -> Row:
    row = simulate(tasks, workers)._asdict()
    idle = None if math.isnan(row["idle_share"]) else row["idle_share"]
    return row | {"chain": list(row["chain"]), "idle_share": idle}


def _row(run: Run, study: StudyConfig) -> Row:
    seeds, condition = len(study.seeds_of(run.pruning)), run.pruning
    measured = isinstance(condition, CheckpointConfig)  # its sparsity: nobody asked for it
    return {
        "run": run.name,
        "model": run.model,
        "layer": run.layer,
        "method": condition.criterion if condition else "dense",
        "scope": condition.scope if condition else "",
        "sparsity": None if measured else condition.sparsity if condition else 0.0,
        "seeds": seeds,
        "saes": seeds,
        "control_saes": len(run.saes) - seeds,
    }


def _sums(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> Row:
    rows = list(rows)
    return {name: sum(row[name] for row in rows) for name in columns}


def _in_gigabytes(needs: Disk | Memory) -> dict[str, float]:
    return {f"{name}_gigabytes": value / GIGABYTE for name, value in needs._asdict().items()}


# --- the device, and what was assumed -----------------------------------------------------------


def _device(study: StudyConfig, device: str, rates: Rates, seconds: float) -> Row:
    name, memory = platform.processor() or platform.machine(), machine_memory()[0]
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "device": device,
        "name": name,
        "memory_gigabytes": memory / GIGABYTE,
        "cores": os.cpu_count(),
        "threads_per_stage": study.threads_per_stage,
        "calibration_seconds": seconds,
        "flops_per_second": rates,
    }


def _notes(
    study: StudyConfig, timed: Mapping[str, Mapping[str, Rate]], *, is_given: bool
) -> Iterator[str]:
    yield (
        "operations are those that the definitions ask for; text, statistics, reading and writing"
        " are not counted, downloads of text and of SAEs neither"
    )
    if study.perplexity.corpus and study.perplexity.max_tokens is None:
        yield (
            f"the text of perplexity.corpus is taken to have {study.corpus.eval_tokens:,} tokens,"
            " as the eval split"
        )
    if "causal" in study.questions and study.prunings:
        yield (
            "causal: a latent is taken to fire in half of the prompts, on average from their middle"
        )
    cores = os.cpu_count() or 1
    if study.threads_per_stage > cores:
        yield (
            f"threads_per_stage: {study.threads_per_stage} is more than the {cores} cores here,"
            f" which is many times slower; --set threads_per_stage={cores}"
        )
    if timed:
        yield "hours are those of one worker alone on this device"
    elif is_given:
        yield "hours are those of one worker at the given rates; nothing was timed here"
    else:
        yield "not calibrated: no hours"
    for model, kinds in timed.items():
        for kind, rate in kinds.items():
            if rate.share_of_batch < 1:
                yield (
                    f"{kind} of {model} was timed on {rate.share_of_batch:.0%} of a batch and"
                    " extrapolated: within a factor of two or so"
                )
