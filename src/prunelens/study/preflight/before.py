"""What is looked at before anything is written, because it costs next to nothing."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from prunelens.checkpoint import ModelShape, model_shape
from prunelens.study.footprint import Disk, Memory, disk_use, memory_use, saes_at_once
from prunelens.study.matrix import Plan, parents_first
from prunelens.study.preflight.checks import study_checks
from prunelens.study.preflight.finding import Finding, refuse
from prunelens.study.preflight.room import disk_checks, memory_checks


class CheapChecks(NamedTuple):
    """Findings, and the needs that they rest on."""

    findings: list[Finding]
    """Of the study itself, of disk and of memory."""
    disk: Disk
    """What the study writes."""
    memory: Memory
    """What one worker holds."""


def cheap_checks(
    plan: Plan,
    shapes: Mapping[str, ModelShape],
    artifacts: pathlib.Path | None,
    device: str,
    *,
    here: bool = True,
) -> CheapChecks:
    """Check a plan, and the room for it, without loading a model or asking a hub.

    Args:
        plan: the study's.
        shapes: model label -> shape.
        artifacts: the folder that they are written to; None where that is no disk.
        device: that it runs on.
        here: on this machine, whose memory is looked at then.
    """
    study, stages = plan.study, list(parents_first(plan.targets().values()))
    disk = disk_use(study, shapes, stages)
    memory = memory_use(study, shapes, device, num_saes=saes_at_once(stages))
    findings = [
        *study_checks(plan, shapes),
        *(disk_checks(disk, artifacts) if artifacts else ()),
        *(memory_checks(memory, study, device) if here else ()),
    ]
    return CheapChecks(findings, disk, memory)


def refuse_hopeless(
    plan: Plan, artifacts: pathlib.Path | None, device: str, *, here: bool = True
) -> CheapChecks:
    """`cheap_checks` before a study is run. Raises UserError with the first error of them."""
    shapes = {model.label: model_shape(model) for model in plan.study.models}
    found = cheap_checks(plan, shapes, artifacts, device, here=here)
    refuse(found.findings)
    return found
