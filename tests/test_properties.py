"""What is measured equals a slow second implementation, over generated inputs (methods §2 to §7).

Each property draws sizes, ties, dead latents, undefined values and degenerate cases; the slow side
is in tests/independent/, written from the definitions.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.independent import causal as slow_causal
from tests.independent import fragility as slow_fragility
from tests.independent import matching as slow_matching
from tests.independent import persistence as slow_persistence
from tests.independent import pruning as slow_pruning
from tests.independent import sae as slow_sae
from tests.independent import statistics as slow_statistics

from conftest import ARCHITECTURES, VOCABULARY, tiny_language_model
from exact_worlds import NEVER, on_grid, worlds
from prunelens import match
from prunelens.activations import Statistics
from prunelens.analyses.ablation import divergence
from prunelens.analyses.causal import ablate
from prunelens.analyses.fragility import fragility_tests, quintiles
from prunelens.analyses.noise import CommonChange
from prunelens.analyses.persistence import persistence, persistence_summary
from prunelens.analyses.statistics import clustered_auc, exact_spearman, holm_adjusted
from prunelens.config import PruningConfig
from prunelens.match import match_dictionaries, match_rates
from prunelens.model import run_to_site
from prunelens.prune import input_norms, keep_masks, prunable_matrices, prune_model
from prunelens.prune.matrices import as_matrix
from prunelens.sae import evaluate_sae
from prunelens.sae.topk import TopKSAE
from prunelens.upper_blocks import UpperBlocks
from test_sae import InMemory

TAUS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
ARMS = ("shared_init", "shared_start")
HALF_MEASURES = ("persistence", "excess_isotropic", "excess_shuffled", "scaling")
HALF_MEASURES += ("relative_isotropic", "relative_shuffled")
PERSISTENCE = ("persistence", "persistence_null")
PERSISTENCE += ("persistence_noise_isotropic", "persistence_noise_shuffled")
SCOPES = ("global", "matrix", "row")
SEEDS = st.integers(0, 10**6)


def examples(number):
    """The same examples in every run."""
    return settings(max_examples=number, deadline=None, derandomize=True)


# --- pruning masks --------------------------------------------------------------------------------

decimals = st.integers(0, 1000).map(lambda n: str(n / 1000))  # of three places, 0 and 1 included


@st.composite
def scores(draw):
    """Matrices in no order of size; few values, so that ties cross rows and matrices."""
    generator = np.random.default_rng(draw(SEEDS))
    palette = draw(
        st.sampled_from(
            [
                [0.0],
                [0.0, 1.0],
                [0.0, 1e-45, 1e-40, 1e-38, 1.0, 3e38],  # from the least denormal number upwards
                [0.1, 0.2, 0.3, 1 / 3, np.nextafter(np.float32(1 / 3), 1, dtype=np.float32)],
            ]
        )
    )
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4))
    arrays = [generator.choice(np.array(palette, dtype=np.float32), shape) for shape in shapes]
    return {f"m{len(arrays) - n}": torch.from_numpy(a) for n, a in enumerate(arrays)}


@given(scores(), st.sampled_from(SCOPES), decimals)
@examples(80)
def test_masks_drop_the_lowest_scores_ties_by_place(matrices, scope, sparsity):
    lists = {name: matrix.tolist() for name, matrix in matrices.items()}
    [slow] = slow_pruning.masks_of(lists, scope, [sparsity])
    found = keep_masks(matrices, scope=scope, sparsity=Fraction(sparsity))
    assert list(found) == list(slow)
    for name, mask in slow.items():
        assert np.array_equal(found[name].numpy(), mask), name


@functools.cache
def shared_model(architecture, dtype=torch.float32):
    """One model for all examples; an example that changes weights sets them all first."""
    return tiny_language_model(architecture, dtype=dtype)


def few_bfloat16_values(generator, shape):
    """Weights as a rounded model has them: many are equal, some are zero."""
    values = torch.from_numpy(generator.normal(size=6) * (generator.random(6) < 0.8)).bfloat16()
    return values[torch.from_numpy(generator.integers(6, size=shape))]


@given(
    SEEDS,
    st.sampled_from(["llama", "gpt2"]),
    st.sampled_from(["magnitude", "wanda"]),
    st.sampled_from(SCOPES),
    st.integers(0, 999),
)
@examples(8)
def test_a_pruned_model_lost_what_the_definition_says(
    seed, architecture, criterion, scope, thousandths
):
    """bfloat16 ties, weights and norms that are zero, Conv1D; the report counts what went."""
    lm = shared_model(architecture, torch.bfloat16)
    generator = np.random.default_rng(seed)
    matrices = prunable_matrices(lm)
    for module in matrices.values():
        as_matrix(module).copy_(few_bfloat16_values(generator, tuple(as_matrix(module).shape)))
    norms = {
        name: torch.from_numpy(generator.integers(0, 4, as_matrix(module).shape[1]) / 3).float()
        for name, module in matrices.items()
    }
    weights = slow_pruning.prunable_weights(lm.model)
    slow_norms = {name: norm.numpy() for name, norm in norms.items()}
    slow_scores = slow_pruning.scores_of(weights, criterion, slow_norms)
    config = PruningConfig(criterion=criterion, scope=scope, sparsity=thousandths / 1000)
    [slow] = slow_pruning.masks_of(slow_scores, scope, [str(thousandths / 1000)])
    pruned = prune_model(lm, config, input_norms=norms)
    left = slow_pruning.prunable_weights(lm.model)
    assert [line.name for line in pruned.report] == list(left)
    for line in pruned.report:
        keep = slow[line.name]
        assert np.array_equal(left[line.name], np.where(keep, weights[line.name], 0)), line.name
        assert line.num_zeroed == int((~keep).sum())


@given(SEEDS, st.sampled_from(ARCHITECTURES), st.integers(1, 5), st.integers(2, 20))
@examples(8)
def test_input_norms_are_summed_token_by_token(seed, architecture, num_windows, context):
    lm = shared_model(architecture)
    windows = torch.from_numpy(
        np.random.default_rng(seed).integers(VOCABULARY, size=(num_windows, context))
    )
    with mock.patch("prunelens.prune.calibrate.BATCH_TOKENS", 2 * context):
        norms = input_norms(lm, windows)
    inputs = slow_pruning.inputs_of(lm.model, windows)
    assert list(norms) == list(inputs)
    for name, rows in inputs.items():
        np.testing.assert_allclose(norms[name], slow_pruning.norms_of(rows), rtol=1e-5)


# --- matching -------------------------------------------------------------------------------------


def exact_rows(generator, number, width):
    """Rows of norm 2 or 0, so that cosines are multiples of 1/4: exact, with many ties."""
    rows = np.zeros((number, width), dtype=np.float32)
    for row in rows:
        row[generator.choice(width, 4, replace=False)] = generator.choice([-1.0, 1.0], 4)
    rows[generator.random(number) < 0.1] = 0  # a dead row
    rows[generator.random(number) < 0.2] = rows[0]  # and copies
    return rows


def assert_rates_are(found, c):
    """`c`: all cosines, as brute force has them."""
    for tau in TAUS:
        rates = match_rates(found, tau)
        assert rates.one_way == slow_matching.one_way(c, tau)
        assert rates.mnn == slow_matching.mnn(c, tau)
        assert rates.greedy == len(slow_matching.greedy_pairs(c, tau)) / len(c)
        assert rates.one_way_reverse == slow_matching.one_way(c.T, tau)


@given(SEEDS, st.integers(1, 25), st.integers(1, 25), st.sampled_from([4, 5, 8]), st.booleans())
@examples(40)
def test_matching_is_brute_force_with_ties_and_dead_rows(seed, num_a, num_b, width, in_blocks):
    generator = np.random.default_rng(seed)
    a, b = (exact_rows(generator, number, width) for number in (num_a, num_b))
    rows, pairs = (3, 5) if in_blocks else (1024, 10**6)
    with mock.patch.object(match, "BLOCK_ROWS", rows), mock.patch.object(match, "MAX_PAIRS", pairs):
        found = match_dictionaries(torch.from_numpy(a), torch.from_numpy(b))
    c = a @ b.T / 4
    assert_rates_are(found, c)
    np.testing.assert_array_equal(found.best_in_b, c.argmax(1))
    np.testing.assert_array_equal(found.best_in_a, c.argmax(0))
    np.testing.assert_array_equal(found.similarity_a, c.max(1))
    np.testing.assert_array_equal(found.similarity_b, c.max(0))
    partner = slow_matching.greedy_pairs(c, 0.5)
    similarities = [c[i, partner[i]] if i in partner else np.nan for i in range(num_a)]
    np.testing.assert_array_equal(found.greedy_similarity_a, similarities)


@given(SEEDS, st.integers(1, 25), st.integers(1, 25), st.sampled_from([2, 3, 8]))
@examples(40)
def test_matching_of_rows_of_any_length_is_brute_force_in_float64(seed, num_a, num_b, width):
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(num_a, width)) * np.exp(generator.normal(size=(num_a, 1)))
    b = np.concatenate([generator.normal(size=(num_b, width)), 3 * a[: num_a // 2]])
    a, b = a.astype(np.float32), b.astype(np.float32)
    c = slow_matching.cosines(a.astype(float), b.astype(float))
    away_from_taus = np.abs(c[:, :, None] - np.array(TAUS[:-1])).min()
    gaps = [np.diff(np.sort(c, axis=axis), axis=axis) for axis in (0, 1)]
    closest = min([away_from_taus, *(gap.min() for gap in gaps if gap.size)])
    assume(closest > 1e-6)  # nearer than that, float32 may order them otherwise
    found = match_dictionaries(torch.from_numpy(a), torch.from_numpy(b))
    for tau in TAUS[:-1]:
        rates = match_rates(found, tau)
        assert rates.one_way == slow_matching.one_way(c, tau)
        assert rates.mnn == slow_matching.mnn(c, tau)
        assert rates.greedy == len(slow_matching.greedy_pairs(c, tau)) / len(c)


# --- SAEs -----------------------------------------------------------------------------------------


def arrays(sae):
    return [weights.detach().double().numpy() for weights in sae.weights]


@given(worlds())
@examples(20)
def test_encoding_and_decoding_are_the_definition(world):
    encoder, encoder_bias, decoder, decoder_bias = arrays(world.sae)
    slow = slow_sae.encode(world.x_hat.double().numpy(), encoder, encoder_bias, world.sae.k)
    latents = world.sae.encode(world.x_hat)
    assert np.array_equal(world.sae.dense_latents(latents).detach().numpy(), slow)
    expected = slow_sae.decode(slow, decoder, decoder_bias)
    assert np.array_equal(world.sae.decode(latents).detach().numpy(), expected)


@given(SEEDS, st.integers(1, 30), st.integers(1, 8))
@examples(40)
def test_among_ties_any_k_of_the_largest_are_kept_and_no_other(seed, num_latents, k):
    """Latents in equal pairs, integer inputs: nearly every token has a tie at its k-th place."""
    generator = np.random.default_rng(seed)
    k = min(k, num_latents)
    sae = TopKSAE(3, num_latents, k)
    with torch.no_grad():
        sae.encoder_weight.copy_(on_grid(generator, (num_latents, 3), 1, 1))
        sae.encoder_bias.copy_(on_grid(generator, (num_latents,), 1, 1))
    x_hat = on_grid(generator, (20, 3), 2, 1)
    pre = (x_hat @ sae.encoder_weight.T + sae.encoder_bias).relu().detach().numpy()
    z = sae.dense_latents(sae.encode(x_hat)).detach().numpy()
    for kept, possible in zip(z, pre, strict=True):
        assert sorted(kept)[-k:] == sorted(possible)[-k:]
        assert np.count_nonzero(kept) <= k
        assert all(value in (0, own) for value, own in zip(kept, possible, strict=True))


@given(worlds(), st.sampled_from([1, 64, 1000]), st.booleans(), SEEDS)
@examples(25)
def test_fvu_firing_rate_and_their_kin_are_the_definitions(world, batch_tokens, same, seed):
    """Own deviations per dimension; `same`: one token over and over, which has no variance."""
    generator = np.random.default_rng(seed)
    x_hat = world.x_hat[:1].expand(len(world.x_hat), -1) if same else world.x_hat
    sigma = torch.from_numpy(2.0 ** generator.integers(-3, 4, x_hat.shape[1])).float()
    mean = on_grid(generator, (x_hat.shape[1],), 2, 8)
    data = InMemory(x_hat * sigma + mean, mean=mean, sigma=sigma)
    dense_variance = float(generator.choice([0.0, 3.5]))
    found = evaluate_sae(world.sae, data, dense_variance=dense_variance, batch_tokens=batch_tokens)
    encoder, encoder_bias, decoder, decoder_bias = arrays(world.sae)
    x = x_hat.double().numpy()
    z = slow_sae.encode(x, encoder, encoder_bias, world.sae.k)
    x_rec = slow_sae.decode(z, decoder, decoder_bias)
    raw, raw_rec = (v * sigma.double().numpy() + mean.double().numpy() for v in (x, x_rec))
    by_dense = slow_sae.squared_error(raw, raw_rec) / dense_variance if dense_variance else math.nan
    expected = (slow_sae.fvu(x, x_rec), slow_sae.fvu(raw, raw_rec), by_dense)
    for ours, theirs in zip(found[:3], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, nan_ok=True)
    assert math.isnan(found.fvu) == (not (x != x[0]).any())
    assert found.l0 == (z > 0).sum() / len(z)
    assert found.alive == (z > 0).any(0).sum()
    assert np.array_equal(found.firing_rate.numpy(), slow_sae.firing_rate(z))
    np.testing.assert_allclose(
        found.mean_activation.numpy(), slow_sae.mean_activation(z), rtol=1e-12
    )


# --- persistence ----------------------------------------------------------------------------------


def exactly(x_hat):
    """Activations that are normalised already."""
    return InMemory(x_hat, mean=torch.zeros(x_hat.shape[1]), sigma=torch.ones(x_hat.shape[1]))


def unchanged(width):
    """No common change: all that differs is noise."""
    return CommonChange(
        torch.zeros(width, dtype=torch.float64),
        torch.ones(width, dtype=torch.float64),
        torch.tensor(0),
    )


def persistence_of(sae, before, after, tokens=None, *, change=None, groups=None, seed=0):
    """Of normalised activations; documents of three tokens each unless said otherwise."""
    tokens = torch.arange(len(before)) if tokens is None else tokens
    groups = torch.arange(len(tokens)) // 3 % 7 if groups is None else groups
    change = unchanged(before.shape[1]) if change is None else change
    rows = exactly(before), exactly(after), tokens
    return persistence(sae, *rows, change=change, groups=groups, seed=seed)


@given(worlds(most_latents=16), st.sampled_from([16, 100, 1000]), st.booleans())
@examples(25)
def test_persistence_compares_two_series_of_every_latent(world, batch_tokens, silence):
    """`silence`: one disturbed token over and over, on which most latents are silent."""
    sae, before, after = world
    if silence:
        after = after[:1].expand(len(after), -1)
    tokens = torch.arange(len(before)).flip(0)[: max(1, len(before) - 3)]
    with mock.patch("prunelens.analyses.persistence.BATCH_TOKENS", batch_tokens):
        table = persistence_of(sae, before, after, tokens)
    found = table[table["source"] == "pruned"]
    encoder, encoder_bias, _, _ = arrays(sae)
    series = [
        slow_sae.encode(x[tokens].double().numpy(), encoder, encoder_bias, sae.k)
        for x in (before, after)
    ]
    assert found["dense_firings"].tolist() == (series[0] > 0).sum(0).tolist()
    assert found["firings"].tolist() == (series[1] > 0).sum(0).tolist()
    expected = [
        slow_persistence.persistence(a, b) for a, b in zip(*(s.T for s in series), strict=True)
    ]
    correlation, jaccard, silenced = zip(*expected, strict=True)
    np.testing.assert_allclose(found["correlation"], correlation, atol=1e-9)
    np.testing.assert_allclose(found["jaccard"], jaccard, atol=0)
    assert found["silenced"].tolist() == list(silenced)
    groups = [place // 3 % 7 for place in range(len(tokens))]
    without = [
        slow_persistence.without(*pair, groups) for pair in zip(*(s.T for s in series), strict=True)
    ]
    np.testing.assert_allclose(np.stack(found["without"]), without, atol=1e-9)
    summary = persistence_summary(table).set_index("source").loc["pruned"]
    for name, value in slow_persistence.summary(expected).items():
        assert summary[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


# --- survival by quintile -------------------------------------------------------------------------


def fates_of(number):
    """Few distinct rates: ties, dead latents; a seed without an arm; undefined values."""
    generator = np.random.default_rng(number)
    palettes = [[0.0, 0.1], [0.0, 0.1, 0.2, 0.3], [0.0, *np.geomspace(1e-4, 0.5, 30)]]
    palette = palettes[generator.integers(3)]
    undefined = generator.choice([0.0, 0.3, 1.0], p=[0.4, 0.4, 0.2])
    parts = []
    for seed in range(generator.integers(1, 4)):
        number = generator.choice([1, 2, 3, 7, 30])
        columns = {
            "seed": seed,
            "latent": generator.permutation(number),  # rows in no order
            "firing_rate": generator.choice(palette, number),
            "firing_rate_first_half": generator.choice(palette, number),
            "init_retention": generator.random(number),
        }
        for arm in ARMS:
            has_it = seed == 0 or arm != "shared_start"
            cosine = generator.choice([0.4, 0.7, 0.75, 0.9], number)
            columns[f"cosine_{arm}"] = cosine if has_it else np.nan
            columns[f"mutual_{arm}"] = generator.integers(0, 2, number) if has_it else np.nan
        known = np.where(generator.random(number) < undefined, np.nan, 1.0)
        for name in PERSISTENCE:
            value = known * (0.2 + 0.7 * generator.random(number))
            columns |= {name: value, f"{name}_z": np.arctanh(value)}
            columns[f"{name}_without"] = list(value[:, None] + 0.02 * generator.normal(size=(1, 6)))
        columns |= {"scaling": known * generator.normal(size=number), "scaling_null": known}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


fates = SEEDS.map(fates_of)


@given(fates)
@examples(8)
def test_survival_by_quintile_and_its_exact_p(table):
    records, taus = table.to_dict("records"), (0.7,)
    found, tests = quintiles(table, taus), fragility_tests(table, taus)
    measures = list(zip(tests["measure"], tests["source"], tests["tau"], strict=True))
    assert set(measures[: len(ARMS)]) == {(arm, "pruned", tau) for arm in ARMS for tau in taus}
    assert {(m, source) for m, source, _ in measures[len(ARMS) :]} == {
        (m, source) for m in HALF_MEASURES for source in ("pruned", "null")
    }
    assert list(found["measure"]) == [measure for measure, _, _ in measures for _ in range(5)]
    for test, (measure, source, tau) in zip(tests.itertuples(), measures, strict=True):
        part = found.iloc[5 * test.Index : 5 * test.Index + 5]
        slow = slow_fragility.quintiles(records, measure, tau, source)
        for row in part.itertuples():
            numbers = (row.firing_rate, row.survival_rate, row.num_latents)
            assert numbers == pytest.approx(slow[row.quintile], abs=1e-12, nan_ok=True)
        rates, values = ([slow[q][i] for q in range(1, 6)] for i in (0, 1))
        assert_exact_test(test.rho, test.p_exact, np.round(rates, 12), np.round(values, 12))


def assert_exact_test(rho, p, x, y):
    """Undefined where a value is, or where nothing varies."""
    if np.isnan([x, y]).any() or np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan([rho, p]).all()
    else:
        assert rho == pytest.approx(slow_statistics.spearman(x, y))
        assert p == pytest.approx(slow_statistics.permutation_p(x, y))


# --- statistics -----------------------------------------------------------------------------------

few_values = st.sampled_from([0.0, 0.1, 0.1 + 0.2, 0.3, 1.0, -2.0, math.nan])


@given(st.lists(st.tuples(few_values, few_values), min_size=2, max_size=5))
@examples(60)
def test_an_exact_p_counts_orders(pairs):
    x, y = np.array(pairs).T
    found = exact_spearman(x, y)
    assert_exact_test(found.rho, found.p, np.round(x, 12), np.round(y, 12))
    assert bool(found.reason) == math.isnan(found.p)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40
    )
)
@examples(80)
def test_an_auc_compares_every_pair(rows):
    y, scores, clusters = (np.array(column) for column in zip(*rows, strict=True))
    found = clustered_auc(y, scores / 3, clusters)
    if y.all() or not y.any():
        assert np.isnan([found.pooled.value, found.within.value]).all()
        assert found.reason == "one class only"
        return
    assert found.pooled.value == pytest.approx(slow_statistics.auc(y, scores))
    within = [(y[clusters == c], scores[clusters == c]) for c in set(clusters)]
    within = [(own, s) for own, s in within if own.any() and not own.all()]
    pairs = [own.sum() * (~own).sum() for own, _ in within]
    expected = (
        np.average([slow_statistics.auc(*part) for part in within], weights=pairs)
        if within
        else math.nan
    )
    assert found.within.value == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 2 / 120, 0.2, 0.5, 1.0, math.nan]), max_size=8))
@examples(60)
def test_holm_multiplies_by_the_tests_that_are_left(p):
    found = holm_adjusted(np.array(p))
    known = [value for value in p if not math.isnan(value)]
    assert np.isnan(found).tolist() == [math.isnan(value) for value in p]
    np.testing.assert_allclose(found[~np.isnan(found)], slow_statistics.holm(known))


# --- KL divergences -------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 6), st.integers(1, 30), st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
@examples(50)
def test_a_divergence_is_the_sum_over_the_vocabulary(seed, num_items, vocabulary, size):
    generator = torch.Generator().manual_seed(seed)
    reference = 5 * torch.randn(2, vocabulary, generator=generator)
    which = torch.randint(2, (num_items,), generator=generator)
    scores = reference[which] + size * torch.randn(num_items, vocabulary, generator=generator)
    with mock.patch("prunelens.analyses.ablation._NUMBERS_AT_ONCE", 2 * vocabulary):
        found = divergence(reference, scores, which)
    expected = [slow_causal.kl(reference[w], s) for w, s in zip(which, scores, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
    assert (found >= 0).all()
    if size == 0:
        assert not found.any()


def rare_sae(generator, d_model, num_latents, k):
    """Random; its first latent never fires."""
    sae = TopKSAE.initialise(d_model, num_latents, k, init_seed=int(generator.integers(100)))
    with torch.no_grad():
        sae.encoder_bias.copy_(torch.from_numpy(-0.5 * generator.random(num_latents)))
        sae.decoder_bias.copy_(torch.from_numpy(0.1 * generator.normal(size=d_model)))
        sae.encoder_bias[0] = NEVER
    return sae


@given(
    SEEDS,
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(["resid_post", "attn_out", "mlp_out"]),
    st.integers(0, 2),
    st.integers(2, 12),
    st.integers(0, 1),
    st.integers(1, 5),
)
@examples(8)
def test_the_kl_of_every_protocol_is_that_of_whole_forward_passes(
    seed, architecture, site, layer, context, skip_first, k
):
    generator = np.random.default_rng(seed)
    lm, sae = shared_model(architecture), rare_sae(generator, 16, 24, k)
    tokens = torch.from_numpy(generator.integers(VOCABULARY, size=(2, context)))
    x = run_to_site(lm, tokens, site, layer).flatten(0, 1)
    statistics = Statistics(x.mean(0), x.std(0))
    latents = [0, *generator.choice(np.arange(1, 24), 2, replace=False).tolist()]
    upper = UpperBlocks(lm, tokens, site=site, layer=layer)
    found = ablate(
        upper, sae, statistics, latents=latents, random_direction_latents=[],
        contexts_per_latent=2, seed=seed, skip_first=skip_first,
    )  # fmt: skip
    world = slow_causal.World(lm, sae, *statistics, tokens, site, layer, skip_first)
    expected = [world.reconstruction_kl(prompt) for prompt in range(2)]
    np.testing.assert_allclose(found.reconstruction, expected, rtol=2e-3, atol=1e-9)
    assert len(found.kl[found.kl["contexts"] == "final"]) == 3 * 3 * 2
    for row in found.kl.itertuples():
        assert row.fires_final == (world.z[row.prompt][row.position, row.latent] > 0)
        where = (row.protocol, row.latent, row.prompt)
        at_all = row.contexts == "final"
        slow = world.final(*where) if at_all else world.firing(*where, row.position)
        assert row.kl == pytest.approx(slow, rel=2e-3, abs=1e-9), row
