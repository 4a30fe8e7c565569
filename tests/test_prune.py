import copy
import json
import pathlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from conftest import VOCABULARY, tiny_language_model
from independent import pruning as independent
from prunelens.config import PruningConfig
from prunelens.criteria import CRITERIA
from prunelens.errors import UserError
from prunelens.model import as_language_model
from prunelens.prune import (
    apply_masks,
    as_matrix,
    calibrate,
    input_norms,
    keep_masks,
    load_masks,
    prunable_matrices,
    prune_model,
    save_checkpoint,
    save_masks,
)
from prunelens.prune import scores as scores_module
from prunelens.prune.checkpoint import check_target
from prunelens.prune.scores import Scored
from prunelens.prune.selection import select

SPARSITIES = ("0.0", "0.3", "0.5", "0.7")
SCOPES = ("global", "matrix", "row")


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (5, 12), generator=generator)


def wanda_config(**changes):
    return PruningConfig(**{"criterion": "wanda", "scope": "row", "sparsity": 0.5, **changes})


def assert_same_masks(ours, theirs):
    assert list(ours) == list(theirs)
    for name, mask in theirs.items():
        assert np.array_equal(ours[name].numpy(), mask), name


def set_weights(lm, weights):
    for name, module in prunable_matrices(lm).items():
        as_matrix(module).copy_(torch.tensor(weights[name]))


def state_of(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


# The masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_masks_equal_the_independent_implementation(tiny_lm, windows, dtype, criterion):
    tiny_lm.model.to(dtype)
    weights = independent.prunable_weights(tiny_lm.model)
    norms = input_norms(tiny_lm, windows)
    slow_norms = {name: norm.numpy() for name, norm in norms.items()}
    slow_scores = independent.scores_of(weights, criterion, slow_norms)
    for scope in SCOPES:
        slow_masks = independent.masks_of(slow_scores, scope, SPARSITIES)
        for sparsity, slow in zip(SPARSITIES, slow_masks, strict=True):
            config = PruningConfig(criterion=criterion, scope=scope, sparsity=float(sparsity))
            set_weights(tiny_lm, weights)
            pruned = prune_model(tiny_lm, config, input_norms=norms)
            assert_same_masks(pruned.masks, slow)
            for name, matrix in independent.prunable_weights(tiny_lm.model).items():
                assert np.array_equal(matrix, np.where(slow[name], weights[name], 0)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_head_is_one_more_matrix_and_takes_a_tied_embedding_along(tiny_lm, dtype, scope):
    """Of the tiny models GPT-2's and Gemma's heads are tied, Llama's is not."""
    tiny_lm.model.to(dtype)
    is_tied = tiny_lm.model.config.tie_word_embeddings
    embedding = tiny_lm.model.get_input_embeddings().weight
    before = embedding.clone()
    weights = independent.prunable_weights(tiny_lm.model, lm_head=True)
    assert len(weights) == len(prunable_matrices(tiny_lm)) + 1 and "lm_head" in weights
    scores = independent.scores_of(weights, "magnitude")
    [slow] = independent.masks_of(scores, scope, ["0.3"])
    config = PruningConfig(criterion="magnitude", scope=scope, sparsity=0.3, lm_head=True)
    pruned = prune_model(tiny_lm, config)
    assert_same_masks(pruned.masks, slow)
    after = independent.prunable_weights(tiny_lm.model, lm_head=True)
    for name, matrix in after.items():
        assert np.array_equal(matrix, np.where(slow[name], weights[name], 0)), name
    if is_tied:
        assert np.array_equal(embedding.float().numpy(), after["lm_head"])
    else:
        assert torch.equal(embedding, before)
    if scope == "global":
        total = sum(matrix.size for matrix in weights.values())
        zeroed = sum(int((~mask).sum()) for mask in pruned.masks.values())
        assert zeroed == int(Fraction(3, 10) * total)


def test_the_head_by_lot(tiny_lm):
    config = PruningConfig(criterion="random", scope="matrix", sparsity=0.5, lm_head=True)
    mask = prune_model(tiny_lm, config).masks["lm_head"]
    lots = [independent.lot(0, "lm_head", index) for index in range(mask.numel())]
    lowest = sorted(range(mask.numel()), key=lambda index: (lots[index], index))
    gone = set((~mask).flatten().nonzero().flatten().tolist())
    assert gone == set(lowest[: mask.numel() // 2])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scope", SCOPES)
def test_ties_go_to_the_lowest_index_of_the_first_matrix(scope, threads, monkeypatch):
    torch.set_num_threads(threads)
    monkeypatch.setattr(scores_module, "BLOCK_WEIGHTS", 16)
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randint(0, 4, shape, generator=generator).float() / 3
        for name, shape in {"b": (21, 3), "a": (14, 5), "c": (1, 3)}.items()
    }
    lists = {name: matrix.tolist() for name, matrix in scores.items()}
    texts = ("0", "0.01", "0.1", "0.25", "0.7", "0.99", "1")
    for text, slow in zip(texts, independent.masks_of(lists, scope, texts), strict=True):
        assert_same_masks(keep_masks(scores, scope=scope, sparsity=Fraction(text)), slow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_scores_are_chosen_as_their_float32_values(dtype, monkeypatch):
    """Two bytes are counted in one pass, four in two; signs, zeros and subnormals among them."""
    monkeypatch.setattr(scores_module, "BLOCK_WEIGHTS", 64)
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: (torch.randn(shape, generator=generator) * 10.0**-scale).to(dtype)
        for name, shape, scale in (("a", (20, 9), 0), ("b", (33, 5), 6), ("c", (8, 1), 7))
    }
    weights["a"][0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    lists = {name: weight.float().abs().tolist() for name, weight in weights.items()}
    matrices = {name: Scored(weight, dtype) for name, weight in weights.items()}
    for scope in SCOPES:
        masks = independent.masks_of(lists, scope, SPARSITIES)
        for sparsity, slow in zip(SPARSITIES, masks, strict=True):
            found = {name: [] for name in weights}
            for kept in select(matrices, scope=scope, sparsity=Fraction(sparsity)):
                found[kept.name].append(kept.keep)
            assert_same_masks({name: torch.cat(parts) for name, parts in found.items()}, slow)


def test_threads_are_given_back_after_an_error():
    torch.set_num_threads(3)
    broken = {"broken": torch.full((2, 2), torch.nan)}
    with pytest.raises(UserError, match="broken"):
        keep_masks(broken, scope="global", sparsity=Fraction(1, 2))
    assert torch.get_num_threads() == 3


def test_whoever_takes_the_blocks_has_all_threads():
    torch.set_num_threads(3)
    weights = {f"m{i}": Scored(torch.randn(40, 8)) for i in range(9)}
    for _kept in select(weights, scope="global", sparsity=Fraction(1, 2)):
        assert torch.get_num_threads() == 3
    next(select(weights, scope="row", sparsity=Fraction(1, 2)))
    assert torch.get_num_threads() == 3


def test_scores_over_the_whole_float_range_are_ordered():
    generator = torch.Generator().manual_seed(1)
    exponents = torch.rand(60, 50, generator=generator) * 75 - 45
    scores = {"wide": 10.0**exponents}  # from denormal numbers to 1e30
    lists = {"wide": scores["wide"].tolist()}
    ours = keep_masks(scores, scope="global", sparsity=Fraction("0.37"))
    assert_same_masks(ours, independent.masks_of(lists, "global", ["0.37"])[0])


def test_counts_are_exact_where_floats_are_not():
    """0.7 * 90 is 62.99… in floats; a row of 128 at 30 % loses 38."""
    for columns, sparsity, zeroed in ((90, 0.7, 63), (128, 0.3, 38), (3, 0.3, 0)):
        fraction = wanda_config(sparsity=sparsity).fraction
        mask = keep_masks({"m": torch.rand(2, columns)}, scope="row", sparsity=fraction)["m"]
        assert (~mask).sum(1).tolist() == [zeroed, zeroed]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_name_their_matrix(scope, bad):
    scores = {"fine": torch.rand(2, 3), "broken": torch.tensor([[1.0, bad]])}
    with pytest.raises(UserError, match="broken"):
        keep_masks(scores, scope=scope, sparsity=Fraction(1, 2))


def test_wanda_weighs_columns_by_their_inputs():
    weight = torch.tensor([[1.0, -2.0], [-3.0, 0.5]], dtype=torch.bfloat16)
    wanda, magnitude = (CRITERIA[name].score for name in ("wanda", "magnitude"))
    assert torch.equal(wanda(weight, torch.tensor([10.0, 1.0])), torch.tensor([[10, 2], [30, 0.5]]))
    assert torch.equal(magnitude(weight, weight), torch.tensor([[1, 2], [3, 0.5]]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("zeroed", "size"), [(2, 4), (4, 8)])
def test_a_pattern_takes_the_lowest_of_neighbours_first_index_first(
    zeroed, size, threads, monkeypatch
):
    torch.set_num_threads(threads)
    monkeypatch.setattr(scores_module, "BLOCK_WEIGHTS", 64)
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randint(0, 4, shape, generator=generator).float() / 3
        for name, shape in {"b": (21, 16), "a": (14, 8), "c": (1, 24)}.items()
    }
    ours = keep_masks(scores, scope="row", sparsity=Fraction(1, 2), group=(zeroed, size))
    lists = {name: matrix.tolist() for name, matrix in scores.items()}
    assert_same_masks(ours, independent.masks_of(lists, size, ["0.5"])[0])
    for mask in ours.values():
        assert (mask.reshape(-1, size).sum(1) == size - zeroed).all()


def test_a_pattern_does_not_see_the_order_of_rows_or_groups():
    """Rows and whole groups may be turned round; what stays of each is the same."""
    scores = torch.rand(12, 24, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    groups = torch.randperm(6, generator=torch.Generator().manual_seed(3))

    def turned(matrix):
        return matrix[rows].reshape(12, 6, 4)[:, groups].reshape(12, 24).contiguous()

    options = {"scope": "row", "sparsity": Fraction(1, 2), "group": (2, 4)}
    plain = keep_masks({"m": scores}, **options)["m"]
    assert torch.equal(keep_masks({"m": turned(scores)}, **options)["m"], turned(plain))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "random"])
def test_patterns_prune_whole_models(tiny_lm, windows, criterion):
    options = {"criterion": criterion, "scope": "row", "pattern": "4:8", "sparsity": 0.5}
    weights = independent.prunable_weights(tiny_lm.model)
    norms = input_norms(tiny_lm, windows)
    pruned = prune_model(tiny_lm, PruningConfig(**options), input_norms=norms)
    if criterion != "random":
        slow_norms = {name: norm.numpy() for name, norm in norms.items()}
        scores = independent.scores_of(weights, criterion, slow_norms)
        assert_same_masks(pruned.masks, independent.masks_of(scores, 8, ["0.5"])[0])
    for name, mask in pruned.masks.items():
        assert (mask.reshape(-1, 8).sum(1) == 4).all(), name
    assert pruned.achieved_sparsity == 0.5 and not pruned.updates_weights


# By lot


@pytest.mark.parametrize("scope", SCOPES)
def test_lots_are_those_of_the_independent_implementation(tiny_lm, scope, monkeypatch):
    monkeypatch.setattr(scores_module, "BLOCK_WEIGHTS", 96)
    config = PruningConfig(criterion="random", scope=scope, sparsity=0.3, random_seed=5)
    lots = {
        name: [
            [independent.lot(5, name, i * matrix.shape[1] + j) for j in range(matrix.shape[1])]
            for i in range(len(matrix))
        ]
        for name, matrix in independent.prunable_weights(tiny_lm.model).items()
    }
    pruned = prune_model(tiny_lm, config)
    assert_same_masks(pruned.masks, independent.masks_of(lots, scope, ["0.3"])[0])


def test_lots_are_uniform_and_differ_by_seed_matrix_and_place():
    count = 1 << 18
    draws = {
        key: scores_module.lots(*key, 0, count).double() / 2**30
        for key in ((0, "a"), (1, "a"), (0, "b"))
    }
    for numbers in draws.values():
        assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
        bins = torch.histc(numbers, 64, 0, 1)
        chi_squared = float(((bins - count / 64) ** 2 / (count / 64)).sum())
        assert 20 < chi_squared < 120  # 63 degrees of freedom: all but one in 10^5
        neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
        assert abs(neighbours) < 5 / count**0.5
    first, *others = draws.values()
    assert all(abs(np.corrcoef(first, other)[0, 1]) < 5 / count**0.5 for other in others)


def test_random_pruning_looks_at_no_weight(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    for module in prunable_matrices(other).values():
        as_matrix(module).mul_(-3).add_(0.1)
    config = PruningConfig(criterion="random", scope="global", sparsity=0.5)
    ours, theirs = (prune_model(lm, config).masks for lm in (tiny_llama, other))
    assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())


def test_seeds_of_random_pruning_agree_by_chance_alone():
    lm = tiny_language_model("llama")
    masks = []
    for seed in (0, 1):
        options = {"criterion": "random", "scope": "global", "sparsity": 0.5}
        config = PruningConfig(**options, random_seed=seed)
        masks.append(prune_model(copy.deepcopy(lm), config).masks)
    equal = sum(int((masks[0][n] == masks[1][n]).sum()) for n in masks[0])
    total = sum(mask.numel() for mask in masks[0].values())
    assert equal / total == pytest.approx(0.5, abs=4 * (0.25 / total) ** 0.5)


# The calibration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_whole_forward_passes(tiny_lm, windows, dtype, monkeypatch):
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 24)  # batches of 2, 2 and 1 windows
    tiny_lm.model.to(dtype)
    done = []
    norms = input_norms(tiny_lm, windows, done.append)
    inputs = independent.inputs_of(tiny_lm.model, windows)
    assert list(norms) == list(inputs) and done == [2, 4, 5]
    for name, rows in inputs.items():
        np.testing.assert_allclose(
            norms[name], independent.norms_of(rows), rtol=1e-5 if dtype == torch.float32 else 2e-2
        )


def test_small_inputs_are_not_lost_among_many(monkeypatch):
    """300,000 equal terms after a large one: a float32 running sum would stand still."""
    matrix = torch.nn.Linear(1, 1)
    with calibrate._summing_squares({"m": matrix}) as squares:
        matrix(torch.tensor([[30000.0]]))
        for _ in range(75):
            matrix(torch.full((4000, 1), 3.0))
    expected = (30000.0**2 + 300_000 * 9) ** 0.5
    assert float(squares["m"].sqrt()) == pytest.approx(expected, rel=1e-7)


def test_a_shared_input_is_summed_once_unless_it_was_written_to(monkeypatch):
    sums = []

    def counted(inputs):
        sums.append(inputs.shape)
        return inputs.float().square().sum(0)

    monkeypatch.setattr(calibrate, "_squares", counted)
    queries, keys, other = (torch.nn.Linear(3, 2) for _ in range(3))
    inputs = torch.ones(4, 3)
    modules = {"queries": queries, "keys": keys, "other": other}
    with torch.no_grad(), calibrate._summing_squares(modules) as squares:
        queries(inputs)
        keys(inputs)
        inputs.mul_(2)
        other(inputs)
        other(inputs.clone())
    assert len(sums) == 3
    assert [float(squares[name][0]) for name in modules] == [4, 4, 32]


def test_squares_in_small_parts_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(calibrate, "CACHED", 64)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.randn(101, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = inputs.clone()
        torch.testing.assert_close(calibrate._squares(inputs), inputs.float().square().sum(0))
        assert torch.equal(inputs, before)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_sequential_equals_whole_passes_after_every_block(tiny_lm, windows, scope, monkeypatch):
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 24)
    slow_lm, dense_lm, done = copy.deepcopy(tiny_lm), copy.deepcopy(tiny_lm), []
    config = wanda_config(scope=scope, calibration="sequential")
    pruned = prune_model(tiny_lm, config, calibration=windows, progress=done.append)
    slow = independent.prune_sequentially(slow_lm.model, windows, scope, "0.5")
    assert_same_masks(pruned.masks, slow)
    assert all(torch.equal(a, slow_lm.model.state_dict()[n]) for n, a in state_of(tiny_lm).items())
    assert done[-1] == len(windows) and len(done) == len(tiny_lm.blocks)
    dense = prune_model(dense_lm, wanda_config(scope=scope), calibration=windows)
    assert any(not torch.equal(dense.masks[n], mask) for n, mask in pruned.masks.items())


def test_sequential_hands_each_block_its_own_mask_and_rotary_embedding(windows, monkeypatch):
    """Gemma 3 with local and global layers, windows longer than the sliding one."""
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 24)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        layer_types=layer_types,
        initializer_range=0.2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lm, slow_lm = (as_language_model(copy.deepcopy(model), label="gemma") for _ in range(2))
    pruned = prune_model(lm, wanda_config(calibration="sequential"), calibration=windows)
    slow = independent.prune_sequentially(slow_lm.model, windows, "row", "0.5")
    assert_same_masks(pruned.masks, slow)


def test_sequential_refuses_blocks_that_share_state(tiny_llama, windows):
    """A block that remembers the text it saw last cannot be run block by block."""
    memory = {}

    def remember(block, arguments):
        memory["first"] = arguments[0]

    def add(block, arguments):
        return (arguments[0] + 3 * memory["first"], *arguments[1:])

    tiny_llama.blocks[0].register_forward_pre_hook(remember)
    tiny_llama.blocks[1].register_forward_pre_hook(add)
    with pytest.raises(UserError, match=r"pruning\.calibration: 'sequential'.*use dense"):
        prune_model(tiny_llama, wanda_config(calibration="sequential"), calibration=windows)


CALIBRATED = {
    "wanda": wanda_config(),
    "wanda-sequential": wanda_config(calibration="sequential"),
    "sparsegpt": PruningConfig(criterion="sparsegpt", scope="matrix", sparsity=0.5),
}


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_stop_before_any_change(tiny_lm, windows, name, bad):
    tiny_lm.model.get_input_embeddings().weight.data[int(windows[0, 0])] = bad
    before = state_of(tiny_lm)
    first = next(iter(prunable_matrices(tiny_lm)))
    with pytest.raises(UserError, match=f"calibration inputs of {first} are NaN or infinite"):
        prune_model(tiny_lm, CALIBRATED[name], calibration=windows)
    after = tiny_lm.model.state_dict()
    assert all(torch.equal(a.nan_to_num(), after[n].nan_to_num()) for n, a in before.items())


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("place", [0, 3, 6, -1])
def test_broken_weights_are_named_and_not_what_they_break(tiny_llama, windows, name, place):
    broken = list(prunable_matrices(tiny_llama))[place]
    as_matrix(tiny_llama.model.get_submodule(broken))[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"(weights|scores) of {broken} are NaN or infinite"):
        prune_model(tiny_llama, CALIBRATED[name], calibration=windows)


def silenced(lm, block=1):
    """Its MLP's middle is always 0 and its weights are as before."""
    module = lm.blocks[block].mlp
    module.act_fn = torch.nn.Threshold(float("inf"), 0.0)
    return next(n for n, m in prunable_matrices(lm).items() if m is module.down_proj)


@pytest.mark.parametrize("name", CALIBRATED)
def test_inputs_that_are_always_zero_are_no_inputs_that_never_came(
    tiny_llama, windows, name, caplog
):
    matrix = silenced(tiny_llama)
    weight = as_matrix(tiny_llama.model.get_submodule(matrix))
    before = weight.clone()
    pruned = prune_model(tiny_llama, CALIBRATED[name], calibration=windows)
    scope = CALIBRATED[name].scope
    by_magnitude = keep_masks({matrix: before.abs()}, scope=scope, sparsity=Fraction(1, 2))[matrix]
    assert torch.equal(pruned.masks[matrix], by_magnitude)
    assert torch.equal(weight, torch.where(by_magnitude, before, 0.0))
    zeros = {line.name: line.num_zero_inputs for line in pruned.report}
    assert zeros == {**dict.fromkeys(zeros, 0), matrix: weight.shape[1]}
    [told] = caplog.messages
    assert told == (
        "tiny-llama: calibration reached 1 of 21 matrices with nothing but zeros (first"
        f" {matrix}); their weights go by magnitude"
    )


def test_where_all_weights_compete_those_without_inputs_go_first(tiny_llama, windows, caplog):
    matrix = silenced(tiny_llama)
    config = wanda_config(scope="global", sparsity=0.2)
    pruned = prune_model(tiny_llama, config, calibration=windows)
    assert not pruned.masks[matrix].any()
    assert "their weights go before all others" in caplog.text


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_matrix_that_calibration_never_reached_is_refused(tiny_llama, windows, name):
    unused = torch.nn.Linear(16, 16)
    unused.weight.requires_grad_(False)
    tiny_llama.blocks[1].unused = unused
    with pytest.raises(UserError, match=r"calibration never reached model\.layers\.1\.unused"):
        prune_model(tiny_llama, CALIBRATED[name], calibration=windows)


@pytest.mark.parametrize("scope", SCOPES)
def test_broken_weights_stop_before_any_change(tiny_llama, scope):
    last, weight = [(n, as_matrix(m)) for n, m in prunable_matrices(tiny_llama).items()][-1]
    weight[-1, -1] = float("inf")
    before = state_of(tiny_llama)
    config = PruningConfig(criterion="magnitude", scope=scope, sparsity=0.5)
    with pytest.raises(UserError, match=last):
        prune_model(tiny_llama, config)
    assert all(torch.equal(a, tiny_llama.model.state_dict()[n]) for n, a in before.items())


def test_hooks_are_gone_afterwards(tiny_llama, windows):
    prune_model(tiny_llama, wanda_config(calibration="sequential"), calibration=windows)
    input_norms(tiny_llama, windows)
    assert not any(module._forward_pre_hooks for module in tiny_llama.model.modules())


# A model in, a pruned model out


@pytest.mark.parametrize("scope", SCOPES)
def test_zero_pruning_changes_nothing(tiny_lm, windows, scope):
    before = state_of(tiny_lm)
    pruned = prune_model(tiny_lm, wanda_config(scope=scope, sparsity=0.0), calibration=windows)
    assert pruned.achieved_sparsity == 0 and all(mask.all() for mask in pruned.masks.values())
    assert all(torch.equal(tensor, before[n]) for n, tensor in tiny_lm.model.state_dict().items())


def test_the_report_says_what_each_matrix_lost(tiny_llama):
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.3)
    pruned = prune_model(tiny_llama, config)
    matrices = prunable_matrices(tiny_llama)
    assert [line.name for line in pruned.report] == list(matrices)
    for line in pruned.report:
        assert line.num_zeroed == int((as_matrix(matrices[line.name]) == 0).sum())
        assert line.achieved == line.num_zeroed / line.num_weights
    total = sum(line.num_weights for line in pruned.report)
    assert pruned.achieved_sparsity == int(Fraction(3, 10) * total) / total


def test_masks_cost_a_bit_per_weight_or_nothing(tiny_lm):
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.3)
    other = copy.deepcopy(tiny_lm)
    with_masks = prune_model(tiny_lm, config)
    without = prune_model(other, config, with_masks=False)
    assert not without.masks and without.report == with_masks.report
    assert all(torch.equal(t, other.model.state_dict()[n]) for n, t in state_of(tiny_lm).items())
    for line in with_masks.report:
        mask = with_masks.masks[line.name]
        assert len(with_masks.masks.bits[line.name]) == -(-line.num_weights // 8)
        assert (
            int((~mask).sum()) == line.num_zeroed
            and mask.shape == with_masks.masks.shapes[line.name]
        )


def test_only_matrices_inside_blocks_are_prunable(tiny_lm):
    names = list(prunable_matrices(tiny_lm))
    assert names == list(independent.prunable_weights(tiny_lm.model))
    assert len(names) % len(tiny_lm.blocks) == 0
    assert not any("embed" in n or "lm_head" in n or "wte" in n for n in names)


def test_a_shared_weight_counts_once(tiny_llama):
    names = list(prunable_matrices(tiny_llama))
    twin = next(n for n in names[1:] if as_matrix(tiny_llama.model.get_submodule(n)).shape
                == as_matrix(tiny_llama.model.get_submodule(names[0])).shape)  # fmt: skip
    tiny_llama.model.get_submodule(twin).weight = tiny_llama.model.get_submodule(names[0]).weight
    assert list(prunable_matrices(tiny_llama)) == [n for n in names if n != twin]


def test_experts_are_refused_rather_than_left_dense(tiny_llama):
    tiny_llama.blocks[0].experts = torch.nn.Module()
    tiny_llama.blocks[0].experts.up = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UserError, match=r"experts\.up has shape \[2, 3, 4\]"):
        prunable_matrices(tiny_llama)


def small_model(kind, **fields):
    """Random, with matrices large enough that each input matters."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return as_language_model(transformers.AutoModelForCausalLM.from_config(config), label=kind)


GRIFFIN = {"hidden_size": 16, "lru_width": 16, "num_attention_heads": 2, "intermediate_size": 24}
DBRX = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2},
}
STACKED = {
    "recurrent_gemma": ({**GRIFFIN, "num_hidden_layers": 1}, "of RecurrentGemmaRglru cannot"),
    "dbrx": (
        DBRX,
        r"mlp\.w1 has shape \[48, 16\], and mixtures of experts cannot",
    ),  # in one matrix
}


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_matrices_are_called_what_they_are(kind):
    fields, words = STACKED[kind]
    with pytest.raises(UserError, match=words):
        prunable_matrices(small_model(kind, **fields))


def test_blocks_that_are_handed_their_input_by_name_are_not_run_one_by_one(tiny_llama, windows):
    for block in tiny_llama.blocks:
        block.register_forward_pre_hook(
            lambda _module, given, named: ((), {"hidden_states": given[0], **named}),
            with_kwargs=True,
            prepend=True,
        )
    with pytest.raises(UserError, match=r"'sequential' needs .* not handed it as their first"):
        prune_model(tiny_llama, wanda_config(calibration="sequential"), calibration=windows)


STATE_SPACES = {  # model type -> its fields, and the projections of a block
    "mamba": ({"state_size": 4}, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
    "falcon_mamba": ({"state_size": 4}, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
    "mamba2": (
        {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
        {"in_proj", "out_proj"},
    ),
    "rwkv": ({}, {"key", "value", "receptance", "output"}),  # [1, 1, d] are no experts
}


@pytest.mark.parametrize("kind", STATE_SPACES)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_projections_of_state_space_models_are_pruned(kind, criterion, windows):
    fields, projections = STATE_SPACES[kind]
    lm = small_model(kind, hidden_size=16, num_hidden_layers=2, **fields)
    pruning = PruningConfig(criterion=criterion, scope="row", sparsity=0.5)
    pruned = prune_model(lm, pruning, calibration=windows)
    assert {matrix.name.rpartition(".")[2] for matrix in pruned.report} == projections
    for matrix in pruned.report:
        weight = lm.model.get_submodule(matrix.name).weight
        assert ((weight == 0).sum(1) >= weight.shape[1] // 2).all(), matrix.name


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_inputs_of_a_weight_that_is_multiplied_without_its_layer_are_known(kind, windows):
    """dt_proj of Mamba: the first columns of what x_proj gives, normalised in FalconMamba."""
    lm = small_model(kind, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=3)
    mixer = lm.blocks[0].mixer
    seen = []
    mixer.x_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    norm = input_norms(lm, windows)["backbone.layers.0.mixer.dt_proj"]
    steps = seen[0].detach()[..., :3].double()
    if kind == "falcon_mamba":
        steps = steps / (steps.square().mean(-1, keepdim=True) + mixer.rms_eps).sqrt()
    torch.testing.assert_close(norm.double(), steps.square().sum((0, 1)).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"calibration": "sequential"}, "norms", "calibration windows instead"),
        ({}, "", "needs calibration windows or input_norms"),
        ({}, "wrong norms", "norms; use what"),
        ({}, "no windows", r"raise corpus\.calibration_tokens"),
    ],
)
def test_missing_norms_say_the_fix(tiny_llama, windows, changes, given, message):
    options = {
        "": {},
        "windows": {"calibration": windows},
        "norms": {"input_norms": {}},
        "wrong norms": {"input_norms": dict.fromkeys(prunable_matrices(tiny_llama), torch.ones(1))},
        "no windows": {"calibration": windows[:0]},
    }[given]
    with pytest.raises(UserError, match=message):
        prune_model(tiny_llama, wanda_config(**changes), **options)


def test_sequential_is_refused_where_it_means_nothing():
    for changes in ({"criterion": "magnitude"}, {"scope": "global"}):
        with pytest.raises(ValueError, match="sequential"):
            wanda_config(calibration="sequential", **changes)


def test_the_head_is_refused_where_it_cannot_be_pruned(tiny_llama):
    for criterion, scope in (("wanda", "row"), ("sparsegpt", "matrix"), ("planted", "by_rate")):
        with pytest.raises(ValueError, match=f"lm_head: true does not go with '{criterion}'"):
            PruningConfig(criterion=criterion, scope=scope, sparsity=0.5, lm_head=True)
    head = tiny_llama.model.lm_head
    tiny_llama.model.lm_head = torch.nn.Embedding.from_pretrained(head.weight)
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.5, lm_head=True)
    with pytest.raises(UserError, match=r"prunings\.lm_head: true, and tiny-llama has no linear"):
        prune_model(tiny_llama, config)
    prune_model(tiny_llama, config.model_copy(update={"lm_head": False}))


def test_a_pruning_without_the_head_is_told_as_before():
    """What stands in identities, records and labels."""
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.5)
    assert "lm_head" not in config.model_dump(mode="json") and "head" not in config.label
    other = PruningConfig(**config.model_dump(), lm_head=True)
    assert other.model_dump(mode="json")["lm_head"] is True
    assert PruningConfig.model_validate(other.model_dump(mode="json")) == other != config
    assert other.label == "magnitude-global-0.50-head"


# Files


@pytest.mark.parametrize("lm_head", [False, True])
def test_masks_of_the_head_prune_a_fresh_model_and_its_checkpoint(
    tiny_lm, windows, tmp_path, lm_head
):
    fresh = copy.deepcopy(tiny_lm)
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.4, lm_head=lm_head)
    pruned = prune_model(tiny_lm, config)
    assert ("lm_head" in pruned.masks) == lm_head
    save_masks(pruned.masks, tmp_path / "masks.safetensors")
    apply_masks(fresh, load_masks(tmp_path / "masks.safetensors"))
    assert all(torch.equal(t, tiny_lm.model.state_dict()[n]) for n, t in state_of(fresh).items())
    save_checkpoint(tiny_lm, tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", dtype=torch.float32
    ).eval()
    loaded.set_attn_implementation(tiny_lm.model.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, tiny_lm.model(windows).logits)


def test_masks_survive_the_disk_and_prune_a_fresh_model(tiny_lm, windows, tmp_path):
    fresh = copy.deepcopy(tiny_lm)
    pruned = prune_model(tiny_lm, wanda_config(sparsity=0.3), calibration=windows)
    path = tmp_path / "masks.safetensors"
    save_masks(pruned.masks, path)
    loaded = load_masks(path)
    assert list(loaded) == list(pruned.masks)
    assert all(torch.equal(loaded[n], mask) for n, mask in pruned.masks.items())
    num_weights = sum(mask.numel() for mask in loaded.values())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header <= num_weights / 8 + len(loaded)
    apply_masks(fresh, loaded)
    assert all(torch.equal(t, tiny_lm.model.state_dict()[n]) for n, t in state_of(fresh).items())


def test_masks_have_the_same_bytes_in_every_process(tmp_path):
    """Two machines may upload the same artifact at the same moment."""
    script = """
import hashlib, pathlib, sys, torch
from prunelens.prune.masks import save_masks
path = pathlib.Path(sys.argv[1])
sums = set()
for _ in range(8):
    save_masks({name: torch.eye(16, 24, dtype=torch.bool) for name in ("b", "a", "c")}, path)
    sums.add(hashlib.sha256(path.read_bytes()).hexdigest())
print(*sums)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "masks.safetensors")]
    sums = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(sums) == 1 and len(sums.pop().split()) == 1


def test_masks_of_the_first_releases_are_read(tmp_path):
    """They have two keys of metadata, which safetensors writes in any order."""
    masks = {"b": torch.eye(3, 5, dtype=torch.bool), "a": torch.ones(2, 4, dtype=torch.bool)}
    bits = {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in masks.items()}
    shapes = json.dumps({name: mask.shape for name, mask in masks.items()})
    metadata = {"format": "prunelens-masks-1", "shapes": shapes}
    save_file(bits, tmp_path / "old.safetensors", metadata=metadata)
    loaded = load_masks(tmp_path / "old.safetensors")
    assert list(loaded) == ["b", "a"]
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_masks_of_another_model_are_refused(tiny_llama, tmp_path):
    masks = {name: torch.zeros(as_matrix(m).shape, dtype=torch.bool)
             for name, m in prunable_matrices(tiny_llama).items()}  # fmt: skip
    first = next(iter(masks))
    before = state_of(tiny_llama)
    with pytest.raises(UserError, match=f"{first}.* use masks of this model"):
        apply_masks(tiny_llama, {n: mask for n, mask in masks.items() if n != first})
    with pytest.raises(UserError, match="'extra'"):
        apply_masks(tiny_llama, masks | {"extra": masks[first]})
    with pytest.raises(UserError, match=f"{first} has shape"):
        apply_masks(tiny_llama, masks | {first: masks[first][:1]})
    assert all(torch.equal(t, tiny_llama.model.state_dict()[n]) for n, t in before.items())
    (tmp_path / "text").write_text("no masks")
    for name in ("text", "missing"):
        with pytest.raises(UserError, match=name):
            load_masks(tmp_path / name)


def test_a_saved_checkpoint_loads_with_equal_logits(tiny_lm, windows, tmp_path):
    prune_model(tiny_lm, wanda_config(), calibration=windows)
    folder = tmp_path / "new" / "pruned"
    save_checkpoint(tiny_lm, folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    implementation = tiny_lm.model.config._attn_implementation
    loaded.set_attn_implementation(implementation)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, tiny_lm.model(windows).logits)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pruned"]
    assert any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin"))


def test_a_checkpoint_overwrites_nothing(tiny_llama, tmp_path):
    (tmp_path / "mine").write_text("precious")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="name a new one"):
            save_checkpoint(tiny_llama, target)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(tiny_llama, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_what_nothing_can_take_the_place_of_is_refused_before_the_work(tmp_path, monkeypatch):
    standing, link = tmp_path / "standing", tmp_path / "link"
    standing.mkdir()
    monkeypatch.chdir(standing)
    for target in (standing, pathlib.Path(), pathlib.Path("../standing"), pathlib.Path("x/..")):
        with pytest.raises(UserError, match=r"is the folder that you are in.*; name a new one"):
            check_target(target)
    with pytest.raises(UserError, match="not an empty folder"):  # it holds where one is
        check_target(pathlib.Path(".."))
    (tmp_path / "empty").mkdir()
    for leads_to in ("empty", "nowhere"):
        link.symlink_to(tmp_path / leads_to)
        with pytest.raises(UserError, match=f"is a symbolic link to '.*{leads_to}'; name a new"):
            check_target(link)
        link.unlink()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "empty")
    with pytest.raises(UserError, match="is a mount point"):
        check_target(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "standing"]
