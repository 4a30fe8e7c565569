"""One row per run: the means that the page shows first."""

from __future__ import annotations

import pandas as pd

KEYS = ["run", "model", "method", "sparsity"]
SITE = ["model", "layer"]


def pruned_runs(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One row per pruned run of any of the tables, with KEYS and layer."""
    found = [part.loc[part["method"] != "dense", [*KEYS, "layer"]] for part in parts if len(part)]
    if not found:
        return pd.DataFrame()
    return pd.concat(found).drop_duplicates("run").reset_index(drop=True)


def of_run(made: pd.DataFrame, rows: pd.DataFrame, column: str, **where: str) -> pd.Series:
    """The mean of a column over each run's rows with those values; NaN where there are none."""
    for name, value in where.items():
        rows = rows[rows[name] == value] if len(rows) else rows
    if not len(rows):
        return pd.Series(float("nan"), index=made.index)
    return made["run"].map(rows.groupby("run")[column].mean())


def of_dense(made: pd.DataFrame, rows: pd.DataFrame, column: str, arm: str) -> pd.Series:
    """The mean of a control arm at each run's site."""
    rows = rows[rows["arm"] == arm] if len(rows) else rows
    if not len(rows):
        return pd.Series(float("nan"), index=made.index)
    means = rows.groupby(SITE)[column].mean().rename("found")
    return made[SITE].join(means, on=SITE)["found"]
