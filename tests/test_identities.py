"""A study folder of earlier versions stays finished: no stage has another identity than it had.

Whoever means to change one raises its version (`StageKind.version`) and writes the new number here.
"""

from __future__ import annotations

import hashlib

import pytest

from prunelens.study.matrix import parents_first
from prunelens.study.plan import plan_study
from prunelens.study_file import read_study

KNOWN = {
    "demo": "767df53663afdb54",
    "paper-a1": "a4fd6abe8c8393f0",
    "paper-a3": "9bc8f7219b6aa037",
    "paper-b1": "f767c8ea9b3352b8",
    "paper-c1": "394936329c51b70c",
    "selftest": "8316da5b8ac71d2d",
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_stage_of_a_shipped_study_has_the_identity_that_it_had(name: str) -> None:
    """Names stand for models and texts, whose content differs from machine to machine."""
    plan = plan_study(read_study(name), resolve=False)
    stages = parents_first(plan.targets().values())
    together = "".join(stage.identity for stage in stages)
    assert hashlib.sha256(together.encode()).hexdigest()[:16] == KNOWN[name]
