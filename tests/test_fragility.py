import numpy as np
import pandas as pd
import pytest
from tests.independent import statistics as slow

from prunelens.analyses.fragility import (
    MATCHED,
    UNMATCHED,
    fragility_contrasts,
    fragility_tests,
    holm,
    quintiles,
    quintiles_by_seed,
)
from prunelens.analyses.statistics import Estimate, exact_spearman

TAUS = (0.5, 0.7)
GROUPS = 8  # of documents
SOURCES = (
    *("persistence", "persistence_null"),
    *("persistence_noise_isotropic", "persistence_noise_shuffled"),
)
NULL = (
    *("persistence", "excess_isotropic", "excess_shuffled"),
    *("relative_isotropic", "relative_shuffled", "scaling"),
)
CONTROLS = ("ceiling_shared", "floor_shared", "ceiling_cross", "chance")


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
        for source in SOURCES:
            own = z - generator.uniform(0, 0.5, num_latents) * (source != "persistence")
            value = np.tanh(own)
            apart = 0.02 * generator.normal(size=(num_latents, GROUPS))
            columns |= {source: value, f"{source}_z": own}
            columns[f"{source}_without"] = list(value[:, None] + apart)
        columns["persistence_noise_shuffled"][:3] = 0.05  # noise leaves too little of them
        columns["persistence_undone"] = np.tanh(z + 0.1)
        columns["scaling_null"] = 1 + 0.1 * generator.normal(size=num_latents)
        columns["scaling"] = 1 - rate + 0.1 * generator.normal(size=num_latents)
        parts.append(pd.DataFrame(columns).astype({f"mutual_{arm}": float for arm in MATCHED}))
    return pd.concat(parts, ignore_index=True)


def rate_and_value(row, measure, tau, source="pruned"):
    """From the definitions, for one latent: (rate that sorts, value or None, divisor)."""
    if measure in MATCHED:
        if np.isnan(row[f"cosine_{measure}"]):
            return row["firing_rate"], None, 1
        hit = row[f"mutual_{measure}"] == 1 and row[f"cosine_{measure}"] >= tau
        return row["firing_rate"], float(hit), 1
    kind, _, noise = measure.partition("_")
    tail = "_null" if source == "null" else ""
    value, below = row.get(f"{measure}{tail}"), 1
    if kind == "excess":
        value = row[f"persistence{tail}_z"] - row[f"persistence_noise_{noise}_z"]
    if kind == "relative":
        value, below = row[f"persistence{tail}"], row[f"persistence_noise_{noise}"]
    rate = row["firing_rate_first_half"]
    return rate, None if np.isnan(value) or np.isnan(below) else value, below


def alive_latents(table, measure, tau, source="pruned"):
    """seed -> list of (rate, latent, value, init_retention, divisor) in quintile order."""
    found = {}
    for row in table.to_dict("records"):
        rate, value, below = rate_and_value(row, measure, tau, source)
        if rate > 0:
            entry = (rate, row["latent"], value, row["init_retention"], below)
            found.setdefault(row["seed"], []).append(entry)
    return {seed: sorted(entries, key=lambda e: e[:2]) for seed, entries in found.items()}


def slow_quintiles(table, measure, tau, source="pruned"):
    """quintile -> (rate, survival, count); of a measure that is divided, sum over sum."""
    rates, values, counts = ([[] for _ in range(5)] for _ in range(3))
    for entries in alive_latents(table, measure, tau, source).values():
        for q in range(5):
            part = [e for p, e in enumerate(entries) if 5 * p // len(entries) == q]
            part = [e for e in part if e[2] is not None]
            if part:
                rates[q].append(np.mean([e[0] for e in part]))
                values[q].append(sum(e[2] for e in part) / sum(e[4] for e in part))
                counts[q].append(len(part))
    return {q + 1: (np.mean(rates[q]), np.mean(values[q]), sum(counts[q])) for q in range(5)}


def test_quintiles_equal_the_slow_definition_for_every_measure():
    table = fates()
    found = quintiles(table, TAUS)
    assert len(found) == 5 * (len(MATCHED) * 2 + len(UNMATCHED) + len(NULL))
    for (measure, source, tau), part in found.groupby(["measure", "source", "tau"], dropna=False):
        assert source == "dense" if measure in CONTROLS else source in ("pruned", "null")
        expected = slow_quintiles(table, measure, tau, source)
        for row in part.itertuples():
            numbers = (row.firing_rate, row.survival_rate, row.num_latents)
            assert numbers == pytest.approx(expected[row.quintile], abs=1e-12)


def test_latents_that_noise_leaves_too_little_of_are_in_the_ratio_and_counted():
    table = fates().assign(firing_rate_first_half=0.1)
    found = quintiles(table, (0.7,)).set_index(["measure", "source"])
    dropped = found.loc[("relative_shuffled", "pruned"), "num_dropped"].sum()
    left = table["persistence_noise_shuffled"]
    assert dropped == ((left < 0.3) & table["persistence"].notna()).sum() > 0
    assert found.loc[("persistence", "pruned"), "num_dropped"].sum() == 0
    counts = found["num_latents"].groupby(level=["measure", "source"]).sum()
    assert counts["relative_shuffled", "pruned"] == counts["persistence", "pruned"]


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
    keys = ["measure", "source", "tau", "quintile"]
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
    found = fragility_tests(table, TAUS).set_index(["measure", "source", "tau"])
    assert len(found) == len(MATCHED) * 2 + len(UNMATCHED) + len(NULL)
    for (measure, source, tau), row in found.iterrows():
        raw, partial = [], []
        for entries in alive_latents(table, measure, tau, source).values():
            known = [e for e in entries if e[2] is not None]
            if measure.startswith("relative"):  # latent by latent noise has to leave a tenth
                known = [(*e[:2], e[2] / e[4], e[3]) for e in known if e[4] >= 0.3]
            if known:
                rate, value, retention = zip(*[(e[0], e[2], e[3]) for e in known], strict=True)
                raw.append(slow.spearman(rate, value))
                partial.append(slow.partial_spearman(rate, value, retention))
        assert row["latent_rho"] == pytest.approx(np.mean(raw), abs=1e-9)
        assert row["partial_rho"] == pytest.approx(np.mean(partial), abs=1e-9)
        assert row["ci_low"] < row["latent_rho"] < row["ci_high"]
        quintile = slow_quintiles(table, measure, tau, source)
        rates, values = ([quintile[q][i] for q in range(1, 6)] for i in (0, 1))
        assert row["rho"] == pytest.approx(slow.spearman(rates, np.round(values, 12)))
        assert row["p_exact"] == pytest.approx(slow.permutation_p(rates, np.round(values, 12)))
        assert row["num_latents"] == sum(q[2] for q in quintile.values())
        one = "of one seed" if measure == "shared_start" else "of every seed"
        of_tokens = measure.startswith(("persistence", "relative")) and "undone" not in measure
        assert row["resampled"] == ("documents and " if of_tokens else "") + f"latents {one}"
        assert row["reason"] == ""


def slow_group(table, measure, source, quintiles_wanted, group=None):
    """Mean over seeds of sum over sum, without one group of documents; and the number of latents
    that are left."""
    tail = "_null" if source == "null" else ""
    noise = measure.partition("_")[2]
    found = []
    for _, own in table[table["firing_rate_first_half"] > 0].groupby("seed"):
        own = own.sort_values(["firing_rate_first_half", "latent"])
        place = np.arange(len(own)) * 5 // len(own) + 1
        own = own[np.isin(place, quintiles_wanted) & own["persistence"].notna()]

        def column(name, own=own):
            if group is None:
                return own[name].to_numpy()
            return np.stack(own[f"{name}_without"])[:, group]

        below = 1.0 if measure == "persistence" else column(f"persistence_noise_{noise}")
        above = column(f"persistence{tail}")
        found.append(above.sum() / np.sum(below * np.ones(len(above))))
    return np.mean(found)


def test_contrasts_of_groups_equal_leaving_documents_out_by_hand():
    table = fates(num_latents=100)
    found = fragility_contrasts(table).set_index(["measure", "source", "group"])
    groups = {f"Q{q}": [q] for q in range(1, 6)} | {"all": [1, 2, 3, 4, 5]}
    for (measure, source, group), row in found.iterrows():
        both = [groups[name] for name in group.split(" - ")]
        sides = [
            [slow_group(table, measure, source, side, left) for left in (None, *range(GROUPS))]
            for side in both
        ]
        value, *without = sides[0] if len(sides) == 1 else np.subtract(*sides)
        assert row["value"] == pytest.approx(value)
        np.testing.assert_allclose(row["without"], without)
        assert row["by_seed"].reshape(3, GROUPS).mean(0) == pytest.approx(without)
        assert (row["least"], row["most"]) == pytest.approx((min(without), max(without)))
        documents = (GROUPS - 1) / GROUPS * np.square(without - np.mean(without)).sum()
        assert row["error"] ** 2 == pytest.approx(documents + row["beyond"])
        assert row["beyond"] >= 0
        numbers = (row["error"], row["df"], row["resampled"])
        interval = Estimate(value, *numbers, skew=row["skew"]).bounds()
        assert (row["low"], row["high"]) == pytest.approx(interval)
    counts = found["num_latents"]
    q1, q5 = (counts["relative_shuffled", "pruned", name] for name in ("Q1", "Q5"))
    assert counts["relative_shuffled", "pruned", "Q1 - Q5"] == q1 + q5
    dense = table.drop(columns=[name for name in table if name.startswith("persistence")])
    assert fragility_contrasts(dense).empty


def of_pruned(table):
    """Of what was pruned, by measure."""
    found = fragility_tests(table, (0.7,))
    return found[found["source"] != "null"].set_index("measure")


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
    row = of_pruned(table).loc["persistence"]
    assert row["ci_high"] < -0.3
    assert row["partial_low"] < 0.05 < 0.1 > row["partial_high"] > -0.05
    assert abs(row["partial_rho"]) < 0.08


def test_undefined_is_nan_with_a_reason():
    table = fates(seeds=(0, 1))
    table["cosine_shared_init"] = 0.99
    table["mutual_shared_init"] = 1.0
    table["cosine_shared_start"] = np.nan
    table.loc[table["seed"] == 1, "scaling"] = 0.5
    tests = of_pruned(table)
    all_survive = tests.loc["shared_init"]
    assert all_survive[["rho", "p_exact", "latent_rho", "ci_low", "partial_high"]].isna().all()
    assert "same value in every group" in all_survive["reason"]
    assert "never varies" in all_survive["reason"]
    absent = tests.loc["shared_start"]
    assert absent[["rho", "latent_rho", "ci_low", "partial_rho"]].isna().all()
    assert "too few latents" in absent["reason"]
    assert absent["num_latents"] == 0
    assert np.isnan(tests.loc["scaling", "latent_rho"])  # constant in one seed
    few = quintiles(table[table["latent"] < 3], (0.7,))
    assert len(few) == 5 * (len(MATCHED) + len(UNMATCHED) + len(NULL))
    assert (few["survival_rate"].isna() == (few["num_latents"] == 0)).all()
    assert few["survival_rate"].isna().any()
    dead = table.assign(firing_rate=0.0, firing_rate_first_half=0.0)
    assert fragility_tests(dead, (0.7,))["latent_rho"].isna().all()
    assert fragility_contrasts(dead).empty
    row = of_pruned(table.assign(init_retention=0.5)).loc["excess_isotropic"]
    assert np.isfinite(row["latent_rho"])
    assert np.isnan(row["partial_rho"])
    assert "partial" in row["reason"]


def test_holm_adjusts_over_the_conditions_of_a_model_layer_measure_and_tau():
    rows = []
    families = {
        ("a", 1, "shared_init", "pruned", 0.7): [2 / 120, 0.4, 2 / 120, 0.03],
        ("a", 1, "persistence", "pruned", np.nan): [0.2, np.nan, 0.01],
        ("a", 1, "persistence", "null", np.nan): [0.02],
        ("b", 1, "shared_init", "pruned", 0.7): [0.5],
        ("b", 2, "shared_init", "pruned", 0.7): [np.nan],
    }
    for key, p in families.items():
        for condition, value in enumerate(p):
            rows.append((*key, f"wanda-{condition}", value))
    columns = ["model", "layer", "measure", "source", "tau", "method", "p_exact"]
    table = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    found = holm(table)
    assert found.index.equals(table.index)
    for key, p in families.items():
        part = found.sort_index()
        part = part[(part[columns[:4]] == list(key[:4])).all(axis=1)]
        known = [value for value in p if not np.isnan(value)]
        np.testing.assert_allclose(part["p_holm"].dropna(), slow.holm(known))
        assert part["p_holm"].isna().tolist() == [np.isnan(value) for value in p]
        smallest = part["p_holm_smallest"].dropna()
        np.testing.assert_allclose(smallest, min(1, len(known) * 2 / 120))
