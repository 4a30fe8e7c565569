"""SparseGPT against its definition, and as a pruning of whole models."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from conftest import VOCABULARY, tiny_language_model
from independent import pruning as independent
from independent import sparsegpt as slow
from prunelens.config import PruningConfig
from prunelens.errors import UserError
from prunelens.prune import as_matrix, calibrate, prunable_matrices, prune_model, sparsegpt
from prunelens.prune.sparsegpt import prune_matrix

GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (5, 12), generator=generator)


def sparsegpt_config(**changes):
    return PruningConfig(
        **{"criterion": "sparsegpt", "scope": "matrix", "sparsity": 0.5, **changes}
    )


def problem(seed, rows=7, columns=24, tokens=60):
    """Weights and correlated inputs, one of which is always 0."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs[:, 5] = 0
    return torch.randn(rows, columns, generator=generator), inputs


def solved(weight, inputs, scope, sparsity, group=None):
    return prune_matrix(
        weight,
        inputs.T @ inputs,
        name="m",
        scope=scope,
        sparsity=Fraction(sparsity),
        group=group,
    )


def error_of(weight, pruned, inputs):
    return float(((weight.double() - pruned.double()) @ inputs.double().T).square().sum())


# One matrix


@pytest.mark.parametrize("block", [8, 10, 128])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_matrix_is_pruned_as_its_definition_says(scope, block, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK_COLUMNS", block)
    for seed, sparsity in enumerate(("0.0", "0.3", "0.5", "0.85")):
        weight, inputs = problem(seed)
        ours = solved(weight, inputs, scope, sparsity)
        theirs, keep = slow.prune(weight.numpy(), inputs, scope, sparsity, block=block)
        assert np.array_equal(ours.keep.numpy(), keep)
        np.testing.assert_allclose(ours.weight.numpy(), theirs, atol=2e-5)


@pytest.mark.parametrize("pattern", GROUPS)
def test_a_pattern_is_pruned_as_its_definition_says(pattern, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK_COLUMNS", 16)
    weight, inputs = problem(3)
    zeroed, size = GROUPS[pattern]
    ours = solved(weight, inputs, "row", "0.5", (zeroed, size))
    theirs, keep = slow.prune(weight.numpy(), inputs, "row", "0.5", group=(zeroed, size))
    assert np.array_equal(ours.keep.numpy(), keep)
    np.testing.assert_allclose(ours.weight.numpy(), theirs, atol=2e-5)
    assert (ours.keep.reshape(-1, size).sum(1) == size - zeroed).all()


@pytest.mark.parametrize("sparsity", ["0.1", "0.3", "0.5", "0.77"])
def test_counts_are_exact_and_spread_over_the_blocks(sparsity, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK_COLUMNS", 7)
    weight, inputs = problem(1)
    rows, columns = weight.shape
    share = Fraction(sparsity)
    whole = solved(weight, inputs, "matrix", sparsity).keep
    assert int((~whole).sum()) == math.floor(share * rows * columns)
    for end in range(7, columns, 7):
        assert int((~whole[:, :end]).sum()) == math.floor(share * rows * end)
    by_row = solved(weight, inputs, "row", sparsity).keep
    assert (~by_row).sum(1).tolist() == [math.floor(share * columns)] * rows


def test_ties_go_to_the_lowest_flat_index():
    """Equal weights and inputs without correlation: every weight costs the same."""
    inputs = torch.eye(8)
    keep = solved(torch.ones(2, 8), inputs, "matrix", "0.25").keep
    assert keep.flatten().tolist() == [False] * 4 + [True] * 12
    keep = solved(torch.ones(2, 8), inputs, "row", "0.5", (2, 4)).keep
    assert keep.tolist() == [[False, False, True, True] * 2] * 2


def test_without_correlation_it_is_wanda():
    """With a diagonal H nothing can take over, and W² / U² orders as |W| * ||X|| does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    inputs = torch.diag(torch.rand(16, generator=generator) + 1)
    found = solved(weight, inputs, "row", "0.5")
    scores = (
        weight.abs() * (inputs.diagonal().square() * 1 + 0.01 * inputs.square().sum() / 16).sqrt()
    )
    wanda = scores >= scores.sort(dim=1).values[:, 8:9]
    assert torch.equal(found.keep, wanda)
    torch.testing.assert_close(found.weight, torch.where(wanda, weight, 0.0))


def test_the_remaining_weights_make_up_for_those_that_went():
    """No better than least squares over the same masks, and better than leaving them alone."""
    for seed in range(4):
        weight, inputs = problem(seed)
        ours = solved(weight, inputs, "matrix", "0.5")
        best = torch.zeros_like(weight)
        for row, keep in enumerate(ours.keep):
            answer = torch.linalg.lstsq(inputs[:, keep], inputs @ weight[row], driver="gelsd")
            best[row, keep] = answer.solution
        masked = torch.where(ours.keep, weight, 0.0)
        errors = [error_of(weight, found, inputs) for found in (best, ours.weight, masked)]
        assert errors == sorted(errors) and errors[1] < 0.9 * errors[2]


def test_scale_of_the_inputs_does_not_matter():
    weight, inputs = problem(2)
    once, scaled = (solved(weight, factor * inputs, "matrix", "0.5") for factor in (1.0, 64.0))
    assert torch.equal(once.keep, scaled.keep)
    torch.testing.assert_close(once.weight, scaled.weight)


def test_rows_do_not_see_each_other_but_for_the_choice():
    weight, inputs = problem(4)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    ours, turned = (solved(w, inputs, "row", "0.5") for w in (weight, weight[order]))
    assert torch.equal(turned.keep, ours.keep[order])
    torch.testing.assert_close(turned.weight, ours.weight[order])


def test_dead_inputs_go_first_and_are_not_touched_otherwise():
    weight, inputs = problem(5)
    keep = solved(weight, inputs, "row", "0.0417").keep  # one of 24 weights
    assert (~keep).nonzero()[:, 1].tolist() == [5] * len(weight)
    found = solved(weight, inputs, "matrix", "0.0")
    assert torch.equal(found.weight, weight)


def test_what_cannot_be_inverted_or_compared_names_its_matrix():
    weight, inputs = problem(6)
    broken = inputs.T @ inputs
    broken[0, 1] = broken[1, 0] = 1e4  # no Gram matrix of anything
    with pytest.raises(UserError, match="inputs of m are so nearly dependent"):
        prune_matrix(weight, broken, name="m", scope="row", sparsity=Fraction(1, 2))
    weight[2, 3] = float("nan")
    with pytest.raises(UserError, match="scores of m are NaN"):
        solved(weight, inputs, "matrix", "0.5")


# Whole models


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"scope": "row", "pattern": "4:8"}])
def test_a_model_is_pruned_block_by_block_as_whole_passes_say(
    architecture, changes, windows, monkeypatch
):
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 24)
    lm = tiny_language_model(architecture)
    reference = copy.deepcopy(lm)
    config = sparsegpt_config(**changes)
    done = []
    pruned = prune_model(lm, config, calibration=windows, progress=done.append)
    assert pruned.updates_weights and done[-1] == len(windows)
    by_block = {}
    for name in independent.prunable_weights(reference.model):
        by_block.setdefault(independent.block_of(name), []).append(name)
    for names in by_block.values():
        inputs = independent.inputs_of(reference.model, windows)
        for name in names:
            matrix = as_matrix(reference.model.get_submodule(name))
            weight, keep = slow.prune(
                matrix.numpy(), inputs[name], config.scope, "0.5", group=config.group
            )
            matrix.copy_(torch.from_numpy(weight))
            assert np.array_equal(pruned.masks[name].numpy(), keep), name
            found = as_matrix(lm.model.get_submodule(name))
            np.testing.assert_allclose(found.numpy(), weight, atol=2e-4, err_msg=name)


def test_zero_pruning_changes_nothing(tiny_llama, windows):
    before = {n: t.clone() for n, t in tiny_llama.model.state_dict().items()}
    pruned = prune_model(tiny_llama, sparsegpt_config(sparsity=0.0), calibration=windows)
    assert pruned.achieved_sparsity == 0
    assert all(torch.equal(t, tiny_llama.model.state_dict()[n]) for n, t in before.items())


def test_rows_that_hold_no_whole_groups_are_refused_before_any_change(windows):
    lm = tiny_language_model("llama")
    mlp = lm.blocks[2].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(16, 6), torch.nn.Linear(16, 6)
    mlp.down_proj = torch.nn.Linear(6, 16)
    before = {n: t.clone() for n, t in lm.model.state_dict().items()}
    for criterion in ("sparsegpt", "magnitude"):
        config = PruningConfig(criterion=criterion, scope="row", pattern="2:4", sparsity=0.5)
        with pytest.raises(UserError, match=r"'2:4' needs.*down_proj have 6; use unstructured"):
            prune_model(lm, config, calibration=windows)
    assert all(torch.equal(t, lm.model.state_dict()[n]) for n, t in before.items())


def test_it_needs_windows_and_says_so(tiny_llama, windows):
    with pytest.raises(UserError, match="'sparsegpt' needs calibration windows"):
        prune_model(tiny_llama, sparsegpt_config())
    norms = {name: torch.ones(1) for name in prunable_matrices(tiny_llama)}
    with pytest.raises(UserError, match="give calibration windows"):
        prune_model(tiny_llama, sparsegpt_config(), calibration=windows, input_norms=norms)
