"""How well each measure tells the truth, in the planted world where the truth is known.

A latent's truth is the fate of the planted direction that its decoder row is nearest to. A measure
is asked three things: does it tell survived latents from destroyed ones, does it give the angle
that was planted, and does it depend on firing rate where the truth does not. Marks are set here,
once; a measure that misses its mark is to be improved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from prunelens import planted
from prunelens.analyses.measures import latent_measures
from prunelens.analyses.statistics import RankSample, rank_correlation
from prunelens.match import unit_rows

TAU = 0.7
AUC_MARK = 0.95
FALSE_SURVIVAL_MARK = 0.5
RHO_MARK = 0.1  # |rate_rho - truth_rho|; an interval alone gets wider the less is measured
COLUMNS = [
    "measure", "step", "threshold", "num_latents", "share_defined", "auc", "precision", "recall",
    "false_survival", "bias", "bias_rotated", "rate_rho", "rate_low", "rate_high", "truth_rho",
    "follows_rate", "mark", "passed", "reason",
]  # fmt: skip

GRADED = (*planted.SURVIVES, *planted.DESTROYED)  # split and merged are neither
SAME_TOKENS = (*planted.SURVIVES, "rotated")  # a rotated direction fires where it did before


class Measure(NamedTuple):
    """A number per latent that is to tell whether its feature survived."""

    threshold: float
    """At or above it the latent counts as survived; a match must be mutual as well."""
    truth: Literal["", "cosine", "scale"] = ""
    """What it should equal: `latent_truth`'s true_cosine or true_scale; nothing in particular where
    empty."""
    survives: tuple[str, ...] = planted.SURVIVES
    """The fates that it should call survived, against the others of GRADED."""


MEASURES = {
    "shared_init": Measure(TAU, "cosine"),
    "shared_start": Measure(TAU, "cosine"),
    "cross_init": Measure(TAU, "cosine"),
    "warm_start": Measure(TAU, "cosine"),
    "persistence": Measure(TAU),
    "persistence_jaccard": Measure(0.5),
    "relative_isotropic": Measure(TAU),
    "relative_shuffled": Measure(TAU),
    "excess_isotropic": Measure(0.0),
    "excess_shuffled": Measure(0.0),
    "scaling": Measure(0.5, "scale"),
    "activation_shared_init": Measure(TAU, survives=SAME_TOKENS),
    "activation_cross_init": Measure(TAU, survives=SAME_TOKENS),
    "subspace_shared_init": Measure(TAU),
    "subspace_cross_init": Measure(TAU),
}
SEPARATES = ("persistence", "relative_shuffled", "scaling", "activation_cross_init")
FOLLOWS_RATE = ("relative_shuffled", "scaling")  # only where the truth does: controlled RQ4
RATE_MARKS: dict[planted.Choice, str] = {
    "independent": "no effect of firing rate: interval covers 0,"
    f" rho within {RHO_MARK} of the truth's",
    "by_rate": "finds the effect of firing rate: interval above 0,"
    f" rho within {RHO_MARK} of the truth's",
}


def latent_truth(
    decoder: Float[Tensor, "latents d_model"],
    sigma: Float[Tensor, " d_model"],
    before: planted.World,
    after: planted.World,
    truth: planted.Truth,
) -> pd.DataFrame:
    """The fate of the planted direction nearest to every latent of a dense SAE.

    Args:
        decoder, sigma: rows in normalised coordinates, and the deviations of those.
        before, after, truth: the world, dense and pruned.
    Returns: latent, direction, recovered (cosine of the decoder row to that direction), fate,
        true_cosine (between that direction before and after, both divided by the dense `sigma`,
        also where the pruned SAE was trained in coordinates of its own; NaN where the direction was
        removed, split or merged) and true_scale (what scaling measures: the part of the later
        direction along the earlier one, in lengths of the earlier one, times the factor of its
        activations; 0 where it was removed, NaN where it was split or merged).
    """
    earlier, later = (world.directions[:, 0] / sigma for world in (before, after))
    recovered, nearest = (unit_rows(decoder) @ unit_rows(earlier).T).max(1)
    fates = np.array(truth.fates)[nearest.numpy()]
    cosines = (unit_rows(earlier) * unit_rows(later)).sum(1)
    scales = after.scales * (earlier * later).sum(1) / earlier.square().sum(1)
    cosine, scale = (each[nearest].numpy().astype(float) for each in (cosines, scales))
    one_direction = np.isin(fates, ("kept", "rescaled", "rotated"))
    cosine[~one_direction] = scale[~one_direction] = math.nan
    scale[fates == "removed"] = 0.0
    columns = {"direction": nearest.numpy(), "recovered": recovered.numpy(), "fate": fates}
    table = pd.DataFrame({**columns, "true_cosine": cosine, "true_scale": scale})
    return table.reset_index(names="latent")


def grades(fates: pd.DataFrame, *, choice: planted.Choice, seed: int = 0) -> pd.DataFrame:
    """One row per measure that `fates` has, with COLUMNS.

    Args:
        fates: one row per seed and latent, as `analyses.fates` makes it, with `latent_truth`'s
            columns.
        choice: what the planted fates depend on.
        seed: of the bootstrap.
    Returns: `share_defined`: share of the alive latents with a fate of GRADED, over all seeds, for
        which the measure has a value (the others count nowhere else); `auc`, `precision`, `recall`
        of survived (kept, rescaled) against destroyed (removed, rotated) alive latents with a value
        (for matching by activation, which does not look at directions, rotated ones survived);
        `false_survival`: share of the destroyed ones that the measure calls survived; `bias`: mean
        of measure minus truth over survived ones, `bias_rotated` over rotated ones; `rate_rho` with
        a 95 % interval (bootstrap of seeds, and latents within each): rank correlation with firing
        rate over all of them, split and merged ones included; `truth_rho`: that of the truth itself
        (1 for what the measure is to call survived, 0.5 for split and merged, 0 otherwise);
        `follows_rate`: whether the former is shown to be that of the truth, by the rule of
        RATE_MARKS (False where it is undefined). `passed` is NaN without a mark.
    """
    values = latent_measures(fates)
    alive = fates["alive"].to_numpy()
    rows = []
    for name, measure in MEASURES.items():
        if name in values:
            value = np.where(alive, values[name].value, np.nan)
            row: dict[str, Any] = {"measure": name, "threshold": measure.threshold}
            row |= _separation(fates, value, values[name].mutual, measure)
            row |= _bias(fates, value, measure)
            truth = _amounts(fates["fate"], measure)
            row |= _rate(fates, value, truth, fates[values[name].rate].to_numpy(dtype=float), seed)
            row["follows_rate"] = _follows_rate(row, choice)
            rows.append(row | _judged(name, row, choice))
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def undertrained_grades(matches: pd.DataFrame) -> pd.DataFrame:
    """What the shared-init arm says of destroyed latents, by training step.

    Args: matches: step, cosine, mutual, fate (of the direction nearest to the row at that step).
    Returns: rows with COLUMNS; the first step is marked: a tool that cannot show how a shared
        start feigns survival would not notice it in a study either.
    """
    rows = []
    for step, part in matches.groupby("step") if matches["step"].nunique() > 1 else ():
        destroyed = part[part["fate"].isin(planted.DESTROYED)]
        survived = ((destroyed["cosine"] >= TAU) & destroyed["mutual"]).mean()
        row = {"measure": "shared_init", "step": step, "threshold": TAU}
        row |= {"num_latents": len(part), "false_survival": float(survived)}
        if step == matches["step"].min():
            mark = f"false survival of hardly trained SAEs >= {FALSE_SURVIVAL_MARK}"
            row |= _verdict({mark: bool(survived >= FALSE_SURVIVAL_MARK)})
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def _separation(
    fates: pd.DataFrame, value: np.ndarray, mutual: np.ndarray | None, measure: Measure
) -> dict[str, float]:
    known = ~np.isnan(value)
    survived = fates["fate"].isin(measure.survives).to_numpy() & known
    destroyed = fates["fate"].isin(set(GRADED) - set(measure.survives)).to_numpy() & known
    said = value >= measure.threshold
    if mutual is not None:
        said &= mutual
    graded = survived | destroyed
    alive = fates["alive"].to_numpy(dtype=bool) & fates["fate"].isin(GRADED).to_numpy()
    return {
        "num_latents": int(graded.sum()),
        "share_defined": _share(graded, alive),
        "auc": _auc(value[survived], value[destroyed]),
        "precision": _share(survived, said & graded),
        "recall": _share(said, survived),
        "false_survival": _share(said, destroyed),
    }


def _bias(fates: pd.DataFrame, value: np.ndarray, measure: Measure) -> dict[str, float]:
    if not measure.truth:
        return {"bias": math.nan, "bias_rotated": math.nan}
    off = value - fates[f"true_{measure.truth}"].to_numpy()
    groups = {"bias": planted.SURVIVES, "bias_rotated": ("rotated",)}
    return {
        name: float(np.nanmean(chosen)) if len(chosen := _of(fates, off, which)) else math.nan
        for name, which in groups.items()
    }


def _of(fates: pd.DataFrame, values: np.ndarray, which: Sequence[str]) -> np.ndarray:
    chosen = values[fates["fate"].isin(which).to_numpy()]
    return chosen[~np.isnan(chosen)]


def _amounts(fates: pd.Series, measure: Measure) -> np.ndarray:
    """How much of every latent's feature is left, of what this measure looks at."""
    neither = ~fates.isin(GRADED)
    return np.select([fates.isin(measure.survives), neither], [1.0, 0.5], default=0.0)


def _rate(
    fates: pd.DataFrame, value: np.ndarray, truth: np.ndarray, rate: np.ndarray, seed: int
) -> dict[str, float]:
    given = fates["init_retention"].to_numpy(dtype=float)
    samples: list[list[RankSample]] = [[], []]
    for each in fates["seed"].unique():
        rows = (fates["seed"] == each).to_numpy() & (rate > 0) & ~np.isnan(value)
        for which, numbers in zip(samples, (value, truth), strict=True):
            if rows.any():  # control arms are there for the first seeds alone
                no_groups = np.empty((int(rows.sum()), 0))
                which.append(RankSample(rate[rows], numbers[rows], no_groups, given[rows]))
    found, of_truth = map(rank_correlation, samples)
    return {
        "rate_rho": found.value,
        "rate_low": found.low,
        "rate_high": found.high,
        "truth_rho": of_truth.value,
    }


def _follows_rate(row: dict[str, Any], choice: planted.Choice) -> bool:
    """No effect of firing rate where none was planted, and the planted one where there is one."""
    near = abs(row["rate_rho"] - row["truth_rho"]) <= RHO_MARK
    if choice == "independent":
        return bool(near and row["rate_low"] <= 0 <= row["rate_high"])
    return bool(near and row["rate_low"] > 0)


def _judged(name: str, row: dict[str, Any], choice: planted.Choice) -> dict[str, str | bool]:
    """The marks of a measure, and which it missed; nothing where it has none."""
    marks: dict[str, bool] = {}
    if name in SEPARATES:
        marks[f"AUC >= {AUC_MARK}"] = row["auc"] >= AUC_MARK
    if name in FOLLOWS_RATE:
        marks[RATE_MARKS[choice]] = row["follows_rate"]
    return _verdict(marks) if marks else {}


def _verdict(marks: dict[str, bool]) -> dict[str, str | bool]:
    """Of marks, and whether each was reached."""
    missed = [mark for mark, reached in marks.items() if not reached]
    reason = f"misses: {'; '.join(missed)}" if missed else ""
    return {"mark": "; ".join(marks), "passed": not missed, "reason": reason}


def _auc(above: np.ndarray, below: np.ndarray) -> float:
    """Chance that a survived latent has the larger value; ties count half."""
    if not len(above) or not len(below):
        return math.nan
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([above, below]))[: len(above)]
    return float((ranks.sum() - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float((part & whole).sum() / whole.sum()) if whole.any() else math.nan
