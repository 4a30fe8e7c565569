import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tests.independent import matching
from tests.independent import statistics as slow

from prunelens.analyses.stability import seed_stability
from prunelens.analyses.survival import (
    Dictionary,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)

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
    assert table.loc["cross", "corrected"] == pytest.approx((0.2 + 0.2) / (0.4 + 0.3))
    assert table[["low", "high"]].isna().all().all()
    assert (table["interval"] == "").all()
    assert table.loc["shared", "reason"] == "no interval: 1 seeds, fewer than 2"
    assert table.loc["cross", "reason"] == "no interval: undefined without some of the seeds"


def test_corrected_survival_of_several_control_seeds_leaves_each_out():
    measured, floors, ceilings = [0.6, 0.5, 0.7], [0.1, 0.2, 0.1], [0.9, 1.0, 0.8]
    pruned = rates_table([("shared_start", s, s, rate) for s, rate in enumerate(measured)])
    controls = rates_table(
        [("floor_shared", s, s, rate) for s, rate in enumerate(floors)]
        + [("ceiling_shared", s, s, rate) for s, rate in enumerate(ceilings)]
    )
    row = corrected_survival(pruned, controls).set_index("arm").loc["shared"]

    def ratio(seeds):
        m, f, c = (np.mean([part[s] for s in seeds]) for part in (measured, floors, ceilings))
        return (m - f) / (c - f)

    assert row["corrected"] == pytest.approx(ratio([0, 1, 2]))
    error = np.sqrt(slow.jackknife([ratio([1, 2]), ratio([0, 2]), ratio([0, 1])]))
    ends = stats.t.interval(0.95, 2, row["corrected"], error)
    assert (row["low"], row["high"]) == pytest.approx(ends)
    assert (row["interval"], row["reason"]) == ("seeds left out, t", "")


def test_corrected_survival_over_pairs_leaves_out_seeds_and_not_pairs():
    generator = np.random.default_rng(0)
    pairs = list(itertools.permutations(range(4), 2))
    rate = {pair: 0.5 + 0.1 * generator.normal() for pair in pairs}
    pruned = rates_table([("cross_init", *pair, rate[pair]) for pair in pairs])
    controls = rates_table(
        [("chance", *pair, 0.1) for pair in pairs]
        + [("ceiling_cross", *pair, 0.9) for pair in pairs]
    )
    row = corrected_survival(pruned, controls).set_index("arm").loc["cross"]
    without = [
        (np.mean([rate[pair] for pair in pairs if s not in pair]) - 0.1) / 0.8 for s in range(4)
    ]
    assert row["corrected"] == pytest.approx((np.mean(list(rate.values())) - 0.1) / 0.8)
    half = stats.t.ppf(0.975, 3) * np.sqrt(slow.jackknife(without))
    assert row["high"] - row["corrected"] == pytest.approx(half)


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
