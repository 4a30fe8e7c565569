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

from prunelens.checkpoint import is_local
from prunelens.config import CheckpointConfig, Condition, StudyConfig
from prunelens.model import model_shape
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost
from prunelens.study.matrix import Run
from prunelens.study.plan import plan_study
from prunelens.study.preflight.access import access_checks
from prunelens.study.preflight.before import cheap_checks
from prunelens.study.preflight.calibrate import Rate
from prunelens.study.preflight.hours import (
    cost_of,
    given_rates,
    hours_of,
    measured_rates,
    study_tasks,
)
from prunelens.study.preflight.model_checks import site_checks
from prunelens.study.preflight.room import machine_memory
from prunelens.study.preflight.simulate import Task, simulate
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
    """The fields of `simulate.Schedule` for each number of workers that was asked for; idle_share
    is None where nothing takes any time. Empty without hours."""


def preflight(
    study: StudyConfig,
    *,
    settings: Mapping[str, str] | None = None,
    device: str = "auto",
    calibration_seconds: float = CALIBRATION_SECONDS,
    rates: Mapping[str, Mapping[str, float]] | None = None,
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
    plan = plan_study(study, resolve=not _is_on_the_hub(study))
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
    started = time.perf_counter()
    speeds = given_rates(rates) if rates else measured_rates(study, device, calibration_seconds)
    calibrated = time.perf_counter() - started
    rows: list[Row] = []
    all_stages: dict[str, Stage] = {}
    all_costs: list[tuple[Stage, Cost]] = []
    for run in plan.runs:
        stages = {s.identity: s for target in run.targets() for s in _with_parents(target)}
        new = [stage for identity, stage in stages.items() if identity not in all_stages]
        costs = [(stage, cost_of(stage, shapes, study)) for stage in new]
        rows.append(
            _row(run, study)
            | {"stages": len(stages), "shared": len(stages) - len(new)}
            | _sum_of(cost for _, cost in costs)
            | {"hours": sum(hours_of(costs, speeds).values()) if speeds else None}
        )
        all_costs += costs
        all_stages |= stages
    hours = hours_of(all_costs, speeds)
    return Preflight(
        rows,
        dict(collections.Counter(stage.name for stage in all_stages.values())),
        _totals(rows, len(all_stages)),
        _in_gigabytes(room.disk._asdict()),
        _in_gigabytes(room.memory._asdict()),
        {**hours, "total": sum(hours.values())} if speeds else None,
        _device(study, device, speeds, calibrated if speeds and not rates else 0.0),
        dict(settings or {}),
        list(_notes(study, speeds, given=bool(rates))),
        [finding._asdict() for finding in checks],
        _schedules(study_tasks(plan, shapes, speeds), workers) if speeds else [],
    )


def _schedules(tasks: list[Task], workers: Sequence[int]) -> list[Row]:
    rows = [simulate(tasks, number)._asdict() for number in workers]
    for row in rows:
        row["chain"] = list(row["chain"])
        row["idle_share"] = None if math.isnan(row["idle_share"]) else row["idle_share"]
    return rows


def _with_parents(stage: Stage) -> list[Stage]:
    return [stage, *(s for parent in stage.parents.values() for s in _with_parents(parent))]


def _row(run: Run, study: StudyConfig) -> Row:
    seeds = len(study.seeds_of(run.pruning))
    return {
        "run": run.name,
        "model": run.model,
        "layer": run.layer,
        "method": run.pruning.criterion if run.pruning else "dense",
        "scope": run.pruning.scope if run.pruning else "",
        "sparsity": _asked_sparsity(run.pruning),
        "seeds": seeds,
        "saes": seeds,
        "control_saes": len(run.saes) - seeds,
    }


def _asked_sparsity(condition: Condition | None) -> float | None:
    """None where it will be measured: of a checkpoint."""
    if isinstance(condition, CheckpointConfig):
        return None
    return condition.sparsity if condition else 0.0


def _sum_of(costs: Iterable[Cost]) -> Row:
    columns = zip(*(Cost(), *costs), strict=True)
    return dict(zip(Cost._fields, map(sum, columns), strict=True))


def _in_gigabytes(in_bytes: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_gigabytes": value / GIGABYTE for name, value in in_bytes.items()}


def _totals(rows: list[Row], num_stages: int) -> Row:
    summed = ("saes", "control_saes", *Cost._fields)
    totals = {name: sum(row[name] for row in rows) for name in summed}
    return {"runs": len(rows), "stages": num_stages, **totals}


# --- the device, and what was assumed -----------------------------------------------------------


def _device(
    study: StudyConfig, device: str, rates: Mapping[str, Mapping[str, Rate]], seconds: float
) -> Row:
    on_gpu = device.startswith("cuda")
    memory = (
        torch.cuda.get_device_properties(device).total_memory if on_gpu else machine_memory()[0]
    )
    processor = platform.processor() or platform.machine()
    return {
        "device": device,
        "name": torch.cuda.get_device_name(device) if on_gpu else processor,
        "memory_gigabytes": memory / GIGABYTE,
        "cores": os.cpu_count(),
        "threads_per_stage": study.threads_per_stage,
        "calibration_seconds": seconds,
        "flops_per_second": {
            model: {kind: rate.flops_per_second for kind, rate in kinds.items()}
            for model, kinds in rates.items()
        },
    }


def _notes(
    study: StudyConfig, rates: Mapping[str, Mapping[str, Rate]], *, given: bool
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
    if not rates:
        yield "not calibrated: no hours"
        return
    if given:
        yield "hours are those of one worker at the given rates; nothing was timed here"
    else:
        yield "hours are those of one worker alone on this device"
    for model, kinds in rates.items():
        for kind, rate in kinds.items():
            if rate.share_of_batch < 1:
                yield (
                    f"{kind} of {model} was timed on {rate.share_of_batch:.0%} of a batch and"
                    " extrapolated: within a factor of two or so"
                )


def _is_on_the_hub(study: StudyConfig) -> bool:
    """Whether a model or a text would have to be looked up."""
    texts = [study.corpus, study.perplexity.corpus]
    return any(text is not None and text.source == "hub" for text in texts) or any(
        not is_local(name)
        for name in (
            *(model.name for model in study.models),
            *(c.checkpoint for c in study.conditions() if isinstance(c, CheckpointConfig)),
        )
    )
