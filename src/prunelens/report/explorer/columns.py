"""What the explorer calls the columns of tables, and what each says in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from prunelens.columns import meanings_of
from prunelens.report.explorer.content import Column
from prunelens.study.kind import Told
from prunelens.study.questions import QUESTIONS
from prunelens.study.results import LATENT_COLUMNS

ARMS = {
    "shared_init": "as published: same start and data order",
    "shared_start": "same start, other data order",
    "cross_init": "other start",
    "warm_start": "the dense SAE trained on with pruned activations",
}


_MEANINGS = meanings_of(LATENT_COLUMNS)
_OWN = {
    name: Told(name.replace("_", " "), _MEANINGS[name])
    for name in ("firing_rate", "mean_activation", "init_retention")
} | {
    "causal_effect": Told(
        "causal effect",
        "KL divergence of the next token (nats) when the latent is ablated alone in the dense"
        " model, mean over places where it fires; empty where it was not ablated, since only"
        " groups of latents are.",
    ),
    "causal_effect_pruned": Told(
        "match's causal effect",
        "The same as causal effect, of the latent's match in the pruned model; empty where that"
        " was not ablated.",
    ),
}


def told_columns() -> dict[str, Told]:
    """How every column of a latent is shown, those of arms without the arm."""
    return _OWN | {name: told for question in QUESTIONS for name, told in question.told.items()}


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
    label, text = (part.format(arm=arm, means=ARMS.get(arm, "")) for part in told_columns()[name])
    return Column(key, label, text, indices(values) if "match" in name else numbers(values))


def indices(values: pd.Series) -> np.ndarray:
    """int32, -1 where there is none."""
    return values.astype(float).fillna(-1).to_numpy(dtype=np.int32)


def numbers(values: pd.Series) -> np.ndarray:
    """float32, NaN where undefined; true and false are 1 and 0."""
    return values.astype(float).to_numpy(dtype=np.float32)
