"""What the explorer calls the columns of tables, and what each says in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from prunelens.report.explorer.content import Column

ARMS = {
    "shared_init": "as published: same start and data order",
    "shared_start": "same start, other data order",
    "cross_init": "other start",
    "warm_start": "the dense SAE trained on with pruned activations",
}


class _Told(NamedTuple):
    """How a column is shown; `{arm}` and `{means}` are filled in where it is of an arm."""

    label: str
    help: str


_TOLD = {
    "firing_rate": _Told("firing rate", "Share of the eval tokens on which the latent fires."),
    "mean_activation": _Told(
        "mean activation", "Mean activation over the tokens on which the latent fires."
    ),
    "init_retention": _Told(
        "init retention",
        "Cosine of the latent's direction to the random one that it started from: near 1 training"
        " has hardly moved it, and any two SAEs that share the start will agree on it.",
    ),
    "causal_effect": _Told(
        "causal effect",
        "KL divergence of the next token (nats) when the latent is ablated alone in the dense"
        " model, mean over places where it fires; empty where it was not ablated, since only"
        " groups of latents are.",
    ),
    "persistence": _Told(
        "persistence",
        "Correlation of the latent's activations on dense and on pruned activations of the same"
        " tokens: 1 fires as before, 0 is lost; empty with fewer than 10 dense firings.",
    ),
    "relative_shuffled": _Told(
        "share of noise",
        "Persistence as a share of what noise of the same size leaves, 0 to 1: below 1 is harm"
        " of pruning's own, whatever the firing rate.",
    ),
    "persistence_jaccard": _Told(
        "Jaccard",
        "Overlap of the tokens on which the latent fires before and after pruning: 1 the same,"
        " 0 none in common.",
    ),
    "silenced": _Told(
        "silenced", "1 where the latent fires on dense and never on pruned activations."
    ),
    "scaling": _Told(
        "scaling",
        "How many times its own size the latent's direction is in pruned activations: 1 as before,"
        " 0 gone; read it beside that of other latents, since a common gain raises all.",
    ),
    "mutual": _Told(
        "mutual, {arm}",
        "1 where the latent and its nearest direction in the pruned SAE are each other's nearest"
        " ({means}); 0 where they are not.",
    ),
    "cosine": _Told(
        "cosine, {arm}",
        "Cosine to the nearest direction in the pruned SAE ({means}): low is lost or turned.",
    ),
    "activation_correlation": _Told(
        "activation match, {arm}",
        "Correlation with the latent of the pruned SAE that fires most alike ({means}): low means"
        " that none fires as this one did.",
    ),
    "activation_match": _Told(
        "fires most alike, {arm}",
        "The latent of the pruned SAE that fires most alike ({means}); -1 where there is none.",
    ),
    "causal_effect_pruned": _Told(
        "match's causal effect",
        "The same as causal effect, of the latent's match in the pruned model; empty where that"
        " was not ablated.",
    ),
}


def columns_of(table: pd.DataFrame, keys: Iterable[str]) -> tuple[Column, ...]:
    """The columns of `keys` that the table has, in that order.

    Args:
        table: one row per latent, in the order of latents.
        keys: names of columns; those of an arm end in `_<arm>`.
    """
    return tuple(_column(key, table[key]) for key in keys if key in table)


def _column(key: str, values: pd.Series) -> Column:
    found = re.fullmatch(rf"(.+?)_({'|'.join(ARMS)})", key)
    name, arm = found.groups() if found else (key, "")
    label, text = (part.format(arm=arm, means=ARMS.get(arm, "")) for part in _TOLD[name])
    return Column(key, label, text, indices(values) if "match" in name else numbers(values))


def indices(values: pd.Series) -> np.ndarray:
    """int32, -1 where there is none."""
    return values.astype(float).fillna(-1).to_numpy(dtype=np.int32)


def numbers(values: pd.Series) -> np.ndarray:
    """float32, NaN where undefined; true and false are 1 and 0."""
    return values.astype(float).to_numpy(dtype=np.float32)
