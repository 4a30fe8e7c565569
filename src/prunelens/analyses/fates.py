"""What became of each dense latent: its own numbers, its matches and its persistence in one row.

The table that fragility, the predictor and the causal groups are made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

OWN = (
    "firing_rate",
    "firing_rate_first_half",
    "mean_activation",
    "init_retention",
    "resampled",
)


def latent_fates(
    latents: Mapping[int, pd.DataFrame],
    matches: pd.DataFrame,
    persistence: pd.DataFrame | None,
    seeds: Sequence[int],
) -> pd.DataFrame:
    """One row per seed and latent of the dense SAEs, under one condition.

    Args:
        latents: seed -> the dense SAE's latents, with the columns of OWN.
        matches: `Survival.latents` of the condition.
        persistence: per-latent tables of `persistence`, with a column seed; None for the dense
            condition, whose matches are those of the control arms.
        seeds: the condition's seeds, in the order of the study.
    Returns: seed, latent, the columns of OWN, alive; match_, cosine_ and mutual_ for every arm
        (NaN where that seed has no such arm); persistence and persistence_jaccard, silenced, and
        Fisher's z of the correlation with pruned activations and with either noise (persistence_z,
        persistence_z_noise_isotropic, persistence_z_noise_shuffled).
    """
    parts = []
    for seed in seeds:
        own = latents[seed].set_index("latent")[list(OWN)]
        columns = [own, matches_by_latent(matches, seed, seeds)]
        if persistence is not None:
            columns.append(persistence_by_latent(persistence, seed))
            columns.append(_fisher_z_by_latent(persistence, seed))
        table = pd.concat(columns, axis=1)
        table.insert(0, "seed", seed)
        table.insert(len(OWN) + 1, "alive", table["firing_rate"] > 0)
        mutual = [name for name in table if name.startswith("mutual_")]
        parts.append(table.astype(dict.fromkeys(mutual, float)).reset_index(names="latent"))
    return pd.concat(parts, ignore_index=True)


def matches_by_latent(matches: pd.DataFrame, seed: int, seeds: Sequence[int]) -> pd.DataFrame:
    """Best match, cosine and mutuality per arm, by latent of the dense SAE of `seed`.

    Arms over pairs of starts are shown against the next seed in the list.
    """
    following = seeds[(list(seeds).index(seed) + 1) % len(seeds)]
    columns = {}
    for arm, part in matches[matches["init_a"] == seed].groupby("arm"):
        shares_start = part["init_b"] == seed
        chosen = part[shares_start | (part["init_b"] == following)].set_index("latent")
        for column in ("match", "cosine", "mutual"):
            columns[f"{column}_{arm}"] = chosen[column]
    return pd.DataFrame(columns)


def persistence_by_latent(persistence: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Correlation with pruned activations and with either noise, overlap and silence, by latent."""
    columns = {}
    for source, part in persistence[persistence["seed"] == seed].groupby("source"):
        by_latent = part.set_index("latent")
        name = "persistence" if source == "pruned" else f"persistence_{source}"
        columns[name] = by_latent["correlation"]
        if source == "pruned":
            columns["persistence_jaccard"] = by_latent["jaccard"]
            columns["silenced"] = by_latent["silenced"]
    return pd.DataFrame(columns)


def _fisher_z_by_latent(persistence: pd.DataFrame, seed: int) -> pd.DataFrame:
    chosen = persistence[persistence["seed"] == seed]
    columns = {}
    for source, part in chosen.groupby("source"):
        name = "persistence_z" if source == "pruned" else f"persistence_z_{source}"
        columns[name] = part.set_index("latent")["fisher_z"]
    return pd.DataFrame(columns)
