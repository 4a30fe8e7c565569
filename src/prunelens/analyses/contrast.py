"""What a contrast is, and how its rows are read from a study's tables.

The conditions are the study's own. What varies is said beside every interval: seeds, which are left
out in turn; documents and latents; windows of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd

from prunelens.analyses.statistics import Estimate, jackknife_over_seeds, mean_over
from prunelens.match import TAU

Found = TypeVar("Found")
Side = Literal["above", "below", "within"]
Tables = Mapping[str, pd.DataFrame]
SITE = ["model", "layer"]
QUESTIONS = {  # by table
    "fragility_by_seed": "fragility",
    "fragility_contrasts": "fragility",
    "perplexity_windows": "perplexity",
}
LOW_SPARSITY = 0.3  # the paper's "low sparsity", where it compares survival with the seed floor
SEED_FLOOR = 18  # the lower end of the paper's 18-29


class Contrast(NamedTuple):
    """A number with its interval, and where it should lie for the claim to be right."""

    name: str
    estimate: Estimate
    side: Side
    """Of `limit`; `within`: between -limit and limit."""
    limit: float
    null: Estimate | None = None
    """The same on the null, where nothing is there; None: it reads no pruned activations, or asks
    for a level that noise reaches too."""
    nothing: float | None = 0.0
    """What the null should give; None: the contrast asks for a level, which noise of that size may
    miss as well, and then it is not pruning that misses it."""

    @property
    def speaks_on_null(self) -> bool:
        """Whether it finds something where nothing is: then it may decide nothing."""
        if self.null is None or self.nothing is None:
            return False
        return not self.null.low <= self.nothing <= self.null.high


class NotMeasuredError(Exception):
    """The study's tables do not hold what a contrast needs; says what."""


def rows_of(tables: Tables, name: str, **where: object) -> pd.DataFrame:
    """The rows whose columns have those values; NotMeasuredError where there are none."""
    if name not in tables:
        question = QUESTIONS.get(name, name)
        raise NotMeasuredError(f"nothing on {question!r}: is it among the study's questions?")
    rows = tables[name]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if rows.empty:
        asked = ", ".join(f"{column} {value}" for column, value in where.items())
        raise NotMeasuredError(f"{name} has no rows with {asked}")
    return rows


def arm_rows(tables: Tables, arm: str) -> pd.DataFrame:
    """One arm of RQ2 at the primary tau, in normalised coordinates."""
    return rows_of(tables, "survival", arm=arm, coordinates="normalised", tau=TAU)


def quintile_rows(tables: Tables, measure: str) -> pd.DataFrame:
    """Survival by quintile, per run and seed."""
    rows = rows_of(tables, "fragility_by_seed", measure=measure, source="pruned")
    return rows[rows["tau"].isna() | (rows["tau"] == TAU)]


def wanda_minus_magnitude(rows: pd.DataFrame) -> pd.DataFrame:
    """`value` of Wanda minus magnitude per model, layer, sparsity (the unit `run`) and seed."""
    rows = as_published(rows)
    wide = rows.pivot_table(index=[*SITE, "sparsity", "seed"], columns="method", values="value")
    if not {"wanda", "magnitude"} <= set(wide):
        raise NotMeasuredError("no sparsity with both Wanda and magnitude")
    difference = (wide["wanda"] - wide["magnitude"]).dropna().rename("value").reset_index()
    if difference.empty:
        raise NotMeasuredError("no sparsity with both Wanda and magnitude")
    unit = difference[[*SITE, "sparsity"]].astype(str).agg(" ".join, axis=1)
    return difference.assign(run=unit)


def minus_dense(tables: Tables, column: str) -> pd.DataFrame:
    """A column of sae_quality, pruned minus dense, per run and seed."""
    rows = rows_of(tables, "sae_quality")
    dense = rows[rows["method"] == "dense"].set_index([*SITE, "seed"])[column].rename("dense")
    pruned = rows[rows["method"] != "dense"].join(dense, on=[*SITE, "seed"])
    found = pruned.assign(value=pruned[column] - pruned["dense"]).dropna(subset="value")
    if found.empty:
        raise NotMeasuredError("no pruned SAE beside a dense one")
    return found


def as_published(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every method the paper's form (magnitude global, Wanda by row), if it is there.

    So that a study with more forms compares one with one.
    """
    condition = rows["run"].str.rsplit("/", n=1).str[-1]
    published = condition.str.fullmatch(r"(magnitude-global|wanda-row)-[0-9.]+")
    has_it = rows["method"].isin(rows.loc[published, "method"])
    return rows[published | ~has_it]


def above_floor(name: str, rates: pd.DataFrame, floor: pd.Series) -> Contrast:
    """MNN minus 18 times the floor of that seed, at low sparsity: above 0."""
    rates = rates[rates["sparsity"] <= LOW_SPARSITY].join(floor.rename("floor"), on=[*SITE, "seed"])
    if rates.empty or rates["floor"].isna().all():
        raise NotMeasuredError("no condition up to 30 % sparsity with a floor")
    value = rates["mnn"] - SEED_FLOOR * rates["floor"]
    return over_seeds(name, rates.assign(value=value), "above", 0.0)


def over_seeds(name: str, rows: pd.DataFrame, side: Side, limit: float) -> Contrast:
    """The mean of `value` over runs; `seed`, or the pair `seed_a` and `seed_b`, varies."""
    columns = ["seed_a", "seed_b"] if "seed_a" in rows else ["seed"]
    seeds = list(rows[columns].itertuples(index=False, name=None))
    found = jackknife_over_seeds(rows.assign(condition=rows["run"], seeds=seeds))
    return Contrast(name, found, side, limit)


def over_conditions(name: str, rows: pd.DataFrame, side: Side, limit: float) -> Contrast:
    """The mean of `value` over runs where no seed enters: the conditions vary."""
    return Contrast(name, mean_over(rows["value"].tolist(), "conditions"), side, limit)


def estimate_of(row: Any, *, value: str = "value") -> Estimate:
    """What a table keeps of an estimate: value, error, df, resampled and, where they are, least,
    most and skew."""
    numbers = {name: getattr(row, name) for name in ("error", "df", "resampled")}
    ends = {name: getattr(row, name) for name in ("least", "most", "skew") if hasattr(row, name)}
    return Estimate(getattr(row, value), **numbers, **ends)


def with_null(rows: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Any, Any | None]]:
    """Every row of source `pruned` with that of `null` that has the same keys."""
    nulls = {
        tuple(getattr(row, key) for key in keys): row
        for row in rows[rows["source"] == "null"].itertuples()
    }
    for row in rows[rows["source"] == "pruned"].itertuples():
        yield row, nulls.get(tuple(getattr(row, key) for key in keys))


def not_empty(found: list[Found], otherwise: str) -> list[Found]:
    """`found`, if it holds anything; else NotMeasuredError with the reason `otherwise`."""
    if not found:
        raise NotMeasuredError(otherwise)
    return found
