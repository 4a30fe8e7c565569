"""Is it the same feature? By activations, by what is left of its direction, by a few directions."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tests.independent import identity, matching
from torch.nn.functional import normalize

from prunelens.activations import Statistics, random_rotation
from prunelens.analyses import activation_matching as activation_module
from prunelens.analyses import scaling as scaling_module
from prunelens.analyses import subspace as subspace_module
from prunelens.analyses.activation_matching import (
    ActivationComparison,
    activation_matching,
    latent_series,
    match_activations,
)
from prunelens.analyses.noise import (
    NULL_SEED,
    CommonChange,
    NullRows,
    fit_common_change,
    isotropic_noise_like,
    other_token,
)
from prunelens.analyses.scaling import latent_scaling, scaling_summary
from prunelens.analyses.statistics import mean_over
from prunelens.analyses.subspace import subspace_overlaps
from prunelens.analyses.survival import Comparison, Dictionary
from prunelens.match import match_rates
from prunelens.sae.steps import pattern
from prunelens.sae.topk import TopKSAE
from prunelens.study.artifacts.store import Stage
from prunelens.study.parents import Sae, sae_role
from prunelens.study.stages import STAGES
from prunelens.study.work import Work, write_json

TAUS = (0.5, 0.7, 0.9)
TOKENS, WIDTH, LATENTS, K = 1500, 16, 40, 5


class Rows:
    """Rows in memory."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, index):
        return self._rows[index]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(number, seed=0):
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def sae_of(encoder, bias, decoder, k):
    sae = TopKSAE(decoder.shape[1], len(decoder), k)
    with torch.no_grad():
        sae.encoder_weight.copy_(encoder)
        sae.encoder_bias.copy_(bias)
        sae.decoder_weight.copy_(decoder)
    return sae


def random_sae(seed=0):
    """Rows without unit norm, biases of both signs; the last latent hardly ever fires."""
    sae = TopKSAE.initialise(WIDTH, LATENTS, K, init_seed=seed)
    with torch.no_grad():
        sae.decoder_weight *= 0.5 + uniform(LATENTS, 1, seed=seed)
        sae.encoder_bias += 0.3 * random(LATENTS, seed=seed + 1)
        sae.encoder_bias[-1] = -3.0
        sae.decoder_bias += random(WIDTH, seed=seed + 2)
    return sae


def latents_of(sae, x):
    return sae.dense_latents(sae.encode(x)).detach().double().numpy()


def sparse_strengths(tokens, latents, *, rate=0.2, seed=0):
    """Positive where a latent fires, which each does on its own at its `rate`."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(tokens, latents, generator=generator) < rate
    return fires * (0.5 + torch.rand(tokens, latents, generator=generator))


def permuted(sae, order):
    return sae_of(
        sae.encoder_weight[order], sae.encoder_bias[order], sae.decoder_weight[order], sae.k
    )


# ---- noise ----


def test_isotropic_noise_has_each_tokens_norm_and_no_direction():
    difference = (
        random(4000, 8, seed=0) * uniform(4000, 1, seed=1) * torch.tensor([9.0] + [1.0] * 7)
    )
    noise = isotropic_noise_like(difference, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise.norm(dim=1), difference.norm(dim=1))
    share = noise.square().sum(0) / noise.square().sum()
    assert (share - 1 / 8).abs().max() < 0.02


# ---- activation matching ----


@pytest.fixture
def two_series():
    x = random(TOKENS, WIDTH, seed=3)
    y = x + 0.5 * random(TOKENS, WIDTH, seed=4)
    a, b = random_sae(0), random_sae(7)
    tokens = torch.arange(TOKENS)
    series = latent_series(a, Rows(x), tokens), latent_series(b, Rows(y), tokens)
    return series, (latents_of(a, x), latents_of(b, y))


def test_series_holds_the_latents_and_their_moments(monkeypatch):
    x, sae = random(TOKENS, WIDTH, seed=3), random_sae()
    monkeypatch.setattr(activation_module, "BATCH_TOKENS", 401)
    tokens = torch.arange(100, TOKENS).flip(0)
    seen = []
    series = latent_series(sae, Rows(x), tokens, progress=seen.append)
    z = latents_of(sae, x[tokens])
    np.testing.assert_array_equal(series.values.toarray(), z.astype(np.float32))
    np.testing.assert_allclose(series.mean, z.mean(0), atol=1e-12)
    np.testing.assert_allclose(series.deviation, z.std(0) * math.sqrt(len(z)), rtol=1e-10)
    np.testing.assert_array_equal(series.firings, (z > 0).sum(0))
    assert seen == [401, 802, 1203, 1400]


def test_activation_matching_equals_brute_force(two_series):
    (a, b), (za, zb) = two_series
    c = identity.correlations(za, zb)
    assert (a.firings < 10).any(), "the test wants a latent that fires too rarely"
    result = activation_matching([ActivationComparison("any", "null", 0, 1, 2, 3, a, b)], TAUS)
    for row in result.rates.itertuples():
        assert row.one_way == matching.one_way(c, row.tau)
        assert row.mnn == matching.mnn(c, row.tau)
        assert row.greedy == len(matching.greedy_pairs(c, row.tau)) / LATENTS
        assert row.one_way_reverse == matching.one_way(c.T, row.tau)
    known = a.firings >= 10
    np.testing.assert_allclose(result.latents["correlation"][known], c.max(1)[known], atol=1e-6)
    np.testing.assert_array_equal(result.latents["match"][known], c.argmax(1)[known])
    seeds = ["arm", "source", "init_a", "order_a", "init_b", "order_b"]
    assert list(result.rates) == [*seeds, "tau", "one_way", "mnn", "greedy", "one_way_reverse"]
    assert list(result.latents) == [*seeds, "latent", "match", "correlation", "mutual"]
    for table in result:
        assert table[seeds].drop_duplicates().to_numpy().tolist() == [["any", "null", 0, 1, 2, 3]]


def test_activation_matching_is_the_same_in_any_blocks_and_from_the_other_side(
    two_series, monkeypatch
):
    (a, b), _ = two_series
    whole, back = match_activations(a, b, lowest_tau=0.2), match_activations(b, a, lowest_tau=0.2)
    np.testing.assert_array_equal(whole.similarity_a, back.similarity_b)
    np.testing.assert_array_equal(whole.best_in_b, back.best_in_a)
    monkeypatch.setattr("prunelens.match.BLOCK_ROWS", 7)
    monkeypatch.setattr("prunelens.match.MAX_PAIRS", 5)
    for one, other in zip(whole, match_activations(a, b, lowest_tau=0.2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_ranges_of_tokens_change_rounding_alone_and_no_symmetry(two_series, monkeypatch):
    (a, b), (za, zb) = two_series
    whole = match_activations(a, b, lowest_tau=0.2)
    monkeypatch.setattr(activation_module, "RANGE_TOKENS", 400)  # of 1500
    there, back = match_activations(a, b, lowest_tau=0.2), match_activations(b, a, lowest_tau=0.2)
    np.testing.assert_array_equal(there.similarity_a, back.similarity_b)
    np.testing.assert_array_equal(there.best_in_b, whole.best_in_b)
    np.testing.assert_allclose(there.similarity_a, whole.similarity_a, atol=1e-7)
    best = identity.correlations(za, zb).max(1)
    np.testing.assert_allclose(there.similarity_a[a.correlates], best[a.correlates], atol=1e-6)


def test_tokens_on_which_fewer_or_no_latents_fire_are_matched_alike():
    """Their rows are filled up with zeros."""
    za, zb = (sparse_strengths(400, 12, rate=0.1, seed=s) for s in (0, 1))
    za[:50], zb[30:60] = 0.0, 0.0
    zb[60:, 3] = za[60:, 5]
    series = []
    for z in (za, zb):
        sae = sae_of(torch.eye(12), torch.zeros(12), torch.eye(12), 12)
        series.append(latent_series(sae, Rows(z), torch.arange(400)))
    assert len(set(np.diff(series[0].values.indptr))) > 3
    c = identity.correlations(za.double().numpy(), zb.double().numpy())
    found = match_activations(*series, lowest_tau=0.2)
    np.testing.assert_allclose(found.similarity_a, c.max(1), atol=1e-6)
    np.testing.assert_array_equal(found.best_in_a, c.argmax(0))


def test_latents_that_fire_alike_match_wherever_they_point():
    """B sees a turned space and has other sizes and another order; what fires is the same."""
    x, a, order = random(TOKENS, WIDTH, seed=5), random_sae(), shuffled(LATENTS)
    turn = random_rotation(WIDTH, seed=1)
    scale = 0.5 + uniform(LATENTS, 1, seed=2)
    c = sae_of(a.encoder_weight @ turn, a.encoder_bias, a.decoder_weight @ turn, K)
    b = permuted(c, order)
    tokens = torch.arange(TOKENS)
    left = latent_series(a, Rows(x), tokens)
    right = latent_series(b, Rows(x @ turn), tokens)
    right = right._replace(values=right.values * scale.numpy().T)
    right = activation_module._with_moments(right.values.tocsr())
    comparison = ActivationComparison("turned", "pruned", 0, 0, 0, 0, left, right)
    result = activation_matching([comparison], TAUS)
    known = result.latents[left.correlates]
    assert len(known) > 30
    np.testing.assert_allclose(known["correlation"], 1.0, atol=1e-5)
    np.testing.assert_array_equal(order[known["match"].astype(int).tolist()], known["latent"])
    assert known["mutual"].all()
    assert (result.rates[["one_way", "mnn", "greedy"]] == left.correlates.mean()).all().all()
    same = match_activations(left, left, lowest_tau=0.5)
    assert match_rates(same, 0.9).mnn == left.correlates.mean()
    assert (same.similarity_a[left.correlates] == 1.0).all()


def test_series_of_other_tokens_do_not_correlate():
    x, sae, tokens = random(TOKENS, WIDTH, seed=5), random_sae(), torch.arange(TOKENS)
    partners = other_token(TOKENS, torch.Generator().manual_seed(0))
    a, b = (latent_series(sae, Rows(x), index) for index in (tokens, partners))
    found = match_activations(a, b, lowest_tau=0.5)
    assert found.similarity_a.max() < 0.3
    assert set(match_rates(found, 0.5)[1:]) == {0.0}


def test_a_latent_that_is_dead_rare_or_constant_has_no_correlation():
    z = torch.zeros(200, 4)
    z[:9, 1] = torch.arange(1.0, 10.0)  # one firing too few
    z[:, 2] = 3.3  # always the same
    z[:10, 3] = torch.arange(1.0, 11.0)
    sae = sae_of(torch.eye(4), torch.zeros(4), torch.eye(4), 4)
    series = latent_series(sae, Rows(z), torch.arange(200))
    assert series.correlates.tolist() == [False, False, False, True]
    comparison = ActivationComparison("a", "dense", 0, 0, 0, 0, series, series)
    result = activation_matching([comparison], TAUS)
    latents = result.latents
    assert latents["correlation"].isna().tolist() == [True, True, True, False]
    assert latents["match"].isna().tolist() == [True, True, True, False]
    assert latents["mutual"].tolist() == [False, False, False, True]
    assert (result.rates[["one_way", "mnn", "greedy", "one_way_reverse"]] == 0.25).all().all()


def test_no_match_is_named_where_the_best_is_a_latent_that_cannot_be_matched():
    one = torch.zeros(200, 2)
    one[:50, 0], one[:100, 1] = 1.0, 1.0
    two = torch.zeros(200, 2)
    two[100:150, 1] = 1.0  # fires only where neither of A does
    sae = sae_of(torch.eye(2), torch.zeros(2), torch.eye(2), 2)
    a, b = (latent_series(sae, Rows(z), torch.arange(200)) for z in (one, two))
    comparison = ActivationComparison("a", "pruned", 0, 0, 0, 0, a, b)
    latents = activation_matching([comparison], TAUS).latents
    assert latents["match"].isna().all()
    assert (latents["correlation"] == 0.0).all()
    assert not latents["mutual"].any()


def test_series_over_different_tokens_are_our_bug(two_series):
    (a, _), _ = two_series
    shorter = activation_module._with_moments(a.values[:100])
    with pytest.raises(AssertionError, match="same tokens"):
        match_activations(a, shorter, lowest_tau=0.5)


def test_the_stage_matches_plain_pairs_once_more_with_the_null_in_the_place_of_the_pruned(tmp_path):
    """Every SAE reads the null as its own normalisation makes it."""
    x, screened = 3 * random(TOKENS, WIDTH, seed=0) + 5, torch.arange(20, TOKENS - 30)
    y = 1.4 * x + random(TOKENS, WIDTH, seed=1) - 2
    own = [Statistics(part.mean(0), part.std(0)) for part in (x, y)]
    change = CommonChange(
        random(WIDTH, seed=2).double(), torch.full((WIDTH,), 1.3).double(), torch.tensor(11)
    )
    parents = {name: tmp_path / name for name in ("screening", "statistics", "common_change")}
    for number, (name, rows) in enumerate({"dense": x, "pruned": y}.items()):
        parents[name] = tmp_path / name
        for seed in (0, 1):
            role = sae_role(name, Sae(seed, seed))
            folder = parents[role] = tmp_path / role
            random_sae(10 * number + seed).save(folder)
            own[number].save(folder / "normalisation.safetensors")
        parents[name].mkdir()
        save_file({"activations": rows}, parents[name] / "eval.safetensors")
        save_file(
            {"documents": torch.arange(TOKENS) // 50}, parents[name] / "eval_documents.safetensors"
        )
        write_json(parents[name] / "rows.json", {"eval_first_rows": 700})
    for name in ("screening", "statistics", "common_change"):
        parents[name].mkdir()
    save_file({"eval": screened}, parents["screening"] / "kept.safetensors")
    own[0].save(parents["statistics"] / "statistics.safetensors")
    change.save(parents["common_change"] / "change.safetensors")
    stage, shares = Stage("activation_matching", 2, {"taus": TAUS}, {}), []
    work = Work(stage, parents, tmp_path, tmp_path.mkdir, "cpu", shares.append, tmp_path.mkdir)
    STAGES["activation_matching"].made([work])

    assert len(shares) == 6 and max(shares) <= 1  # four SAEs, two of them once more
    rates = pd.read_parquet(tmp_path / "rates.parquet")
    pairs = rates[rates["tau"] == 0.5].groupby(["arm", "source"]).size().to_dict()
    arms, sources = ("shared_init", "cross_init"), ("pruned", "null")
    assert pairs == dict.fromkeys(itertools.product(arms, sources), 2)
    measured = screened[screened >= 700]
    dense, pruned = (((part - own[0].mean) / own[0].sigma)[measured].double() for part in (x, y))
    partner = other_token(len(measured), torch.Generator().manual_seed(11 + NULL_SEED)).numpy()
    null = identity.null(dense.numpy(), pruned.numpy(), 1.3, change.shift.numpy(), partner)
    raw = torch.from_numpy(null) * own[0].sigma + own[0].mean
    latents = pd.read_parquet(tmp_path / "latents.parquet")
    for source, read in {"pruned": y[measured], "null": raw}.items():
        za = latents_of(random_sae(0), dense.float())
        zb = latents_of(random_sae(11), ((read - own[1].mean) / own[1].sigma).float())
        here = (latents["source"] == source) & (latents["init_a"] == 0) & (latents["init_b"] == 1)
        found = latents.loc[here, "correlation"].to_numpy()
        known = np.isfinite(found)
        assert known.sum() > 25
        best = identity.correlations(za, zb).max(1)
        np.testing.assert_allclose(found[known], best[known], atol=1e-4)


# ---- latent scaling ----


@pytest.fixture
def noisy_world():
    x = random(TOKENS, WIDTH, seed=3) * 1.5
    y = 0.7 * x + 0.5 * random(TOKENS, WIDTH, seed=4) + 0.2
    return random_sae(), x, y


def orthogonal_world(width=12, tokens=3000, *, turned=True):
    """An SAE that finds the strengths its activations are made of; exactly, if not turned."""
    directions = random_rotation(width, seed=0) if turned else torch.eye(width)
    strengths = sparse_strengths(tokens, width)
    sae = sae_of(directions, torch.zeros(width), directions, width)
    return sae, strengths, directions


def scaling_of(sae, dense, pruned, tokens=None, *, change=None, groups=None, seed=0, **options):
    """Of all tokens, in 20 groups as documents would make, under the change that they have."""
    tokens = torch.arange(len(dense)) if tokens is None else tokens
    rows = Rows(dense), Rows(pruned)
    change = change or fit_common_change(*rows, tokens)
    groups = torch.arange(len(tokens)) * 20 // len(tokens) if groups is None else groups
    return latent_scaling(sae, *rows, tokens, change=change, groups=groups, seed=seed, **options)


def by_source(sae, dense, pruned, **options):
    table = scaling_of(sae, dense, pruned, **options)
    return {source: part.set_index("latent") for source, part in table.groupby("source")}


def test_scaling_equals_one_regression_per_latent(noisy_world, monkeypatch):
    monkeypatch.setattr(scaling_module, "BATCH_TOKENS", 128)
    sae, x, y = noisy_world
    tokens = torch.arange(100, TOKENS)
    shift, matrix = (torch.full((WIDTH,), value).double() for value in (0.1, 0.8))
    change = CommonChange(shift, matrix, torch.tensor(3))
    groups, seen = shuffled(len(tokens)) % 7, []
    table = scaling_of(
        sae, x, y, tokens, change=change, groups=groups, seed=5, progress=seen.append
    )
    assert seen[-1] == len(tokens)
    assert list(table) == [
        *("source", "latent", "dense_firings", "slope", "scaling", "alone"),
        *("standard_error", "reason"),
    ]
    z = latents_of(sae, x[100:])
    weights = [p.detach().double().numpy() for p in (sae.decoder_weight, sae.decoder_bias)]
    generator = torch.Generator().manual_seed(3 + 5 * 1000)
    other = tokens[other_token(len(tokens), generator)]
    directions = torch.empty(len(tokens), WIDTH)
    for group in range(7):
        for places in (groups == group).nonzero().squeeze(1).split(128):
            directions[places] = torch.randn(len(places), WIDTH, generator=generator)
    partner = other_token(len(tokens), torch.Generator().manual_seed(3 + NULL_SEED)).numpy()
    world = x[100:].double().numpy(), y[100:].double().numpy(), 0.8, 0.1
    targets = {
        "dense": x[100:],
        "pruned": y[100:],
        "null": torch.from_numpy(identity.null(*world, partner)),
        "noise_isotropic": torch.from_numpy(identity.isotropic(*world, directions.numpy())),
        "unpaired": y[other],
    }
    assert set(targets) == set(table["source"])
    dense = identity.slopes(z, *weights, x[100:].double().numpy())
    assert np.isnan(dense).any()
    for source, target in targets.items():
        part = table[table["source"] == source]
        expected = identity.slopes(z, *weights, target.double().numpy())
        np.testing.assert_allclose(part["slope"], expected, atol=1e-5)
        with_ratio = np.where(dense >= 0.1, expected / dense, np.nan)
        np.testing.assert_allclose(part["alone"], with_ratio, atol=2e-5)
        np.testing.assert_array_equal(part["dense_firings"], (z > 0).sum(0))


def test_standard_error_is_the_jackknife_over_groups_of_documents(noisy_world):
    groups = shuffled(TOKENS) % 6
    sae, x, y = noisy_world
    sae.decoder_weight.requires_grad_(False)[:] *= 0.2  # rec is small: every dense slope is defined
    found = by_source(sae, x, y, groups=groups)["pruned"]["standard_error"]
    z, weights = latents_of(sae, x), (sae.decoder_weight.numpy(), sae.decoder_bias.detach().numpy())

    def scaling(kept):
        of = [identity.slopes(z[kept], *weights, target[kept].numpy()) for target in (x, y)]
        return of[1] / of[0]

    expected = identity.jackknife(groups.numpy(), scaling)
    known = found.notna().to_numpy()
    assert known.sum() > 30
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-3)
    few = by_source(sae, x, y, groups=torch.arange(TOKENS) % 4)
    assert few["pruned"]["standard_error"].isna().all()  # four documents tell too little
    pd.testing.assert_series_equal(
        few["pruned"]["alone"], by_source(sae, x, y)["pruned"]["alone"], rtol=1e-4
    )


def test_scaling_reports_what_became_of_every_direction():
    sae, strengths, directions = orthogonal_world()
    scales = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.1] * 2)
    found = by_source(sae, strengths @ directions, (strengths * scales) @ directions)
    np.testing.assert_allclose(found["dense"]["alone"], 1.0, atol=1e-6)
    np.testing.assert_allclose(found["dense"]["slope"], 1.0, atol=1e-5)
    np.testing.assert_allclose(found["pruned"]["alone"], scales, atol=1e-5)
    assert (found["pruned"]["reason"] == "").all()
    same = by_source(sae, strengths @ directions, strengths @ directions)
    for source in ("dense", "pruned", "null", "noise_isotropic"):
        np.testing.assert_allclose(same[source]["alone"], 1.0, atol=1e-6)
    for source in ("dense", "pruned"):  # exactly 1 without any group: no certainty from that
        assert same[source]["standard_error"].isna().all()


@pytest.mark.parametrize("degrees", [0, 15, 60, 90, 120])
def test_a_turned_direction_scales_by_the_cosine(degrees):
    """All directions turn towards dimensions that the dense world does not use."""
    sae, strengths, directions = orthogonal_world(width=6)
    wide = torch.cat([directions, torch.zeros(6, 6)], dim=1)
    aside = torch.cat([torch.zeros(6, 6), random_rotation(6, seed=3)], dim=1)
    sae = sae_of(wide, torch.zeros(6), wide, 6)
    angle = math.radians(degrees)
    turned = math.cos(angle) * wide + math.sin(angle) * aside
    found = by_source(sae, strengths @ wide, strengths @ turned)["pruned"]
    np.testing.assert_allclose(found["alone"], math.cos(angle), atol=1e-5)


def test_noise_leaves_the_scaling_at_one_and_other_tokens_at_nothing_within_the_error():
    sae, strengths, directions = orthogonal_world(width=32, tokens=4000)
    dense = strengths @ directions
    found = by_source(sae, dense, dense + 0.5 * random(4000, 32, seed=9))
    truths = {"pruned": 1.0, "null": 1.0, "noise_isotropic": 1.0, "unpaired": 0.0}
    for source, truth in truths.items():
        errors = (found[source]["alone"] - truth) / found[source]["standard_error"]
        assert errors.abs().max() < 4.5, source
        assert 0.5 < (errors**2).mean() < 2.0, f"{source}: the error is of the stated size"


def test_interference_is_what_the_docstring_says():
    """Two oblique latents that fire together: the fate of one shows in the other's slope."""
    cosine = 0.6
    rows = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
    sae = sae_of(torch.linalg.inv(rows).T, torch.zeros(2), rows, 2)  # finds the strengths exactly
    first = 0.5 + uniform(3000, seed=0)
    second = first + 0.2 * uniform(3000, seed=1)
    strengths = torch.stack([first, second], dim=1)
    found = by_source(sae, strengths @ rows, (strengths * torch.tensor([1.0, 0.0])) @ rows)
    covariance = np.cov(strengths.double().numpy().T)
    expected = 1 - cosine * covariance[0, 1] / covariance[0, 0]
    assert found["pruned"]["alone"][0] == pytest.approx(expected, abs=1e-4)
    assert found["pruned"]["alone"][1] == pytest.approx(0.0, abs=1e-4)
    limits = found["unpaired"]
    assert abs(limits["alone"][0] - (expected - 1)) < 5 * limits["standard_error"][0]


def test_scaling_does_not_depend_on_order_or_on_the_length_of_rows(noisy_world):
    sae, x, y = noisy_world
    plain = by_source(sae, x, y)
    order, scale = shuffled(LATENTS), 0.5 + uniform(LATENTS, 1, seed=1)
    with torch.no_grad():
        other = permuted(sae, order)
        other.decoder_bias.copy_(sae.decoder_bias)
    for source, part in by_source(other, x, y).items():
        np.testing.assert_allclose(part["slope"], plain[source]["slope"][order.numpy()], atol=1e-5)
    sae, strengths, directions = orthogonal_world(width=8)
    dense, pruned = strengths @ directions, (0.3 * strengths) @ directions
    longer = sae_of(directions / scale[:8], torch.zeros(8), directions * scale[:8], 8)
    found = by_source(longer, dense, pruned)
    np.testing.assert_allclose(found["pruned"]["slope"], 0.3, atol=1e-5)


def test_an_undefined_scaling_is_nan_with_its_reason():
    sae, strengths, directions = orthogonal_world(width=6, turned=False)
    strengths[:, 0] = 0.0  # dead
    strengths[9:, 1] = 0.0  # too rare
    strengths[:9, 1] = 1.0
    with torch.no_grad():
        sae.decoder_weight[2] = sae.decoder_weight[0]  # writes where nothing of the kind is
        sae.decoder_weight[3] = 0.0
    dense = strengths @ directions
    found = by_source(sae, dense, dense + 0.1 * random(3000, 6, seed=1))
    reasons = found["pruned"]["reason"]
    assert "fewer than 10 dense firings" in reasons[0]
    assert "fewer than 10 dense firings" in reasons[1]
    assert reasons[2].startswith("scaling: its joint fit to dense is below 0.1; alone: its slope")
    assert "row is zero" in reasons[3]
    assert (reasons[4:] == "").all()
    for source, part in found.items():
        for column in ("scaling", "alone", "standard_error")[: 2 if source == "dense" else 3]:
            assert part[column].isna().tolist() == [True] * 4 + [False] * 2
    assert found["dense"]["slope"].isna().tolist() == [True, True, False, True, False, False]
    assert found["dense"]["dense_firings"][1] == 9


def test_an_activation_that_never_varies_has_no_slope():
    sae = sae_of(torch.zeros(2, 3), torch.tensor([0.7, 0.1]), torch.eye(3)[:2], 2)
    x = random(300, 3, seed=0)
    found = by_source(sae, x, x)["pruned"]
    assert found["alone"].isna().all()
    assert found["reason"].str.contains("never varies").all()


def test_no_standard_error_where_all_firings_are_in_one_group_of_documents():
    sae, strengths, directions = orthogonal_world(width=6, turned=False)
    strengths[150:, 0] = 0.0  # the first of 20 groups of 3000 tokens
    dense = strengths @ directions
    found = by_source(sae, dense, dense + 1e-3 * random(3000, 6, seed=1))["pruned"]
    assert found["alone"][0] == pytest.approx(1.0, abs=1e-2)
    assert np.isnan(found["standard_error"][0])
    assert found["standard_error"][1:].notna().all()


def test_scaling_is_reproducible(noisy_world):
    first, second = (by_source(*noisy_world) for _ in range(2))
    for source, part in first.items():
        pd.testing.assert_frame_equal(part, second[source])


def test_scaling_summary_is_over_what_is_defined():
    parts = [
        pd.DataFrame({"source": source, "scaling": values})
        for source, values in {
            "dense": [1.0, 1.0, np.nan],
            "pruned": [0.2, 0.9, np.nan],
            "null": [0.6, 0.8, np.nan],
            "noise_isotropic": [-0.5, -0.1, np.nan],
            "unpaired": [np.nan, np.nan, np.nan],
        }.items()
    ]
    summary = scaling_summary(pd.concat(parts)).set_index("source")
    columns = ["mean_scaling", "median_scaling", "share_above_half_median", "num_undefined"]
    assert list(summary) == columns
    assert summary.loc["pruned"].tolist() == pytest.approx([0.55, 0.55, 0.5, 1])
    assert summary.loc["noise_isotropic"].isna().tolist() == [False, False, True, False]
    assert summary.loc["unpaired"].isna().tolist() == [True, True, True, False]
    assert summary["num_undefined"].tolist() == [1, 1, 1, 1, 3]


def test_a_common_gain_scales_every_latent_and_is_not_survival():
    sae, strengths, directions = orthogonal_world()
    dense = strengths @ directions
    louder = by_source(sae, dense, 1.7 * dense)["pruned"]
    np.testing.assert_allclose(louder[["scaling", "alone"]], 1.7, atol=1e-4)
    scales = torch.tensor([1.0, 0.0, 0.4, 2.0, -1.0, 0.9] * 2)
    shares = []
    for gain in (1.0, 1.7):
        pruned = gain * (strengths * scales) @ directions
        summary = scaling_summary(scaling_of(sae, dense, pruned)).set_index("source").loc["pruned"]
        shares.append(summary["share_above_half_median"])
        assert summary["mean_scaling"] == pytest.approx(gain * scales.mean().item(), abs=1e-4)
    assert shares == [4 / 6, 4 / 6]


def test_on_a_pure_gain_the_null_and_the_noise_are_the_gain_and_nothing_else():
    sae, strengths, directions = orthogonal_world()
    dense = strengths @ directions
    found = by_source(sae, dense, 1.5 * dense + 0.25)
    for source in ("pruned", "null", "noise_isotropic"):
        np.testing.assert_allclose(found[source][["scaling", "alone"]], 1.5, atol=1e-4)
    assert found["unpaired"]["alone"].abs().max() < 0.3


def planted_by_rate(seed, *, gain=1.5, rarest_left=1.0, width=32, tokens=4000):
    """Directions that fire at rates from 0.004 to 0.2, with a gain, gains per dimension and noise
    of heavy tails; of the rarest half `rarest_left` is left."""
    rates = torch.logspace(math.log10(0.004), math.log10(0.2), width)[shuffled(width, seed)]
    strengths = sparse_strengths(tokens, width, rate=rates, seed=seed)
    directions = random_rotation(width, seed=seed)
    left = torch.where(rates < rates.median(), rarest_left, 1.0)
    noise = random(tokens, width, seed=seed + 100) * uniform(tokens, 1, seed=seed + 300).pow(-0.3)
    scale = gain * (0.8 + 0.4 * uniform(width, seed=seed + 200))
    sae = sae_of(directions, torch.zeros(width), directions, width)
    return sae, strengths @ directions, (strengths * left) @ directions * scale + 0.3 * noise, rates


@pytest.mark.parametrize("rarest_left", [1.0, 0.5])
def test_scaling_under_the_null_is_the_gain_whatever_the_rate_and_whatever_was_lost(rarest_left):
    """Where rare latents did lose, `pruned` says so and the null says nothing still."""
    slopes, off = {"pruned": [], "null": []}, []
    for seed in range(10, 20):
        sae, dense, pruned, rates = planted_by_rate(seed, rarest_left=rarest_left)
        half = torch.arange(len(dense)).chunk(2)
        change = fit_common_change(Rows(dense), Rows(pruned), half[0], seed=seed)
        table = scaling_of(sae, dense, pruned, half[1], change=change)
        for source, found in slopes.items():
            scaling = table.loc[table["source"] == source, "scaling"].to_numpy()
            known = np.isfinite(scaling)
            assert known.mean() > 0.9
            found.append(np.polyfit(np.log(rates.numpy()[known]), scaling[known], 1)[0])
        off.append(np.nanmean(scaling) - change.gain)
    null = mean_over(slopes["null"], "worlds")
    assert null.low < 0 < null.high and null.error < 0.02
    gain = mean_over(off, "worlds")
    assert gain.low < 0 < gain.high and gain.error < 0.02
    pruned = mean_over(slopes["pruned"], "worlds")
    assert pruned.low > 0.1 if rarest_left < 1 else pruned.low < 0 < pruned.high


def test_matching_by_activations_is_the_same_under_the_null_where_pruning_is_noise_alone():
    """And where it took features away it is less than under the null."""
    sae, strengths, directions = orthogonal_world(width=24)
    dense, noise = strengths @ directions, 0.25 * random(3000, 24, seed=3)
    tokens, left = torch.arange(3000), torch.ones(24)
    rates = {}
    for lost in (0, 3):
        left[:lost] = 0.0
        pruned = (strengths * left) @ directions * 1.5 + noise
        change = fit_common_change(Rows(dense), Rows(pruned), tokens)
        null = NullRows(Rows(dense), Rows(pruned), change, tokens)
        series = [latent_series(sae, rows, tokens) for rows in (Rows(dense), Rows(pruned), null)]
        found = [match_activations(series[0], other, lowest_tau=0.5) for other in series[1:]]
        rates[lost] = [match_rates(each, 0.7).mnn for each in found]
    assert rates[0][0] == rates[0][1] == 1.0
    assert rates[3][0] == 21 / 24 and rates[3][1] > 23 / 24 - 1e-9


# ---- subspaces ----


def overlaps(a, b):
    left, right = (Dictionary(rows, torch.ones(rows.shape[1]), 3, 4) for rows in (a, b))
    return subspace_overlaps([Comparison("any", left, right)])["overlap"].to_numpy()


@pytest.mark.parametrize("width", [6, 32])
def test_overlap_equals_a_least_squares_fit(width, monkeypatch):
    a, b = random(50, width, seed=0), random(60, width, seed=1)
    b[7] = 1e-3 * b[7]  # lengths do not matter
    expected = [identity.subspace_overlap(row, b.numpy().astype(float)) for row in a.numpy()]
    found = overlaps(a, b)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    monkeypatch.setattr(subspace_module, "BLOCK_ROWS", 7)
    np.testing.assert_allclose(overlaps(a, b), found, atol=1e-12)
    np.testing.assert_allclose(overlaps(a, b[shuffled(60)]), found, atol=1e-12)


def test_overlap_names_its_comparison():
    a, b = (
        Dictionary(random(5, 8, seed=s), torch.ones(8), init_seed=s, data_seed=s + 1)
        for s in (0, 10)
    )
    table = subspace_overlaps([Comparison("one", a, b), Comparison("two", b, a)])
    columns = ["arm", "init_a", "order_a", "init_b", "order_b", "latent", "overlap"]
    assert list(table) == columns
    assert table["arm"].tolist() == ["one"] * 5 + ["two"] * 5
    seeds = table.loc[5:, columns[1:5]].drop_duplicates()
    assert seeds.to_numpy().tolist() == [[10, 11, 0, 1]]
    assert table["latent"].tolist() == [*range(5)] * 2


def test_a_split_direction_lies_in_the_span_of_its_halves_and_half_of_a_pair_in_their_sum():
    eye = torch.eye(12)
    feature, aside = eye[0], eye[1]
    halves = torch.stack([0.8 * feature + 0.6 * aside, 0.8 * feature - 0.6 * aside])
    others = eye[4:]
    split = overlaps(feature[None], torch.cat([halves, others]))
    assert split == pytest.approx([1.0])
    merged = torch.cat([(eye[0] + eye[1])[None], others])
    assert overlaps(eye[:2], merged) == pytest.approx([0.5, 0.5])
    assert overlaps(merged[:1], torch.cat([eye[:2], others])) == pytest.approx([1.0])
    assert overlaps(eye[2:3], torch.cat([halves, others])) == pytest.approx([0.0])


def test_overlap_is_at_least_the_squared_cosine_of_the_best_match_and_one_for_a_copy():
    a, b = random(80, 16, seed=0), random(90, 16, seed=1)
    cosines = matching.cosines(a.numpy(), b.numpy())
    assert (overlaps(a, b) >= (cosines**2).max(1) - 1e-6).all()
    assert (overlaps(a, b) <= 1.0).all()
    np.testing.assert_allclose(overlaps(a, a[shuffled(80)]), 1.0, atol=1e-6)
    np.testing.assert_allclose(overlaps(a, -3.0 * a), 1.0, atol=1e-6)


@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-6])
def test_copies_of_one_direction_span_one_dimension(apart):
    """What tells the copies apart is rounding; it must not count as directions of their own."""
    direction = normalize(random(16, seed=0), dim=0)
    copies = direction + apart * random(4, 16, seed=1)
    rows = direction + random(30, 16, seed=2) / 4
    cosines = normalize(rows, dim=1) @ direction
    np.testing.assert_allclose(overlaps(rows, copies), cosines.square(), atol=1e-5)


def test_rows_that_are_nearly_but_not_quite_parallel_span_a_plane():
    direction, aside = torch.eye(8)[0], torch.eye(8)[1]
    pair = torch.stack([direction, direction + 0.01 * aside])
    assert overlaps((direction + aside)[None], pair) == pytest.approx([1.0], abs=1e-4)


def test_a_row_of_zeros_has_no_overlap_and_spans_nothing():
    a = torch.cat([torch.zeros(1, 5), torch.eye(5)])
    assert np.isnan(overlaps(a, torch.eye(5))).tolist() == [True] + [False] * 5
    assert overlaps(torch.eye(5), torch.zeros(2, 5)) == pytest.approx([0.0] * 5)
    for number in range(1, 4):  # a dictionary smaller than the subspace
        found = overlaps(torch.eye(5), torch.eye(5)[:number])
        assert found == pytest.approx([1.0] * number + [0.0] * (5 - number))


def test_more_directions_to_choose_from_overlap_more_by_chance():
    """Why a value is read beside the `chance` arm."""
    means = [overlaps(random(100, 16, seed=0), random(n, 16, seed=1)).mean() for n in (8, 64, 512)]
    assert all(low < high for low, high in itertools.pairwise(means))
    assert means[-1] > 0.5


def test_joint_scaling_equals_one_regression_on_all_latents(noisy_world, monkeypatch):
    sae, x, y = noisy_world
    sae.decoder_weight.requires_grad_(False)[:] *= 0.2  # every dense slope is defined
    monkeypatch.setattr(scaling_module, "JOINT_RESIDUAL", 1e-7)
    monkeypatch.setattr(scaling_module, "JOINT_STEPS", 200)
    monkeypatch.setattr(scaling_module, "BATCH_TOKENS", 512)
    z, decoder = latents_of(sae, x), sae.decoder_weight.double().numpy()
    dense, pruned = (identity.joint_scales(z, decoder, t.double().numpy()) for t in (x, y))
    found = by_source(sae, x, y)
    known = found["pruned"]["scaling"].notna().to_numpy()
    assert known.sum() > 30
    np.testing.assert_allclose(
        found["pruned"]["scaling"][known], pruned[known] / dense[known], atol=1e-4
    )
    np.testing.assert_array_equal(known, found["pruned"]["alone"].notna())


def test_an_unsolved_source_has_no_scaling_and_says_so(noisy_world, monkeypatch):
    """With no steps allowed only what starts solved, at all ones, is solved."""
    monkeypatch.setattr(scaling_module, "JOINT_STEPS", 0)
    sae, strengths, directions = orthogonal_world()
    found = by_source(sae, strengths @ directions, (0.5 * strengths) @ directions)
    assert (found["dense"]["scaling"] == 1.0).all()
    assert found["pruned"]["scaling"].isna().all()
    assert found["pruned"]["alone"].notna().all()
    assert found["pruned"]["reason"].str.contains("unsolved after 0 steps").all()
    same = by_source(sae, strengths @ directions, strengths @ directions)["pruned"]
    assert (same["scaling"] == 1.0).all()
    assert (same["reason"] == "").all()
    monkeypatch.setattr(scaling_module, "JOINT_STEPS", 2)
    assert all(part["scaling"].isna().all() for part in by_source(*noisy_world).values())


def test_scaling_and_alone_are_each_guarded_by_their_own_divisor():
    """Two oblique latents fire together, and the fate of the second shows in the first's slope.

    In one world that makes up for all of the first, which is there; in the other it stands in for
    the first, which is missing.
    """
    cosine = 0.6
    rows = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
    first = 0.5 + uniform(3000, seed=0)
    strengths = torch.stack([first, first + 0.2 * uniform(3000, seed=1)], dim=1)
    # Latents are read from two dimensions of their own, whose decoder rows say nothing of them.
    encoder, decoder = torch.eye(2, 4), torch.cat([torch.zeros(2, 2), rows], dim=1)
    sae = sae_of(encoder, torch.zeros(2), decoder, 2)

    def found_with(scales):
        world = torch.cat([strengths, (strengths * torch.tensor(scales).float()) @ rows], dim=1)
        return by_source(sae, world, world)["pruned"]

    z = strengths.double().numpy()
    covariance = np.cov(z.T)
    leak = cosine * covariance[0, 1] / covariance[0, 0]  # of the second in the first's slope
    no_slope = found_with([1.0, 1 - 1 / leak])
    assert no_slope["slope"][0] == pytest.approx(0.0, abs=1e-3)
    assert np.isnan(no_slope["alone"][0])
    assert np.isnan(no_slope["standard_error"][0])
    assert no_slope["scaling"][0] == pytest.approx(1.0, abs=1e-3)
    assert no_slope["reason"][0] == "alone: its slope on dense is below 0.1"
    missing = found_with([0.0, 1 + 1 / leak])
    assert missing["slope"][0] == pytest.approx(1.0, abs=1e-3)
    assert np.isnan(missing["scaling"][0])
    assert missing["alone"][0] == pytest.approx(1.0, abs=1e-3)
    assert missing["reason"][0] == "scaling: its joint fit to dense is below 0.1"
    assert (missing["scaling"][1], missing["reason"][1]) == (pytest.approx(1.0, abs=1e-3), "")


def test_joint_scaling_is_free_of_interference():
    cosine = 0.6
    rows = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
    sae = sae_of(torch.linalg.inv(rows).T, torch.zeros(2), rows, 2)
    first = 0.5 + uniform(3000, seed=0)
    strengths = torch.stack([first, first + 0.2 * uniform(3000, seed=1)], dim=1)
    found = by_source(sae, strengths @ rows, (strengths * torch.tensor([1.0, 0.0])) @ rows)
    assert found["pruned"]["alone"][0] < 0.6
    np.testing.assert_allclose(found["pruned"]["scaling"], [1.0, 0.0], atol=1e-3)
    np.testing.assert_allclose(found["dense"]["scaling"], 1.0, atol=1e-6)
    errors = found["unpaired"]["scaling"] / found["unpaired"]["standard_error"]
    assert errors.abs().max() < 5


# ---- other devices ----


def test_entries_are_ordered_alike_by_either_sort():
    """A GPU, or an SAE of very many latents, sorts with PyTorch; the CPU with numpy."""
    flat = torch.randint(LATENTS, (5000,), generator=torch.Generator().manual_seed(0))
    by_numpy = pattern.order_by_latent(flat, LATENTS)
    by_torch = pattern.order_by_latent(flat, pattern._NUM_RADIX_KEYS + 1)
    assert torch.equal(by_numpy, by_torch)
    assert torch.equal(by_numpy, torch.tensor(sorted(range(5000), key=flat.tolist().__getitem__)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scaling_on_a_gpu_equals_scaling_on_the_cpu(noisy_world):
    sae, x, y = noisy_world
    on_cpu = by_source(sae, x, y)
    on_gpu = by_source(sae.to("cuda"), x.cuda(), y.cuda())
    for source, part in on_cpu.items():
        other = on_gpu[source]
        assert part["reason"].tolist() == other["reason"].tolist()
        np.testing.assert_allclose(other["slope"], part["slope"], atol=1e-3)
        np.testing.assert_allclose(other["scaling"], part["scaling"], rtol=2e-2, atol=2e-2)
