"""RQ1: are the features of one condition the same for every seed?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from prunelens.match import match_dictionaries, match_rates


def seed_stability(
    decoders: Mapping[int, Float[Tensor, "latents d_model"]], taus: Sequence[float]
) -> pd.DataFrame:
    """Match rates of every pair of seeds of one condition, in its normalised coordinates.

    Returns: columns seed_a, seed_b, tau, one_way, mnn, greedy; one row per pair and tau.
    Source: paper §4.2; methods §7, RQ1.
    """
    rows = []
    for seed_a, seed_b in itertools.combinations(sorted(decoders), 2):
        matches = match_dictionaries(decoders[seed_a], decoders[seed_b], lowest_tau=min(taus))
        for tau in taus:
            rates = match_rates(matches, tau)
            rows.append((seed_a, seed_b, tau, rates.one_way, rates.mnn, rates.greedy))
    columns = ["seed_a", "seed_b", "tau", "one_way", "mnn", "greedy"]
    return pd.DataFrame(rows, columns=columns)
