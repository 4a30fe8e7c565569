"""What became of each dense latent: joined by seed and index, nothing mixed up."""

import numpy as np
import pandas as pd
import pytest
from tests.independent.statistics import jackknife

from prunelens.analyses.fates import latent_fates
from prunelens.analyses.measures import latent_measures

NUM_LATENTS = 4


def own(seed):
    return pd.DataFrame(
        {
            "latent": range(NUM_LATENTS),
            "firing_rate": [0.0, 0.1, 0.2, 0.3],
            "firing_rate_first_half": [0.0, 0.1, 0.2, 0.4],
            "mean_activation": 1.0 + seed,
            "init_retention": 0.5,
            "resampled": False,
        }
    )


def matches(arm, init_a, init_b, cosine):
    return pd.DataFrame(
        {
            "arm": arm,
            "init_a": init_a,
            "order_a": init_a,
            "init_b": init_b,
            "order_b": init_b,
            "latent": range(NUM_LATENTS),
            "match": [3, 2, 1, 0],
            "cosine": cosine,
            "mutual": [True, False, True, False],
        }
    )


BASES = {
    "undone": 0.6, "null": 0.35, "noise_isotropic": 0.4, "noise_shuffled": 0.45,
    "difference_shuffled": 0.1,
}  # fmt: skip


def persistence(seed):
    """Latents in another order for every source; the first has too few firings."""
    parts = []
    for number, (source, base) in enumerate({"pruned": 0.5 + seed / 10, **BASES}.items()):
        correlation = [np.nan, base, 1.1 * base, 1.2 * base]
        columns = {
            "source": source,
            "latent": range(NUM_LATENTS),
            "correlation": correlation,
            "fisher_z": np.arctanh(correlation),
            "jaccard": 0.5 + number / 100,
            "silenced": source == "null",
            "draws": [[value, value + 0.1, value - 0.1] for value in correlation],
            "without": [np.array([value - 0.01, value, value + 0.02]) for value in correlation],
            "seed": seed,
        }
        parts.append(pd.DataFrame(columns).sample(frac=1, random_state=number))
    return pd.concat(parts)


def test_every_seed_has_its_own_numbers_and_the_next_seed_for_other_starts():
    table = pd.concat(
        [
            *(matches("shared_init", s, s, 0.9 + s / 100) for s in (0, 1, 2)),
            *(matches("cross_init", a, b, 0.1 * (3 * a + b)) for a in range(3) for b in range(3)),
            matches("shared_start", 0, 0, 0.8),  # of the control seed alone
        ],
        ignore_index=True,
    )
    table = table[(table["arm"] != "cross_init") | (table["init_a"] != table["init_b"])]
    kept = pd.concat([persistence(s) for s in (0, 1, 2)])
    found = latent_fates({s: own(s) for s in (0, 1, 2)}, table, (0, 1, 2), persistence=kept)
    assert len(found) == 3 * NUM_LATENTS
    by_seed = found.set_index(["seed", "latent"])
    for seed in (0, 1, 2):
        part = by_seed.loc[seed]
        following = (seed + 1) % 3
        assert (part["cosine_shared_init"] == 0.9 + seed / 100).all()
        np.testing.assert_allclose(part["cosine_cross_init"], 0.1 * (3 * seed + following))
        assert (part["mean_activation"] == 1 + seed).all()
        assert list(part["alive"]) == [False, True, True, True]
        np.testing.assert_allclose(part["persistence"].iloc[1], 0.5 + seed / 10)
        np.testing.assert_allclose(part["persistence"].iloc[2], 0.55 + 0.11 * seed)
    assert by_seed.loc[0, "cosine_shared_start"].eq(0.8).all()
    assert by_seed.loc[1, "cosine_shared_start"].isna().all()
    assert by_seed["mutual_shared_start"].dtype == float
    assert list(by_seed.loc[0, "match_shared_init"]) == [3, 2, 1, 0]


@pytest.fixture
def two_seeds():
    table = pd.concat([matches("shared_init", s, s, 0.9) for s in (0, 1)], ignore_index=True)
    kept = pd.concat([persistence(s) for s in (0, 1)])
    return latent_fates({s: own(s) for s in (0, 1)}, table, (0, 1), persistence=kept)


def test_every_source_of_persistence_has_its_own_columns(two_seeds):
    for row in two_seeds[two_seeds["latent"] > 0].to_dict("records"):
        grown = 1 + (row["latent"] - 1) / 10
        bases = {"": 0.5 + row["seed"] / 10} | {f"_{name}": base for name, base in BASES.items()}
        for name, base in bases.items():
            assert row[f"persistence{name}"] == pytest.approx(grown * base)
            assert row[f"persistence{name}_z"] == pytest.approx(np.arctanh(grown * base))
            kept = name in ("", "_null", "_noise_isotropic", "_noise_shuffled")
            assert (f"persistence{name}_without" in row) == kept
            if kept:
                expected = grown * base + np.array([-0.01, 0, 0.02])
                np.testing.assert_allclose(row[f"persistence{name}_without"], expected)
        draws = grown * 0.45 + np.array([0, 0.1, -0.1])
        np.testing.assert_allclose(row["persistence_noise_shuffled_draws"], draws)
        assert row["persistence_jaccard"] == 0.5  # of the pruned activations
        assert not row["silenced"]


def test_persistence_relative_to_noise_has_its_error(two_seeds):
    for row in two_seeds.to_dict("records"):
        for noise in ("isotropic", "shuffled"):
            pruned, left = row["persistence"], row[f"persistence_noise_{noise}"]
            if np.isnan(pruned):
                assert np.isnan([row[f"relative_{noise}"], row[f"relative_{noise}_error"]]).all()
                continue
            assert row[f"relative_{noise}"] == pytest.approx(pruned / left)  # above 1
            both = row["persistence_without"], row[f"persistence_noise_{noise}_without"]
            ratios = [a / b for a, b in zip(*both, strict=True)]
            assert row[f"relative_{noise}_error"] ** 2 == pytest.approx(jackknife(ratios))


def test_measures_of_the_null_put_it_in_the_place_of_the_pruned_activations(two_seeds):
    """The noise that it is held against is the same."""
    two_seeds = two_seeds.assign(scaling=0.9, scaling_null=1.2)
    pruned, null = (latent_measures(two_seeds, source) for source in ("pruned", "null"))
    reads = {"persistence", "excess_isotropic", "excess_shuffled", "relative_isotropic"}
    reads |= {"relative_shuffled", "scaling"}
    assert set(null) == reads
    assert set(pruned) == reads | {"shared_init", "persistence_undone", "persistence_jaccard"}
    columns = {"pruned": "persistence", "null": "persistence_null"}
    for found, column in ((pruned, columns["pruned"]), (null, columns["null"])):
        value = two_seeds[column].to_numpy()
        np.testing.assert_array_equal(found["persistence"].value, value)
        for noise in ("isotropic", "shuffled"):
            left = two_seeds[f"persistence_noise_{noise}"].to_numpy()
            relative = found[f"relative_{noise}"]
            np.testing.assert_allclose(relative.value, value / left)
            excess = two_seeds[f"{column}_z"] - two_seeds[f"persistence_noise_{noise}_z"]
            np.testing.assert_allclose(found[f"excess_{noise}"].value, excess)
            np.testing.assert_array_equal(relative.means.above, value)
            np.testing.assert_array_equal(relative.means.below, left)
            for part, name in (
                (relative.means.above_without, column),
                (relative.means.below_without, f"persistence_noise_{noise}"),
            ):
                np.testing.assert_array_equal(part, np.stack(two_seeds[f"{name}_without"]))
        means = found["persistence"].means
        np.testing.assert_array_equal(means.above, value)
        assert (means.below == 1).all() and (means.below_without == 1).all()
        assert {measure.rate for name, measure in found.items() if name != "shared_init"} == {
            "firing_rate_first_half"
        }
    assert (null["scaling"].value == 1.2).all() and (pruned["scaling"].value == 0.9).all()
