"""A study folder of earlier versions stays finished: no stage has another identity than it had.

Whoever means to change one raises its version (`StageKind.version`) and writes the new number here.
"""

from __future__ import annotations

import hashlib

import pytest

from prunelens.study.matrix import parents_first
from prunelens.study.parents import Sae, SaeRole, sae_role, saes_among
from prunelens.study.plan import plan_study
from prunelens.study_file import read_study

KNOWN = {
    "demo": "b0f3b6ea6328cdd5",
    "paper-a1": "6f934dd7722803c1",
    "paper-a3": "46044f9fe30ab212",
    "paper-b1": "1a87fd76f60a972e",
    "paper-c1": "057208eee34f826b",
    "selftest": "0e725515380c5b8e",
}


FORMER = {  # settings that the number was written with, of a study that has others now
    "demo": {
        "sae.expansion": "8", "sae.k": "16", "sae.steps": "500", "sae.batch_tokens": "512",
        "sae.learning_rate": "2e-3", "sae.checkpoint_every": "100",
        "perplexity.max_tokens": "12000",
    }
}  # fmt: skip
LATER = {"labels", "planted_labels", "probes", "probe_grades"}  # than these numbers


@pytest.mark.parametrize("name", KNOWN)
def test_every_stage_of_a_shipped_study_has_the_identity_that_it_had(name: str) -> None:
    """Names stand for models and texts, whose content differs from machine to machine."""
    plan = plan_study(read_study(name, FORMER.get(name)), resolve=False)
    stages = parents_first(plan.targets().values())
    together = "".join(sorted(s.identity for s in stages if s.name not in LATER))
    assert hashlib.sha256(together.encode()).hexdigest()[:16] == KNOWN[name]


ONE_SAE = {"start", "sae", "dense_sae"}  # roles of stages that read a single one


@pytest.mark.parametrize("name", KNOWN)
def test_an_sae_among_several_parents_is_named_by_its_role(name: str) -> None:
    """A plain text would be passed over where a stage asks for its SAEs."""
    plan = plan_study(read_study(name, FORMER.get(name)), resolve=False)
    seen = 0
    for stage in parents_first(plan.targets().values()):
        for role, parent in stage.parents.items():
            if parent.name == "sae" and role not in ONE_SAE:
                assert isinstance(role, SaeRole)
                config = parent.config
                which = (role.sae.init_seed, role.sae.data_seed, role.sae.rotated)
                assert which == (config["init_seed"], config["data_seed"], config["rotated"])
                seen += 1
    assert seen > 20


def test_roles_are_the_texts_that_identities_have() -> None:
    plain, turned = Sae(0, 0), Sae(0, 1, rotated=True, training="warm")
    assert sae_role("dense", plain) == "dense-0-0"
    assert sae_role("pruned", turned) == "pruned-0-1-rotated-warm"
    assert sae_role("sae", plain, plain=True) == "sae-0"
    roles = (sae_role("dense", turned), sae_role("own", plain), sae_role("dense", plain), "dense")
    parents = {role: number for number, role in enumerate(roles)}
    assert list(saes_among(parents, "dense").items()) == [(turned, 0), (plain, 2)]
    assert saes_among(parents, "pruned") == {}
