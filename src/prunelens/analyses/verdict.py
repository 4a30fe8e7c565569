"""Keep, refit or retrain: what RQ3's numbers mean for an SAE (methods §7)."""

from __future__ import annotations

import pandas as pd

FVU_FACTOR, CE_MARGIN = 1.25, 0.02
TRANSFER_RULE = (
    f"keep if, as it is, fvu_dense_var <= {FVU_FACTOR} x its dense value and ce_recovered >= its"
    f" dense value - {CE_MARGIN}; refit if that holds after refitting b_dec or thresholds;"
    " else retrain"
)


def transfer_verdicts(dense_rows: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one pruned model with their verdict by TRANSFER_RULE.

    One verdict per SAE and position set, on each of its rows; empty, with the reason, where a
    number that decides it is NaN.
    """
    result = rows.copy()
    keys = ["sae", "positions"]
    references = dense_rows[dense_rows["refit"] == "none"].set_index(keys)
    for key, group in rows.groupby(keys, sort=False):
        verdict, why = _verdict(references.loc[key], group)
        result.loc[group.index, "verdict"] = verdict
        if why:
            reasons = [f"{old}; {why}" if old else why for old in group["reason"]]
            result.loc[group.index, "reason"] = reasons
    return result


def _verdict(reference: pd.Series, group: pd.DataFrame) -> tuple[str, str]:
    passed = {row["refit"]: _passes(reference, row) for _, row in group.iterrows()}
    if passed["none"] is None:
        return "", "no verdict: fvu_dense_var or ce_recovered is undefined"
    if passed["none"]:
        return "keep", ""
    after = [passed[name] for name in passed if name != "none"]
    if any(after):
        return "refit", ""
    if None in after:
        return "", "no verdict: fvu_dense_var or ce_recovered after refitting is undefined"
    return "retrain", ""


def _passes(reference: pd.Series, row: pd.Series) -> bool | None:
    """Whether a row is as good as the dense one by TRANSFER_RULE; None where that is undefined."""
    columns = ["fvu_dense_var", "ce_recovered"]
    if reference[columns].isna().any() or row[columns].isna().any():
        return None
    enough = row["ce_recovered"] >= reference["ce_recovered"] - CE_MARGIN
    return bool(row["fvu_dense_var"] <= FVU_FACTOR * reference["fvu_dense_var"] and enough)
