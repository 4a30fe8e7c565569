"""What became of each dense latent: joined by seed and index, nothing mixed up."""

import numpy as np
import pandas as pd

from prunelens.analyses.fates import latent_fates

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


def persistence(seed):
    parts = [
        pd.DataFrame(
            {
                "source": source,
                "latent": range(NUM_LATENTS),
                "correlation": [np.nan, base, base, base],
                "fisher_z": np.arctanh([np.nan, base, base, base]),
                "jaccard": 0.5,
                "silenced": False,
                "seed": seed,
            }
        )
        for source, base in (
            ("pruned", 0.5 + seed / 10),
            ("noise_isotropic", 0.2),
            ("noise_shuffled", 0.3),
        )
    ]
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
        np.testing.assert_allclose(part["persistence"].iloc[1:], 0.5 + seed / 10)
        np.testing.assert_allclose(part["persistence_z_noise_isotropic"].iloc[1:], np.arctanh(0.2))
    assert by_seed.loc[0, "cosine_shared_start"].eq(0.8).all()
    assert by_seed.loc[1, "cosine_shared_start"].isna().all()
    assert by_seed["mutual_shared_start"].dtype == float
    assert list(by_seed.loc[0, "match_shared_init"]) == [3, 2, 1, 0]
