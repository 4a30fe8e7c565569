"""RQ2: how many dense features are found again after pruning, and how many would be anyway?

One comparison of two dictionaries is an *arm*. The paper has one (`shared_init`); the others say
what that number is worth: the most that could be seen (ceilings), what a shared start alone gives
(`floor_shared`: a space with no feature in common), and what geometry alone gives (`chance`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from prunelens.analyses.statistics import jackknifed
from prunelens.match import Matches, match_dictionaries, match_rates

SMALLEST_GAP = 0.02  # below it, corrected survival divides by noise
COORDINATES = ("normalised", "raw")
CORRECTIONS = {  # corrected arm: (measured arm, its floor, its ceiling)
    "shared": ("shared_start", "floor_shared", "ceiling_shared"),
    "cross": ("cross_init", "chance", "ceiling_cross"),
    "warm": ("warm_start", "floor_warm", "ceiling_warm"),
}


@runtime_checkable
class Started(Protocol):
    """What an arm needs to know of the SAEs that it compares."""

    @property
    def init_seed(self) -> int:
        """Of the random start that it, or the SAE that it began from, was made of."""

    @property
    def data_seed(self) -> int:
        """Of the order of its tokens."""


StartedT = TypeVar("StartedT", bound=Started)


class Dictionary(NamedTuple):
    """A decoder with what is needed to compare it with another."""

    decoder: Float[Tensor, "latents d_model"]
    """Rows are feature vectors in normalised coordinates."""
    sigma: Float[Tensor, " d_model"]
    """The deviations that it was trained under: rows times sigma are raw coordinates."""
    init_seed: int
    data_seed: int


@dataclasses.dataclass(frozen=True)
class Comparison(Generic[StartedT]):
    """One arm for one pair of dictionaries, or of what else stands for their SAEs."""

    arm: str
    a: StartedT
    b: StartedT


class Survival(NamedTuple):
    """The rates of every comparison, and the best match of every latent."""

    rates: pd.DataFrame
    """arm, coordinates, init_a, order_a, init_b, order_b, and the fields of MatchRates."""
    latents: pd.DataFrame
    """arm, init_a, order_a, init_b, order_b, latent, match, cosine, mutual; normalised only."""


def pruned_arms(
    dense: Sequence[StartedT],
    pruned: Sequence[StartedT],
    reordered: Sequence[StartedT],
    warm: Sequence[StartedT] = (),
) -> list[Comparison[StartedT]]:
    """`shared_init`, `shared_start`, `cross_init` and `warm_start` of one pruned condition.

    Args:
        dense, pruned: SAE(model; s, s) for every seed s.
        reordered: SAE(pruned; s, t) for the control seeds.
        warm: SAE(dense; s, s) trained on with pruned activations, for the control seeds.
    """
    pairs = [Comparison("shared_init", a, b) for a in dense for b in pruned if _same_start(a, b)]
    pairs += [
        Comparison("shared_start", a, b) for a in dense for b in reordered if _same_start(a, b)
    ]
    pairs += [
        Comparison("cross_init", a, b) for a in dense for b in pruned if not _same_start(a, b)
    ]
    pairs += [Comparison("warm_start", a, b) for a in dense for b in warm if _same_start(a, b)]
    return pairs


def control_arms(
    dense: Sequence[StartedT],
    reordered: Sequence[StartedT],
    rotated: Sequence[StartedT],
    untrained: Sequence[StartedT],
    warm: Sequence[StartedT] = (),
    rotated_warm: Sequence[StartedT] = (),
) -> list[Comparison[StartedT]]:
    """The arms that no pruning enters: ceilings, floors and `chance`.

    `ceiling_warm`: a dense SAE against itself after as many more steps on dense activations as
    `warm_start` has on pruned ones; `floor_warm`: on activations of a rotated space.
    """
    pairs = [
        Comparison("ceiling_shared", a, b) for a in dense for b in reordered if _same_start(a, b)
    ]
    pairs += [Comparison("floor_shared", a, b) for a in dense for b in rotated if _same_start(a, b)]
    pairs += [Comparison("ceiling_cross", a, b) for a, b in itertools.permutations(dense, 2)]
    pairs += [Comparison("chance", a, b) for a, b in itertools.permutations(untrained, 2)]
    pairs += [Comparison("ceiling_warm", a, b) for a in dense for b in warm if _same_start(a, b)]
    pairs += [
        Comparison("floor_warm", a, b) for a in dense for b in rotated_warm if _same_start(a, b)
    ]
    return pairs


def survival(comparisons: Iterable[Comparison[Dictionary]], taus: Sequence[float]) -> Survival:
    """Match every comparison in normalised and in raw coordinates. Source: methods §6, §7 RQ2."""
    rates, latents = [], []
    for comparison in comparisons:
        arm, a, b = comparison.arm, comparison.a, comparison.b
        seeds = {"init_a": a.init_seed, "order_a": a.data_seed}
        seeds |= {"init_b": b.init_seed, "order_b": b.data_seed}
        for coordinates in COORDINATES:
            raw = coordinates == "raw"
            left = a.decoder * a.sigma if raw else a.decoder
            right = b.decoder * b.sigma if raw else b.decoder
            matches = match_dictionaries(left, right, lowest_tau=min(taus))
            for tau in taus:
                row = match_rates(matches, tau)._asdict()
                rates.append({"arm": arm, "coordinates": coordinates, **seeds, **row})
            if not raw:
                latents.append(_latents(arm, seeds, matches))
    return Survival(pd.DataFrame(rates), pd.concat(latents, ignore_index=True))


def corrected_survival(pruned: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    """MNN survival between its floor and its ceiling, per tau (methods §7).

    (measured - floor) / (ceiling - floor), from rates averaged over seeds; both tables are
    `Survival.rates`. NaN, with a reason, where ceiling and floor are closer than 0.02. Seeds are
    left out in turn for the interval; one control seed gives none.
    Returns: columns arm, tau, corrected, low, high, interval, reason.
    """
    rows = []
    for arm, names in CORRECTIONS.items():
        if names[0] not in set(pruned["arm"]):
            continue
        for tau in sorted(pruned["tau"].unique()):
            parts = [
                _mnn_by_seeds(table, name, tau)
                for name, table in zip(names, (pruned, controls, controls), strict=True)
            ]
            units = sorted(set.intersection(*(set(part) for part in parts)))
            measured, floor, ceiling = (np.array([part[u] for u in units]) for part in parts)

            def ratio(kept: np.ndarray, m=measured, f=floor, c=ceiling) -> float:  # type: ignore[no-untyped-def]
                span = (c - f)[kept].mean() if kept.any() else np.nan
                return float((m - f)[kept].mean() / span) if span >= SMALLEST_GAP else np.nan

            value = ratio(np.ones(len(units), dtype=bool))
            reason = ""
            if np.isnan(value):
                gap = float(np.mean(ceiling - floor))
                reason = f"{names[2]} - {names[1]} = {gap:.4f} is below {SMALLEST_GAP}"
            seeds = sorted({seed for unit in units for seed in unit})
            without = [ratio(np.array([seed not in unit for unit in units])) for seed in seeds]
            found = jackknifed(value, np.array(without), "seeds", fewest=2)
            kind = "seeds left out, t" if found.error > 0 else ""
            reason = reason or ("" if kind else found.resampled)
            rows.append((arm, tau, value, found.low, found.high, kind, reason))
    columns = ["arm", "tau", "corrected", "low", "high", "interval", "reason"]
    return pd.DataFrame(rows, columns=columns)


def _same_start(a: Started, b: Started) -> bool:
    return a.init_seed == b.init_seed


def _latents(arm: str, seeds: dict[str, int], matches: Matches) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": arm,
            **seeds,
            "latent": np.arange(len(matches.best_in_b)),
            "match": matches.best_in_b,
            "cosine": matches.similarity_a,
            "mutual": matches.mutual,
        }
    )


def _mnn_by_seeds(rates: pd.DataFrame, arm: str, tau: float) -> dict[tuple[int, ...], float]:
    """MNN in normalised coordinates, keyed by the starts that it rests on: (s,) or (s, t)."""
    chosen = rates[
        (rates["arm"] == arm) & (rates["coordinates"] == "normalised") & (rates["tau"] == tau)
    ]
    return {
        (a,) if a == b else (a, b): mnn
        for a, b, mnn in zip(chosen["init_a"], chosen["init_b"], chosen["mnn"], strict=True)
    }
