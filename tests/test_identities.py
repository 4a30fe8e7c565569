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
    "demo": "b0f3b6ea6328cdd5",
    "paper-a1": "6f934dd7722803c1",
    "paper-a3": "46044f9fe30ab212",
    "paper-b1": "1a87fd76f60a972e",
    "paper-c1": "057208eee34f826b",
    "selftest": "292fbc8df5285792",
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_stage_of_a_shipped_study_has_the_identity_that_it_had(name: str) -> None:
    """Names stand for models and texts, whose content differs from machine to machine."""
    plan = plan_study(read_study(name), resolve=False)
    stages = parents_first(plan.targets().values())
    together = "".join(sorted(stage.identity for stage in stages))
    assert hashlib.sha256(together.encode()).hexdigest()[:16] == KNOWN[name]
