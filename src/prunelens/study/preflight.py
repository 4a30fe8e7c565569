"""What a study will do and need, told before anything runs."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from prunelens.activations import STORAGE
from prunelens.config import StudyConfig
from prunelens.model import model_shape
from prunelens.study.plan import plan_study
from prunelens.study.store import Stage

GIGABYTE = 1e9


class Preflight(NamedTuple):
    """The matrix and its needs."""

    runs: list[dict[str, Any]]
    """run, stages (all that it rests on), saes, shared (with runs above it)."""
    stages: dict[str, int]
    """How many distinct stages of each kind."""
    store_gigabytes: float
    """Disk of the largest activation store."""
    peak_gigabytes: float
    """Disk of the activation stores that exist at one time, with one worker."""
    kept_gigabytes: float
    """Disk of the SAEs and, with keep_activations, of the stores at the end."""


def preflight(study: StudyConfig) -> Preflight:
    """Lay a study out without running it. Raises UserError as `plan_study` does."""
    plan = plan_study(study)
    seen: dict[str, Stage] = {}
    rows = []
    for run in plan.runs:
        own = {s.identity: s for target in run.targets() for s in _with_parents(target)}
        shared = len(own.keys() & seen.keys())
        rows.append({"run": run.name, "stages": len(own), "saes": len(run.saes), "shared": shared})
        seen |= own
    counts = collections.Counter(stage.name for stage in seen.values())
    tokens = study.corpus.train_tokens + study.corpus.eval_tokens
    bytes_each = STORAGE[study.activations.storage][0].itemsize
    shapes = [model_shape(model) for model in study.models]
    widest = max(shape.d_model for shape in shapes)
    store = tokens * widest * bytes_each / GIGABYTE
    layers = max(len(model.layers) for model in study.models)
    stores = counts["activations"]
    saes = counts["sae"] * 2 * widest**2 * study.sae.expansion * 4 / GIGABYTE
    return Preflight(
        rows,
        dict(counts),
        store,
        store * (stores if study.keep_activations else min(stores, layers + 1)),
        saes + (store * stores if study.keep_activations else 0.0),
    )


def _with_parents(stage: Stage) -> list[Stage]:
    return [stage, *(s for parent in stage.parents.values() for s in _with_parents(parent))]
