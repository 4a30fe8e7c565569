"""Keep, refit, retrain or undecided: what RQ3's numbers mean for an SAE (methods §10).

Three numbers compare an SAE on a pruned model with itself, as it is, on the dense one: the same
tokens, the same windows. Each has an interval over documents, and the verdict asks where that lies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64, Int
from torch import Tensor

from prunelens.analyses.statistics import Estimate, jackknifed

FVU_FACTOR, CE_MARGIN = 1.25, 0.02
TRANSFER_RULE = (
    f"an SAE passes if fvu_dense_var and fvu_raw are at most {FVU_FACTOR} x their dense values and"
    f" ce_recovered is at most {CE_MARGIN} below its dense one, each with its whole 95 % interval"
    " over documents, and fails if one interval lies wholly beyond; keep if it passes as it is;"
    " refit if it fails and passes after refitting b_dec or thresholds; retrain if that fails, too;"
    " undecided where an interval holds its limit and nothing else decides"
)
NULL_AGREES = "noise of equal size is judged the same"
GROUPS = "groups of documents"


class Limit(NamedTuple):
    """Of one number of the verdict."""

    most: float
    """What it may be."""
    unchanged: float
    """What it is where nothing differs from the dense model."""


LIMITS = {
    "fvu_dense_var_ratio": Limit(FVU_FACTOR, 1.0),
    "fvu_raw_ratio": Limit(FVU_FACTOR, 1.0),
    "ce_drop": Limit(CE_MARGIN, 0.0),
}


class Recovery(NamedTuple):
    """Sums of nats over the predictions of each group of documents."""

    model: Float[np.ndarray, " groups"]
    """The model as it is."""
    mean_ablated: Float[np.ndarray, " groups"]
    """With the mean activation at the site."""
    sae: Float[np.ndarray, " groups"]
    """With the SAE's reconstruction there."""

    @classmethod
    def by_group(
        cls,
        model: Float64[Tensor, " windows"],
        mean_ablated: Float64[Tensor, " windows"],
        sae: Float64[Tensor, " windows"],
        groups: Int[Tensor, " first_windows"],
    ) -> Recovery:
        """From sums per window, of as many windows as have a group."""
        parts = (model, mean_ablated, sae)
        return cls(*(np.bincount(groups, weights=part[: len(groups)]) for part in parts))

    def shares(self) -> Float[np.ndarray, " replicates"]:
        """Cross-entropy recovered: of everything, then without each group.

        NaN unless the ablation does harm.
        """
        model, ablated, sae = (_leave_one_out(part) for part in self)
        harm = ablated - model
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(harm > 0, (ablated - sae) / harm, math.nan)


def ratio_estimate(
    error: Float[np.ndarray, " groups"],
    variance: Float[np.ndarray, " groups"],
    dense_error: Float[np.ndarray, " groups"],
    dense_variance: Float[np.ndarray, " groups"],
) -> Estimate:
    """How many times the dense FVU an FVU is: (error / variance) / (dense_error / dense_variance).

    Args: sums over the tokens of each group of documents; of the variance, of squared distances
        from the mean of all tokens. For `fvu_dense_var` both variances are the dense one.
    Returns: the delete-one-group jackknife of documents, the same ones left out of both models.
    """
    parts = (error, variance, dense_error, dense_variance)
    e, v, dense_e, dense_v = (_leave_one_out(part) for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (e / v) / (dense_e / dense_v)
    return jackknifed(float(ratios[0]), ratios[1:], GROUPS)


def drop_estimate(recovery: Recovery, dense: Recovery) -> Estimate:
    """How much less of the cross-entropy is recovered than in the dense model, on the same windows.

    Returns: the jackknife of `ratio_estimate`.
    """
    drops = dense.shares() - recovery.shares()
    return jackknifed(float(drops[0]), drops[1:], GROUPS)


def transfer_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one pruned model with their verdict by TRANSFER_RULE.

    One verdict per SAE, position set and source, on each of its rows. `reason` says which number
    leaves it undecided, and where noise of equal size (source `null`) gets the same verdict.
    """
    result = rows.copy()
    keys = ["sae", "positions", "source"]
    for _, group in rows.groupby(keys, sort=False):
        verdict, why = _verdict(group)
        result.loc[group.index, "verdict"] = verdict
        _add_reason(result, group.index, why)
    nulls = result[result["source"] == "null"].groupby(keys[:2])["verdict"].first()
    for key, group in result[result["source"] == "pruned"].groupby(keys[:2], sort=False):
        if nulls.get(key) == group["verdict"].iloc[0]:
            _add_reason(result, group.index, NULL_AGREES)
    return result


def _verdict(group: pd.DataFrame) -> tuple[str, str]:
    passed = {row["refit"]: _passes(row) for _, row in group.iterrows()}
    as_it_is = passed.pop("none")
    if as_it_is:
        return "keep", ""
    if as_it_is is None:
        return "undecided", _unknown(group[group["refit"] == "none"].iloc[0])
    if any(passed.values()):
        return "refit", ""
    for name, outcome in passed.items():
        if outcome is None:
            return "undecided", _unknown(group[group["refit"] == name].iloc[0])
    return "retrain", ""


def _passes(row: pd.Series) -> bool | None:
    """Whether a row is as good as the dense one; None where that is not known."""
    within = [_within(row, name) for name in LIMITS]
    if False in within:
        return False
    return None if None in within else True


def _within(row: pd.Series, name: str) -> bool | None:
    """Whether a number is within its limit; None where its interval does not say.

    Where nothing changed there is no interval, and none is needed.
    """
    limit, low, high = LIMITS[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(low):
        return True if row[name] == limit.unchanged else None
    if high <= limit.most:
        return True
    return False if low > limit.most else None


def _unknown(row: pd.Series) -> str:
    """Which numbers do not decide."""
    found = []
    for name, limit in LIMITS.items():
        if _within(row, name) is None:
            known = not math.isnan(row[f"{name}_low"])
            how = f"may lie on either side of {limit.most}" if known else "has no interval"
            found.append(f"{name} {how}")
    refit = "as it is" if row["refit"] == "none" else f"{row['refit']} refitted"
    return f"undecided: {refit}, {' and '.join(found)}"


def _add_reason(rows: pd.DataFrame, index: pd.Index, why: str) -> None:
    if why:
        old = rows.loc[index, "reason"]
        rows.loc[index, "reason"] = [f"{before}; {why}" if before else why for before in old]


def _leave_one_out(sums: Float[np.ndarray, " groups"]) -> Float[np.ndarray, " replicates"]:
    """The sum of everything, then without each group."""
    return np.concatenate([[sums.sum()], sums.sum() - sums])
