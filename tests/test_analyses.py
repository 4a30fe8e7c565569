import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tests.independent import matching

from prunelens.analyses.noise import other_token
from prunelens.analyses.persistence import persistence, persistence_summary
from prunelens.analyses.stability import seed_stability
from prunelens.analyses.statistics import fisher_z, interval_over_seeds
from prunelens.analyses.survival import (
    Dictionary,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)
from prunelens.sae.topk import TopKSAE

TAUS = (0.5, 0.7, 0.9)


def dictionary(init_seed, data_seed, content=None, latents=40, width=12):
    content = 1000 * init_seed + data_seed if content is None else content
    generator = torch.Generator().manual_seed(content)
    rows = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
    sigma = torch.rand(width, generator=generator) + 0.5
    return Dictionary(rows, sigma, init_seed, data_seed)


def test_stability_compares_every_pair_of_seeds_and_equals_brute_force():
    decoders = {s: dictionary(s, s).decoder for s in (2, 0, 1)}
    table = seed_stability(decoders, TAUS)
    assert list(table.columns) == ["seed_a", "seed_b", "tau", "one_way", "mnn", "greedy"]
    assert set(zip(table["seed_a"], table["seed_b"], strict=True)) == {(0, 1), (0, 2), (1, 2)}
    for row in table.itertuples():
        c = matching.cosines(decoders[row.seed_a].numpy(), decoders[row.seed_b].numpy())
        assert row.mnn == matching.mnn(c, row.tau)


def test_arms_compare_what_methods_say():
    seeds = (0, 1, 2)
    dense = [dictionary(s, s) for s in seeds]
    pruned = [dictionary(s, s, content=s + 50) for s in seeds]
    named = [
        *pruned_arms(dense, pruned, [dictionary(0, 1)]),
        *control_arms(dense, [dictionary(0, 1)], [dictionary(0, 1)], dense),
    ]
    found = {}
    for comparison in named:
        a, b = comparison.a, comparison.b
        found.setdefault(comparison.arm, set()).add(
            (a.init_seed, a.data_seed, b.init_seed, b.data_seed)
        )
    ordered = {(s, s, t, t) for s, t in itertools.permutations(seeds, 2)}
    assert found == {
        "shared_init": {(s, s, s, s) for s in seeds},
        "shared_start": {(0, 0, 0, 1)},
        "cross_init": ordered,
        "ceiling_shared": {(0, 0, 0, 1)},
        "floor_shared": {(0, 0, 0, 1)},
        "ceiling_cross": ordered,
        "chance": ordered,
    }


def test_nothing_changed_survives_whole_and_raw_coordinates_use_sigma():
    a = dictionary(0, 0)
    result = survival(pruned_arms([a], [a], []), TAUS)
    assert (result.rates[["one_way", "mnn", "greedy", "one_way_reverse"]] == 1.0).all().all()
    assert (result.latents["match"] == result.latents["latent"]).all()
    b = dictionary(0, 0, content=9)
    rates = survival(pruned_arms([a], [b], []), (0.5,)).rates
    raw = rates[rates["coordinates"] == "raw"].iloc[0]
    c = matching.cosines((a.decoder * a.sigma).numpy(), (b.decoder * b.sigma).numpy())
    assert raw["mnn"] == matching.mnn(c, 0.5)


def rates_table(rows):
    columns = ["arm", "init_a", "init_b", "mnn"]
    return pd.DataFrame(rows, columns=columns).assign(coordinates="normalised", tau=0.7)


def test_corrected_survival_is_between_floor_and_ceiling():
    pruned = rates_table(
        [("shared_start", 0, 0, 0.6), ("cross_init", 0, 1, 0.2), ("cross_init", 1, 0, 0.3)]
    )
    controls = rates_table(
        [
            ("floor_shared", 0, 0, 0.2),
            ("ceiling_shared", 0, 0, 1.0),
            ("chance", 0, 1, 0.0),
            ("chance", 1, 0, 0.1),
            ("ceiling_cross", 0, 1, 0.4),
            ("ceiling_cross", 1, 0, 0.4),
        ]
    )
    table = corrected_survival(pruned, controls).set_index("arm")
    assert table.loc["shared", "corrected"] == pytest.approx(0.5)
    assert table.loc["shared", "interval"] == "range"
    assert table.loc["cross", "corrected"] == pytest.approx((0.2 + 0.2) / (0.4 + 0.3))
    assert table.loc["cross", "low"] == pytest.approx(0.5)
    assert table.loc["cross", "high"] == pytest.approx(2 / 3)
    assert (table["reason"] == "").all()


def test_corrected_survival_without_room_is_nan_with_a_reason():
    pruned = rates_table([("shared_start", 0, 0, 0.6), ("cross_init", 0, 1, 0.001)])
    controls = rates_table(
        [
            ("floor_shared", 0, 0, 0.985),
            ("ceiling_shared", 0, 0, 1.0),
            ("chance", 0, 1, 0.0),
            ("ceiling_cross", 0, 1, 0.01),
        ]
    )
    table = corrected_survival(pruned, controls)
    assert table["corrected"].isna().all()
    assert table["low"].isna().all()
    assert table["reason"].str.contains("is below 0.02").all()


def test_interval_is_a_range_below_five_seeds_and_a_bootstrap_from_five_on():
    values = np.array([0.1, 0.4, 0.2, 0.3, 0.5, 0.35])

    def mean(weights):
        return float(np.average(values[: len(weights)], weights=weights))

    few = interval_over_seeds([(s,) for s in range(4)], mean)
    assert (few.low, few.high, few.kind) == (0.1, 0.4, "range")
    many = interval_over_seeds([(s,) for s in range(6)], mean)
    assert many.kind == "bootstrap"
    generator = np.random.default_rng(1)
    means = [generator.choice(values, 6).mean() for _ in range(4000)]
    expected = np.percentile(means, (2.5, 97.5))
    assert (many.low, many.high) == pytest.approx(expected, abs=0.015)
    assert many == interval_over_seeds([(s,) for s in range(6)], mean)


def test_fisher_z_stays_finite():
    assert np.isfinite(fisher_z(np.array([-1.0, 0.0, 1.0]))).all()


class Rows:
    """Rows in memory."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, index):
        return self._rows[index]


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(700, 10, generator=generator)
    pruned = dense + 0.4 * torch.randn(700, 10, generator=generator)
    sae = TopKSAE.initialise(10, 30, 4, init_seed=0)
    return SimpleNamespace(sae=sae, dense=dense, pruned=pruned, tokens=torch.arange(100, 700))


def slow_persistence(sae, dense, disturbed):
    """From the definitions: dense latent matrices, numpy's own correlation."""
    a = sae.dense_latents(sae.encode(dense)).detach().double().numpy()
    b = sae.dense_latents(sae.encode(disturbed)).detach().double().numpy()
    correlation, jaccard = [], []
    for one, two in zip(a.T, b.T, strict=True):
        if (one > 0).sum() < 10:
            correlation.append(np.nan)
            jaccard.append(np.nan)
            continue
        correlation.append(np.corrcoef(one, two)[0, 1] if (two > 0).any() else 0.0)
        jaccard.append(((one > 0) & (two > 0)).sum() / ((one > 0) | (two > 0)).sum())
    return np.array(correlation), np.array(jaccard)


def test_persistence_equals_the_slow_definition(world, monkeypatch):
    monkeypatch.setattr("prunelens.analyses.persistence.BATCH_TOKENS", 128)
    table = persistence(world.sae, Rows(world.dense), Rows(world.pruned), world.tokens, seed=3)
    pruned = table[table["source"] == "pruned"]
    correlation, jaccard = slow_persistence(world.sae, world.dense[100:], world.pruned[100:])
    np.testing.assert_allclose(pruned["correlation"], correlation, atol=1e-6)
    np.testing.assert_allclose(pruned["jaccard"], jaccard, atol=1e-12)


def test_shuffled_noise_equals_the_slow_definition_over_its_draws(world, monkeypatch):
    monkeypatch.setattr("prunelens.analyses.persistence.BATCH_TOKENS", 250)
    table = persistence(world.sae, Rows(world.dense), Rows(world.pruned), world.tokens, seed=3)
    found = table[table["source"] == "noise_shuffled"]
    draws = []
    for draw in range(3):
        generator = torch.Generator().manual_seed(3000 + draw)
        other = world.tokens[other_token(len(world.tokens), generator)]
        shuffled = world.dense[100:] + world.pruned[other] - world.dense[other]
        draws.append(slow_persistence(world.sae, world.dense[100:], shuffled))
    correlation, jaccard = np.mean(draws, axis=0)
    np.testing.assert_allclose(found["correlation"], correlation, atol=1e-5)
    np.testing.assert_allclose(found["jaccard"], jaccard, atol=1e-3)


def test_persistence_without_pruning_is_one_for_pruned_and_for_noise_of_no_size(world):
    table = persistence(world.sae, Rows(world.dense), Rows(world.dense), world.tokens, seed=0)
    known = table.dropna(subset="correlation")
    assert len(known) > 30
    np.testing.assert_allclose(known["correlation"], 1.0, atol=1e-6)
    assert (known["jaccard"] == 1.0).all()
    assert not table["silenced"].any()


def test_noise_has_the_size_of_the_difference_and_excess_is_zero_for_noise(world):
    """The 'pruned' activations here are isotropic noise themselves: nothing exceeds the control."""
    table = persistence(world.sae, Rows(world.dense), Rows(world.pruned), world.tokens, seed=1)
    summary = persistence_summary(table).set_index("source")
    pruned, noise = summary["mean_correlation"][["pruned", "noise_isotropic"]]
    assert abs(pruned - noise) < 0.03
    assert abs(summary.loc["noise_isotropic", "excess_z"]) < 0.15
    assert np.isnan(summary.loc["pruned", "excess_z"])


def test_harm_along_a_latent_exceeds_the_noise(world):
    """Removing the features' own directions hurts more than noise of equal size."""
    basis = torch.linalg.qr(world.sae.decoder_weight.detach()[:5].T).Q
    pruned = world.dense - world.dense @ basis @ basis.T
    table = persistence(world.sae, Rows(world.dense), Rows(pruned), world.tokens, seed=1)
    first = table[table["latent"] < 5].groupby("source")["correlation"].mean()
    assert first["pruned"] < first["noise_isotropic"] - 0.2


def test_a_silenced_latent_counts_as_zero_and_a_rare_one_as_undefined(world):
    direction = world.sae.decoder_weight.detach()[0]
    pruned = world.dense.clone()
    pruned[:] = -5 * direction + 0.01 * world.dense
    table = persistence(world.sae, Rows(world.dense), Rows(pruned), world.tokens, seed=1)
    row = table[(table["source"] == "pruned") & (table["latent"] == 0)].iloc[0]
    assert row["silenced"]
    assert row["correlation"] == 0.0
    few = persistence(world.sae, Rows(world.dense), Rows(world.pruned), world.tokens[:12], seed=1)
    summary = persistence_summary(few).set_index("source")
    assert (
        summary.loc["pruned", "num_undefined"]
        == (few[few["source"] == "pruned"]["dense_firings"] < 10).sum()
    )
    assert summary.loc["pruned", "num_undefined"] > 0


def test_persistence_is_reproducible(world):
    first, second = (
        persistence(world.sae, Rows(world.dense), Rows(world.pruned), world.tokens, seed=1)
        for _ in range(2)
    )
    pd.testing.assert_frame_equal(first, second)
