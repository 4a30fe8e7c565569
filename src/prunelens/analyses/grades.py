"""How well each measure tells the truth, in the planted world where the truth is known.

A latent's truth is the fate of the planted direction that its decoder row is nearest to. A measure
is asked four things: does it tell survived latents from destroyed ones, does it give the angle
that was planted, does it depend on firing rate where the truth does not, and does it say anything
where nothing is there. Marks are set here, once; a measure that misses its mark is to be improved,
or decides nothing.
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
from prunelens.analyses.fragility import fragility_contrasts
from prunelens.analyses.measures import FIRST_HALF, LatentMeasure, latent_measures
from prunelens.analyses.persistence import relative_to_noise
from prunelens.analyses.statistics import Estimate, RankSample, rank_correlation
from prunelens.columns import meanings_of
from prunelens.match import TAU, unit_rows

AUC_MARK = 0.95
FALSE_SURVIVAL_MARK = 0.5
RHO_MARK = 0.1  # |rate_rho - truth_rho|; an interval alone gets wider the less is measured
COLUMNS = """
measure
step: Training step of a row of `shared_init` at a checkpoint; empty at the end of training.
threshold: From which on (and mutual, of a match) a latent is called survived.
num_latents: Living latents of the dense SAEs.
share_defined: Share of these for which the measure has a value; grades are over those alone.
auc precision recall: Telling survived (kept, rescaled) from destroyed (removed, rotated) latents;
    to matching by activations, which does not look at directions, rotated ones survived.
false_survival: Share of the destroyed that is called survived.
bias: Mean over survived ones of the measure minus the planted cosine, or, of `scaling`, the
    multiple of the direction that is there.
bias_rotated: `bias` over rotated ones.
rate_rho: Rank correlation of the measure with firing rate, whatever the fate.
rate_low rate_high: Ends of its 95 % interval, over seeds and latents.
truth_rho: `rate_rho` of the truth: the share of the feature that is left, or, for matching by
    activations, how much fires where it did.
follows_rate: Whether it is shown to depend on firing rate as the truth does; else False.
mark: What the measure has to reach; empty where nothing is asked.
passed
reason: What it misses.
share_rho: Rank correlation of measure and truth, whatever the rate.
"""
NULL_COLUMNS = """
measure: As in `selftest.csv`; `beyond_noise` is the predictor's target.
source: `null`; in the world `none` also `pruned`.
statistic: `Q1 - Q5`, `all`, or the rank correlation with firing rate.
value: What was found; its interval is over latents and documents.
low high
nothing: What it should be.
says_nothing: Whether the interval holds that.
mark: p at least 0.001; empty where no claim is decided by the row.
passed
reason: What it misses.
"""

GRADED = (*planted.SURVIVES, *planted.DESTROYED)  # of the others a part survived
SAME_TOKENS = (*planted.SURVIVES, "rotated")  # a rotated direction fires where it did before
FIRES_AS_BEFORE = (*planted.SURVIVES, *planted.PARTLY, "rotated")


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
NO_EFFECT = f"no effect of firing rate: interval covers 0, rho within {RHO_MARK} of the truth's"
RATE_MARKS: dict[planted.Choice, str] = {
    "independent": NO_EFFECT,
    "none": NO_EFFECT,
    "by_rate": "finds the effect of firing rate: interval above 0,"
    f" rho within {RHO_MARK} of the truth's",
}
SMALLEST_P = 0.001  # of what is found where nothing is; a dozen rows are marked
NULL_MARK = f"nothing is found where nothing is: p at least {SMALLEST_P}"
GROUP_RATIOS = ("relative_isotropic", "relative_shuffled")
WITH_RATE = "rank correlation with firing rate"
DECIDES = {  # measure -> statistics that claims are decided by: what they say of nothing is marked
    "relative_shuffled": ("Q1 - Q5", "all", WITH_RATE),
    "scaling": (WITH_RATE,),
    "beyond_noise": (WITH_RATE,),
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
        removed, split or merged), true_scale (what scaling measures: the part of the later
        direction, with the gains of its dimensions, along the earlier one, in lengths of the
        earlier one, times the factor of its activations; 0 where it was removed, NaN where it was
        split or merged) and true_share (`Truth.shares`).
    """
    earlier, later = (world.directions[:, 0] / sigma for world in (before, after))
    recovered, nearest = (unit_rows(decoder) @ unit_rows(earlier).T).max(1)
    fates = np.array(truth.fates)[nearest.numpy()]
    cosines = (unit_rows(earlier) * unit_rows(later)).sum(1)
    scales = after.scales * (earlier * later * after.gains).sum(1) / earlier.square().sum(1)
    cosine, scale, share = (
        each[nearest].numpy().astype(float) for each in (cosines, scales, truth.shares)
    )
    one_direction = np.isin(fates, FIRES_AS_BEFORE)
    cosine[~one_direction] = scale[~one_direction] = math.nan
    scale[fates == "removed"] = 0.0
    columns = {"direction": nearest.numpy(), "recovered": recovered.numpy(), "fate": fates}
    known = {"true_cosine": cosine, "true_scale": scale, "true_share": share}
    table = pd.DataFrame({**columns, **known})
    return table.reset_index(names="latent")


def grades(fates: pd.DataFrame, *, choice: planted.Choice) -> pd.DataFrame:
    """One row per measure that `fates` has, with COLUMNS.

    Args:
        fates: one row per seed and latent, as `analyses.fates` makes it, with `latent_truth`'s
            columns.
        choice: what the planted fates depend on.
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
            truth, rate = _amounts(fates, measure), fates[values[name].rate].to_numpy(dtype=float)
            row |= _rate(fates, value, truth, rate)
            row["share_rho"] = rank_correlation(_samples(fates, value, truth, value)).value
            row["follows_rate"] = _follows_rate(row, choice)
            rows.append(row | _judged(name, row, choice))
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(COLUMNS)])


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
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(COLUMNS)])


def null_grades(fates: pd.DataFrame, *, choice: planted.Choice) -> pd.DataFrame:
    """What measures that read pruned activations find where nothing is, with NULL_COLUMNS.

    On the null arm, where noise stands in the place of the pruned activations; in the world `none`
    on these as well, to which nothing was done but gains and noise.

    Args: fates: as for `grades`.
    """
    rows = []
    contrasts = fragility_contrasts(fates)
    for source in ("pruned", "null") if choice == "none" else ("null",):
        for part in contrasts[contrasts["source"] == source].itertuples():
            if part.measure in GROUP_RATIOS and part.group in ("Q1 - Q5", "all"):
                found = Estimate(part.value, part.error, part.df, part.resampled)
                nothing = 1.0 if part.group == "all" else 0.0
                rows.append(_of_nothing(part.measure, source, part.group, found, nothing))
        measures = latent_measures(fates, source)
        for name in latent_measures(fates, "null"):
            found = correlation_with_rate(fates, measures[name])
            rows.append(_of_nothing(name, source, WITH_RATE, found, 0.0))
        target = LatentMeasure(_beyond_noise(fates, source), None, FIRST_HALF)
        found = correlation_with_rate(fates, target)
        rows.append(_of_nothing("beyond_noise", source, WITH_RATE, found, 0.0))
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(NULL_COLUMNS)])


def correlation_with_rate(fates: pd.DataFrame, measure: LatentMeasure) -> Estimate:
    """Rank correlation of a measure with firing rate, over latents and documents."""
    rate, means = fates[measure.rate].to_numpy(dtype=float), measure.means
    without = None
    if means is not None:
        without = relative_to_noise(means.above_without, means.below_without)
    known = np.where(rate > 0, measure.value, np.nan)
    return rank_correlation(_samples(fates, rate, measure.value, known, without))


def _beyond_noise(fates: pd.DataFrame, source: str) -> np.ndarray:
    """The predictor's target: 1 above the median of the draws of shuffled noise, else 0."""
    own = fates["persistence" if source == "pruned" else f"persistence_{source}"].to_numpy(float)
    median = np.median(np.stack(fates["persistence_noise_shuffled_draws"]), axis=1)
    return np.where(np.isnan(own), np.nan, own > median)


def _of_nothing(
    measure: str, source: str, statistic: str, found: Estimate, nothing: float
) -> dict[str, Any]:
    """A row of `null_grades`."""
    row = {"measure": measure, "source": source, "statistic": statistic, "value": found.value}
    row |= {"low": found.low, "high": found.high, "nothing": nothing}
    row["says_nothing"] = bool(found.low <= nothing <= found.high)
    if statistic in DECIDES.get(measure, ()):
        p = 2 * min(found.p_above(nothing), found.p_below(nothing))
        row |= _verdict({NULL_MARK: bool(p >= SMALLEST_P)})
    return row


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
        name: float(np.mean(chosen)) if len(chosen := _of(fates, off, which)) else math.nan
        for name, which in groups.items()
    }


def _of(fates: pd.DataFrame, values: np.ndarray, which: Sequence[str]) -> np.ndarray:
    chosen = values[fates["fate"].isin(which).to_numpy()]
    return chosen[~np.isnan(chosen)]


def _amounts(fates: pd.DataFrame, measure: Measure) -> np.ndarray:
    """How much of every latent's feature is left, of what this measure looks at."""
    if measure.survives == planted.SURVIVES:
        return fates["true_share"].to_numpy(dtype=float)
    neither = fates["fate"].isin(("split", "merged"))
    return np.select([fates["fate"].isin(FIRES_AS_BEFORE), neither], [1.0, 0.5], default=0.0)


def _rate(
    fates: pd.DataFrame, value: np.ndarray, truth: np.ndarray, rate: np.ndarray
) -> dict[str, float]:
    known = np.where(rate > 0, value, np.nan)
    found = rank_correlation(_samples(fates, rate, known, known))
    of_truth = rank_correlation(_samples(fates, rate, truth, known))
    return {
        "rate_rho": found.value,
        "rate_low": found.low,
        "rate_high": found.high,
        "truth_rho": 0.0 if np.ptp(truth) == 0 else of_truth.value,  # nothing that could follow
    }


def _samples(
    fates: pd.DataFrame,
    x: np.ndarray,
    y: np.ndarray,
    known: np.ndarray,
    without: np.ndarray | None = None,
) -> list[RankSample]:
    """The latents of every seed where `known` is; control arms are there for the first alone.

    `without`: y without each group of documents, of a measure of tokens.
    """
    given = fates["init_retention"].to_numpy(dtype=float)
    without = np.empty((len(fates), 0)) if without is None else without
    samples = []
    for seed in fates["seed"].unique():
        rows = (fates["seed"] == seed).to_numpy() & ~np.isnan(known)
        if rows.any():
            samples.append(RankSample(x[rows], y[rows], without[rows], given[rows]))
    return samples


def _follows_rate(row: dict[str, Any], choice: planted.Choice) -> bool:
    """No effect of firing rate where none was planted, and the planted one where there is one."""
    near = abs(row["rate_rho"] - row["truth_rho"]) <= RHO_MARK
    if choice == "by_rate":
        return bool(near and row["rate_low"] > 0)
    return bool(near and row["rate_low"] <= 0 <= row["rate_high"])


def _judged(name: str, row: dict[str, Any], choice: planted.Choice) -> dict[str, str | bool]:
    """The marks of a measure, and which it missed; nothing where it has none."""
    marks: dict[str, bool] = {}
    if name in SEPARATES and choice != "none":
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
