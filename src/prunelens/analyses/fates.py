"""What became of each dense latent: its own numbers, its matches and its persistence in one row.

The table that fragility, the predictor and the causal groups are made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from prunelens.analyses.persistence import JUDGED, NOISES, relative_error, relative_to_noise

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
    seeds: Sequence[int],
    *,
    persistence: pd.DataFrame | None = None,
    activation_matching: pd.DataFrame | None = None,
    subspace: pd.DataFrame | None = None,
    scaling: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per seed and latent of the dense SAEs, under one condition.

    Args:
        latents: seed -> the dense SAE's latents, with the columns of OWN.
        matches: `Survival.latents` of the condition.
        seeds: the condition's seeds, in the order of the study.
        persistence, scaling: per-latent tables of `persistence` and `latent_scaling`, with a column
            seed; None for the dense condition, whose matches are those of the control arms.
        activation_matching, subspace: `ActivationMatching.latents`, `subspace_overlaps`. What was
            not asked is None and has no columns.
    Returns: seed, latent, the columns of OWN, alive; match_, cosine_ and mutual_ for every arm
        (NaN where that seed has no such arm), activation_match_, activation_correlation_,
        activation_mutual_ and subspace_ likewise; scaling and scaling_ of every other source; the
        columns of `persistence_by_latent`; of persistence and of every source beside it Fisher's z
        (persistence_z, persistence_null_z, …); and arrays: persistence_without, of the null and of
        either noise likewise (the correlation without each group of documents), and
        persistence_noise_shuffled_draws (of each draw).
    """
    parts = []
    for seed in seeds:
        own = latents[seed].set_index("latent")[list(OWN)]
        columns = [own, matches_by_latent(matches, seed, seeds)]
        if activation_matching is not None:
            columns.append(activation_by_latent(activation_matching, seed, seeds))
        if subspace is not None:
            columns.append(subspace_by_latent(subspace, seed, seeds))
        if scaling is not None:
            columns.append(scaling_by_latent(scaling, seed))
        if persistence is not None:
            columns.append(persistence_by_latent(persistence, seed))
            columns.append(_persistence_beside(persistence, seed))
        table = pd.concat(columns, axis=1)
        table.insert(0, "seed", seed)
        table.insert(len(OWN) + 1, "alive", table["firing_rate"] > 0)
        mutual = [name for name in table if "mutual_" in name]
        parts.append(table.astype(dict.fromkeys(mutual, float)).reset_index(names="latent"))
    return pd.concat(parts, ignore_index=True)


def matches_by_latent(matches: pd.DataFrame, seed: int, seeds: Sequence[int]) -> pd.DataFrame:
    """Best match, cosine and mutuality per arm, by latent of the dense SAE of `seed`.

    Arms over pairs of starts are shown against the next seed in the list.
    """
    names = {"match": "match", "cosine": "cosine", "mutual": "mutual"}
    return _by_arm(matches, seed, seeds, names)


def activation_by_latent(matching: pd.DataFrame, seed: int, seeds: Sequence[int]) -> pd.DataFrame:
    """The same for matching by activations; the null says nothing of a latent's fate."""
    return _by_arm(
        matching[matching["source"] != "null"],
        seed,
        seeds,
        {name: f"activation_{name}" for name in ("match", "correlation", "mutual")},
    )


def subspace_by_latent(subspace: pd.DataFrame, seed: int, seeds: Sequence[int]) -> pd.DataFrame:
    """The same for overlap with the span of the nearest directions."""
    return _by_arm(subspace, seed, seeds, {"overlap": "subspace"})


def scaling_by_latent(scaling: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Scaling on pruned activations and under the controls, by latent."""
    columns = {}
    for source, part in scaling[scaling["seed"] == seed].groupby("source"):
        if source != "dense":  # 1 by definition
            name = "scaling" if source == "pruned" else f"scaling_{source}"
            columns[name] = part.set_index("latent")["scaling"]
    return pd.DataFrame(columns)


def persistence_by_latent(persistence: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Correlation with everything that disturbs, overlap, silence, and the correlation as a
    multiple of what either noise leaves, with its standard error, by latent."""
    by_source = _of_seed(persistence, seed)
    columns = {}
    for source, part in by_source.items():
        columns[_persistence_name(source)] = part["correlation"]
    columns["persistence_jaccard"] = by_source["pruned"]["jaccard"]
    columns["silenced"] = by_source["pruned"]["silenced"]
    for noise in NOISES:
        above, below = by_source["pruned"], by_source[f"noise_{noise}"]
        arrays = [np.stack(part["without"].to_numpy()) for part in (above, below)]
        relative = relative_to_noise(
            above["correlation"].to_numpy(), below["correlation"].to_numpy()
        )
        columns[f"relative_{noise}"] = relative
        columns[f"relative_{noise}_error"] = relative_error(*arrays)
    return pd.DataFrame(columns, index=by_source["pruned"].index)


def _by_arm(
    table: pd.DataFrame, seed: int, seeds: Sequence[int], names: Mapping[str, str]
) -> pd.DataFrame:
    """Columns of every arm, renamed, of the dense SAE of `seed`."""
    following = seeds[(list(seeds).index(seed) + 1) % len(seeds)]
    columns = {}
    for arm, part in table[table["init_a"] == seed].groupby("arm"):
        shares_start = part["init_b"] == seed
        chosen = part[shares_start | (part["init_b"] == following)].set_index("latent")
        for column, name in names.items():
            columns[f"{name}_{arm}"] = chosen[column]
    return pd.DataFrame(columns)


def _of_seed(persistence: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """The latents of one seed in their order, by source."""
    chosen = persistence[persistence["seed"] == seed]
    by_source = chosen.set_index("latent").sort_index().groupby("source")
    return {str(source): part for source, part in by_source}


def _persistence_name(source: str) -> str:
    return "persistence" if source == "pruned" else f"persistence_{source}"


def _persistence_beside(persistence: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What intervals and tests need beside the correlation."""
    columns = {}
    for source, part in _of_seed(persistence, seed).items():
        name = _persistence_name(source)
        columns[f"{name}_z"] = part["fisher_z"]
        if source in (*JUDGED, *(f"noise_{noise}" for noise in NOISES)):
            columns[f"{name}_without"] = part["without"]
        if source == "noise_shuffled":
            columns[f"{name}_draws"] = part["draws"]
    return pd.DataFrame(columns)
