import numpy as np
import pandas as pd
import pytest
from tests.independent import statistics as slow

from prunelens.analyses.fragility import (
    MATCHED,
    UNMATCHED,
    fragility_tests,
    holm,
    quintiles,
    quintiles_by_seed,
)
from prunelens.analyses.statistics import exact_spearman

TAUS = (0.5, 0.7)


def fates(num_latents=60, seeds=(0, 1, 2), seed=0):
    """Random latents: some dead, some without a persistence, `shared_start` for seed 0 alone."""
    generator = np.random.default_rng(seed)
    parts = []
    for s in seeds:
        rate = np.round(generator.uniform(0, 0.2, num_latents), 2)  # ties, and some zeros
        columns = {
            "seed": s,
            "latent": np.arange(num_latents),
            "firing_rate": rate,
            "firing_rate_first_half": np.round(rate * generator.uniform(0.5, 1, num_latents), 2),
            "init_retention": generator.uniform(0.3, 1, num_latents) - rate,
        }
        for arm in MATCHED:
            absent = arm == "shared_start" and s != 0
            cosine = 0.9 - 2 * rate + 0.2 * generator.normal(size=num_latents)
            columns[f"cosine_{arm}"] = np.nan if absent else cosine
            columns[f"mutual_{arm}"] = np.nan if absent else generator.random(num_latents) < 0.8
        z = 1 + 3 * rate + 0.3 * generator.normal(size=num_latents)
        z[generator.random(num_latents) < 0.1] = np.nan
        columns |= {"persistence": np.tanh(z), "persistence_z": z}
        for noise in ("isotropic", "shuffled"):
            columns[f"persistence_z_noise_{noise}"] = z - generator.normal(size=num_latents)
            columns[f"persistence_noise_{noise}"] = generator.uniform(0, 1, num_latents)
        columns["scaling"] = 1 - rate + 0.1 * generator.normal(size=num_latents)
        parts.append(pd.DataFrame(columns).astype({f"mutual_{arm}": float for arm in MATCHED}))
    return pd.concat(parts, ignore_index=True)


def rate_and_value(row, measure, tau):
    """From the definitions, for one latent: (rate that sorts, value or None)."""
    if measure in MATCHED:
        if np.isnan(row[f"cosine_{measure}"]):
            return row["firing_rate"], None
        hit = row[f"mutual_{measure}"] == 1 and row[f"cosine_{measure}"] >= tau
        return row["firing_rate"], float(hit)
    kind, _, noise = measure.partition("_")
    value = row[kind] if kind in ("persistence", "scaling") else None
    if kind == "excess":
        value = row["persistence_z"] - row[f"persistence_z_noise_{noise}"]
    if kind == "relative":
        left = row[f"persistence_noise_{noise}"]
        value = np.nan if left < 0.1 else min(max(row["persistence"] / left, 0), 1)
    return row["firing_rate_first_half"], None if np.isnan(value) else value


def alive_latents(table, measure, tau):
    """seed -> list of (rate, latent, value, init_retention) in quintile order."""
    found = {}
    for row in table.to_dict("records"):
        rate, value = rate_and_value(row, measure, tau)
        if rate > 0:
            entry = (rate, row["latent"], value, row["init_retention"])
            found.setdefault(row["seed"], []).append(entry)
    return {seed: sorted(entries, key=lambda e: e[:2]) for seed, entries in found.items()}


def slow_quintiles(table, measure, tau):
    """quintile -> (rate, survival, count)."""
    rates, values, counts = ([[] for _ in range(5)] for _ in range(3))
    for entries in alive_latents(table, measure, tau).values():
        for q in range(5):
            part = [e for p, e in enumerate(entries) if 5 * p // len(entries) == q]
            part = [e for e in part if e[2] is not None]
            if part:
                rates[q].append(np.mean([e[0] for e in part]))
                values[q].append(np.mean([e[2] for e in part]))
                counts[q].append(len(part))
    return {q + 1: (np.mean(rates[q]), np.mean(values[q]), sum(counts[q])) for q in range(5)}


def test_quintiles_equal_the_slow_definition_for_every_measure():
    table = fates()
    found = quintiles(table, TAUS)
    assert len(found) == 5 * (len(MATCHED) * 2 + len(UNMATCHED))
    for (measure, tau), part in found.groupby(["measure", "tau"], dropna=False):
        expected = slow_quintiles(table, measure, tau)
        for row in part.itertuples():
            numbers = (row.firing_rate, row.survival_rate, row.num_latents)
            assert numbers == pytest.approx(expected[row.quintile], abs=1e-12)


def test_quintile_sizes_differ_by_one_at_most_and_ties_go_by_index():
    table = fates(num_latents=13, seeds=(0,)).assign(firing_rate=0.1)
    table["mutual_shared_init"] = 1.0
    table["cosine_shared_init"] = np.where(table["latent"] < 3, 1.0, 0.0)
    found = quintiles(table, (0.7,)).query("measure == 'shared_init'")
    assert sorted(found["num_latents"]) == [2, 2, 3, 3, 3]
    first = found["num_latents"].iloc[0]
    assert found["survival_rate"].iloc[0] == 1.0
    assert found["survival_rate"].iloc[1] * found["num_latents"].iloc[1] == 3 - first
    assert (found["survival_rate"].iloc[2:] == 0).all()


def test_the_mean_over_seeds_of_quintiles_by_seed_is_quintiles():
    table = fates()
    keys = ["measure", "tau", "quintile"]
    by_seed = quintiles_by_seed(table, TAUS).groupby(keys, dropna=False)
    expected = quintiles(table, TAUS).set_index(keys).sort_index()
    means = by_seed["survival_rate"].mean().sort_index()
    np.testing.assert_allclose(means, expected["survival_rate"])
    assert by_seed["num_latents"].sum().sort_index().tolist() == expected["num_latents"].tolist()


@pytest.mark.parametrize("y", [(5, 4, 3, 2, 1), (1, 3, 2, 5, 4), (1, 1, 2, 3, 3), (2, 1, 1, 1, 1)])
def test_exact_p_counts_permutations(y):
    x = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    y = np.array(y, dtype=float)
    found = exact_spearman(x, y)
    assert found.rho == pytest.approx(slow.spearman(x, y))
    assert found.p == pytest.approx(slow.permutation_p(x, y))


def test_a_strict_order_has_two_of_120_and_rounding_makes_no_order():
    x = np.arange(5.0)
    assert exact_spearman(x, -x) == (-1.0, pytest.approx(2 / 120), "")
    third = np.array([0.3, 0.1 + 0.2, 0.3, 0.3, 0.3])  # one differs in its last bit
    assert np.isnan(exact_spearman(x, third).rho)


def test_rank_correlations_equal_hand_counted_ones():
    table = fates()
    found = fragility_tests(table, TAUS, draws=20).set_index(["measure", "tau"])
    assert len(found) == len(MATCHED) * 2 + len(UNMATCHED)
    for (measure, tau), row in found.iterrows():
        raw, partial = [], []
        for entries in alive_latents(table, measure, tau).values():
            known = [e for e in entries if e[2] is not None]
            if known:
                rate, _, value, retention = zip(*known, strict=True)
                raw.append(slow.spearman(rate, value))
                partial.append(slow.partial_spearman(rate, value, retention))
        assert row["latent_rho"] == pytest.approx(np.mean(raw), abs=1e-9)
        assert row["partial_rho"] == pytest.approx(np.mean(partial), abs=1e-9)
        quintile = slow_quintiles(table, measure, tau)
        rates, values = ([quintile[q][i] for q in range(1, 6)] for i in (0, 1))
        assert row["rho"] == pytest.approx(slow.spearman(rates, np.round(values, 12)))
        assert row["p_exact"] == pytest.approx(slow.permutation_p(rates, np.round(values, 12)))
        assert row["num_latents"] == sum(q[2] for q in quintile.values())
        one = measure == "shared_start"
        assert row["resampled"] == ("latents of one seed" if one else "seeds, latents within each")
        assert row["reason"] == ""


def test_the_interval_is_that_of_an_explicit_two_stage_bootstrap():
    table = fates(num_latents=50, seeds=(0, 1, 2, 3))
    table.loc[table["seed"] == 3, "persistence"] *= -1  # seeds disagree, so that seeds matter
    table["firing_rate_first_half"] += 0.01  # all alive
    table["persistence"] = table["persistence"].fillna(0.0)
    row = fragility_tests(table, (0.7,), draws=3000).set_index("measure").loc["persistence"]
    columns = ["firing_rate_first_half", "persistence", "init_retention"]
    seeds = [tuple(p[c].to_numpy() for c in columns) for _, p in table.groupby("seed")]
    generator = np.random.default_rng(5)
    raw, partial = slow.bootstrap_rank_correlation(seeds, 3000, generator)
    assert raw[1] - raw[0] > 0.2
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(raw, abs=0.05)
    assert (row["partial_low"], row["partial_high"]) == pytest.approx(partial, abs=0.05)


def test_weights_in_chunks_are_the_same_and_the_seed_decides(monkeypatch):
    table = fates()
    first = fragility_tests(table, TAUS, draws=50, seed=3)
    monkeypatch.setattr("prunelens.analyses.statistics.ranks._DRAWS_AT_A_TIME", 7)
    pd.testing.assert_frame_equal(first, fragility_tests(table, TAUS, draws=50, seed=3))
    other = fragility_tests(table, TAUS, draws=50, seed=4)
    assert not np.allclose(first["ci_low"], other["ci_low"])


def test_what_init_retention_explains_is_gone_from_the_partial_correlation():
    """Survival follows retention, retention follows rate: raw is strong, partial about 0."""
    table = fates(num_latents=1500, seeds=(0, 1))
    generator = np.random.default_rng(1)
    rate = generator.uniform(0.01, 0.2, len(table))
    retention = -np.log(rate) + generator.normal(size=len(table))
    survival = retention + generator.normal(size=len(table))
    table = table.assign(
        firing_rate_first_half=rate, init_retention=retention, persistence=survival
    )
    row = fragility_tests(table, (0.7,), draws=300).set_index("measure").loc["persistence"]
    assert row["ci_high"] < -0.3
    assert row["partial_low"] < 0.05 < 0.1 > row["partial_high"] > -0.05
    assert abs(row["partial_rho"]) < 0.08


def test_undefined_is_nan_with_a_reason():
    table = fates(seeds=(0, 1))
    table["cosine_shared_init"] = 0.99
    table["mutual_shared_init"] = 1.0
    table["cosine_shared_start"] = np.nan
    table.loc[table["seed"] == 1, "persistence"] = 0.5
    tests = fragility_tests(table, (0.7,), draws=20).set_index("measure")
    all_survive = tests.loc["shared_init"]
    assert all_survive[["rho", "p_exact", "latent_rho", "ci_low", "partial_high"]].isna().all()
    assert "same value in every group" in all_survive["reason"]
    assert "constant in seed 0, 1" in all_survive["reason"]
    absent = tests.loc["shared_start"]
    assert absent[["rho", "latent_rho", "ci_low", "partial_rho"]].isna().all()
    assert "no latent has a value" in absent["reason"]
    assert absent["num_latents"] == 0
    half_known = tests.loc["persistence"]
    assert np.isfinite(half_known["latent_rho"])
    assert half_known["reason"] == "latents: firing rate or value is constant in seed 1"
    few = quintiles(table[table["latent"] < 3], (0.7,))
    assert len(few) == 5 * (len(MATCHED) + len(UNMATCHED))
    assert (few["survival_rate"].isna() == (few["num_latents"] == 0)).all()
    assert few["survival_rate"].isna().any()
    dead = table.assign(firing_rate=0.0, firing_rate_first_half=0.0)
    assert fragility_tests(dead, (0.7,), draws=20)["latent_rho"].isna().all()
    flat = table.assign(init_retention=0.5)
    row = fragility_tests(flat, (0.7,), draws=20).set_index("measure").loc["excess_isotropic"]
    assert np.isfinite(row["latent_rho"])
    assert np.isnan(row["partial_rho"])
    assert "init_retention is constant" in row["reason"]


def test_holm_adjusts_over_the_conditions_of_a_model_layer_measure_and_tau():
    rows = []
    families = {
        ("a", 1, "shared_init", 0.7): [2 / 120, 0.4, 2 / 120, 0.03],
        ("a", 1, "persistence", np.nan): [0.2, np.nan, 0.01],
        ("b", 1, "shared_init", 0.7): [0.5],
        ("b", 2, "shared_init", 0.7): [np.nan],
    }
    for key, p in families.items():
        for condition, value in enumerate(p):
            rows.append((*key, f"wanda-{condition}", value))
    columns = ["model", "layer", "measure", "tau", "method", "p_exact"]
    table = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    found = holm(table)
    assert found.index.equals(table.index)
    for key, p in families.items():
        part = found.sort_index()[[*columns[:4], "p_exact", "p_holm", "p_holm_smallest"]]
        part = part[
            (part["model"] == key[0]) & (part["layer"] == key[1]) & (part["measure"] == key[2])
        ]
        known = [value for value in p if not np.isnan(value)]
        np.testing.assert_allclose(part["p_holm"].dropna(), slow.holm(known))
        assert part["p_holm"].isna().tolist() == [np.isnan(value) for value in p]
        smallest = part["p_holm_smallest"].dropna()
        np.testing.assert_allclose(smallest, min(1, len(known) * 2 / 120))
