"""A pruning criterion that somebody else declares, here, prunes models and is in a study's plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from prunelens.config import PruningConfig
from prunelens.criteria import CRITERIA, Criterion, register
from prunelens.errors import UserError
from prunelens.model import model_shape
from prunelens.prune import masks_sha256, prunable_matrices, prune_model
from prunelens.prune.calibrate import input_norms
from prunelens.prune.matrices import as_matrix
from prunelens.report.write import run_and_report
from prunelens.study.exports import export_checkpoint
from prunelens.study.matrix import parents_first
from prunelens.study.plan import plan_study
from prunelens.study_file import read_study
from tiny_study import tiny_study, write_text

ENERGY = Criterion(
    "energy",
    "(W_ij ‖X_j‖)²",
    lambda weight, norms: (weight.float() * norms).square(),
    needs="norms",
    scopes=("matrix", "row"),
    work=25.0,
)
WINDOWS = torch.arange(60).view(5, 12) % 50


@pytest.fixture
def declared() -> Iterator[None]:
    register(ENERGY)
    yield
    del CRITERIA["energy"]


def test_it_prunes(declared, tiny_lm):
    weights = {name: as_matrix(m).clone() for name, m in prunable_matrices(tiny_lm).items()}
    norms = input_norms(tiny_lm, WINDOWS)
    config = PruningConfig(criterion="energy", scope="row", sparsity=0.5)
    masks = prune_model(tiny_lm, config, calibration=WINDOWS).masks
    for name, weight in weights.items():
        for row, kept in zip(weight.tolist(), masks[name].tolist(), strict=True):
            worth = [(w * n) ** 2 for w, n in zip(row, norms[name].tolist(), strict=True)]
            least_kept = min(value for value, stays in zip(worth, kept, strict=True) if stays)
            most_gone = max(value for value, stays in zip(worth, kept, strict=True) if not stays)
            assert least_kept >= most_gone * (1 - 1e-6)
    sequential = config.model_copy(update={"calibration": "sequential"})
    assert sequential.label == "energy-row-0.50-sequential"
    prune_model(tiny_lm, sequential, calibration=WINDOWS)
    with pytest.raises(UserError, match="'energy' needs calibration windows or input_norms"):
        prune_model(tiny_lm, config)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_scores_that_cannot_be_ordered_are_refused(scope, declared, tiny_llama):
    config = PruningConfig(criterion="energy", scope=scope, sparsity=0.5)
    for bad, complaint in ((float("nan"), "are NaN"), (-1.0, "'energy' is negative")):
        broken = dataclasses.replace(ENERGY, score=lambda w, _, bad=bad: w.float() * 0 + bad)
        CRITERIA["energy"] = broken
        before = {name: value.clone() for name, value in tiny_llama.model.state_dict().items()}
        with pytest.raises(UserError, match=complaint):
            prune_model(tiny_llama, config, calibration=WINDOWS)
        for name, value in tiny_llama.model.state_dict().items():
            assert torch.equal(value, before[name])


def test_one_that_needs_products_updates_what_stays(declared, tiny_llama):
    CRITERIA["energy"] = dataclasses.replace(
        ENERGY, needs="products", score=lambda weight, diagonal: (weight / diagonal).abs()
    )
    config = PruningConfig(criterion="energy", scope="row", sparsity=0.5)
    dense = {n: as_matrix(m).clone() for n, m in prunable_matrices(tiny_llama).items()}
    ours = prune_model(tiny_llama, config, calibration=WINDOWS)
    assert ours.updates_weights
    theirs = {n: as_matrix(m).clone() for n, m in prunable_matrices(tiny_llama).items()}
    for name, module in prunable_matrices(tiny_llama).items():
        as_matrix(module).copy_(dense[name])
    same = PruningConfig(criterion="sparsegpt", scope="row", sparsity=0.5)  # its score is a square
    pruned = prune_model(tiny_llama, same, calibration=WINDOWS)
    assert masks_sha256(pruned.masks) == masks_sha256(ours.masks)
    for name, module in prunable_matrices(tiny_llama).items():
        assert torch.equal(as_matrix(module), theirs[name])


def test_a_study_has_it_once_it_is_declared(checkpoint_folder, tmp_path):
    data = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    wanda, energy = (
        {"criterion": name, "scope": "row", "sparsities": [0.5]} for name in ("wanda", "energy")
    )
    file = tmp_path / "mine.yaml"
    file.write_text(repr(data | {"questions": [], "prunings": [wanda, energy]}))
    with pytest.raises(UserError, match="'energy' is no criterion; there are magnitude, wanda, "):
        read_study(str(file))
    register(ENERGY)
    try:
        study = read_study(str(file))
        stages = list(parents_first(plan_study(study).targets().values()))
        assert [stage.name for stage in stages].count("calibration") == 1  # for both
        theirs, ours = (stage for stage in stages if stage.name == "prune")
        CRITERIA["energy"] = dataclasses.replace(ENERGY, version=2, work=25e6)
        dear = [s for s in parents_first(plan_study(study).targets().values()) if s.name == "prune"]
        assert dear[0].identity == theirs.identity and dear[1].identity != ours.identity
        assert dear[1].cost == 25e6 * model_shape(study.models[0]).linear_weights
        CRITERIA["energy"] = ENERGY

        out = tmp_path / "out"
        assert {run.status for run in run_and_report(study, out, quiet=True).results} == {"done"}
        assert "energy-row-0.50" in (out / "tables" / "perplexity.csv").read_text()
        export_checkpoint(out, "energy-row-0.50", tmp_path / "exported")
        card = (tmp_path / "exported" / "README.md").read_text()
        assert "| criterion | energy |" in card and "norms of the dense model's inputs" in card
    finally:
        del CRITERIA["energy"]


@pytest.mark.parametrize("name", ["wanda", "checkpoint", "dense", "no-name", "", "a/b"])
def test_a_name_that_is_taken_or_none_is_refused(name):
    with pytest.raises(UserError, match="is taken or no plain name"):
        register(dataclasses.replace(ENERGY, name=name))
