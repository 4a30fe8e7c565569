"""The paper's numbers beside a study's own, where model, method and sparsity agree."""

from __future__ import annotations

import functools

import pandas as pd

from prunelens.paper import published

AGREEING = r"dense|magnitude-global-[0-9.]+(-head)?|wanda-row-[0-9.]+"  # how the paper prunes
DECIMALS = 6  # sparsities that agree so far are the same
LAYER = "paper_layer"
KEYS = ["model", "method", "sparsity"]


def beside_published(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """The rows with the columns of the paper's table, each named `paper_*`; NaN where none agrees.

    A row agrees in model, method and sparsity, where the method includes the scope (magnitude:
    global; Wanda: row) and the calibration on the dense model, as the run's name says. Magnitude
    agrees with the output head and without it: the paper leaves that open.
    `paper_layer` is the layer that the paper's number was measured at.

    Args:
        rows: with columns run, model, method, sparsity.
        table: as `prunelens.paper.published` names it.
    """
    agrees = condition_of(rows["run"]).str.fullmatch(AGREEING).fillna(False).astype(bool)
    asked = rows[KEYS].assign(sparsity=rows["sparsity"].astype(float).round(DECIMALS))
    found = asked.merge(_theirs(table), on=KEYS, how="left").drop(columns=KEYS)
    found = found.set_axis(rows.index).where(agrees, other=float("nan"))
    return pd.concat([rows, found], axis=1)


@functools.cache
def _theirs(table: str) -> pd.DataFrame:
    """The paper's table under the names that it has beside a study's own."""
    theirs = published(table).drop(columns="tau", errors="ignore")
    if table != "perplexity":
        theirs[LAYER] = theirs["model"].map(main_layers())
    theirs["sparsity"] = theirs["sparsity"].round(DECIMALS)
    names = {name: f"paper_{name.removeprefix('paper_')}" for name in theirs if name not in KEYS}
    return theirs.rename(columns=names)


def condition_of(runs: pd.Series) -> pd.Series:
    """The last part of run names, as wanda-row-0.30."""
    return runs.astype(str).str.rsplit("/", n=1).str[-1]


def main_layers() -> dict[str, int]:
    """The layer at which the paper's tables were measured, by model."""
    matrix = published("matrix")
    main = matrix[matrix["purpose"] != "layer depth"]
    return {row.model: int(row.layers) for row in main.itertuples()}
