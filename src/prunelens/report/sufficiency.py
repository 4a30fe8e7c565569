"""Were the dictionaries trained enough to compare? What page and summary say of it."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from prunelens.analyses.sufficiency import FALL_LIMIT, NOT_ENOUGH, RETENTION_LIMIT, sufficiency
from prunelens.report.panels.panel import Site, Tables
from prunelens.report.published import condition_of
from prunelens.study.kind import CONDITION

TAINTS = "Pruned runs are compared with these dense dictionaries, so this taints every one of them."
VERDICTS = {True: "trained enough", False: "not trained enough", None: "cannot be said"}


class NotEnough(NamedTuple):
    """A model at a layer, some of whose dictionaries are not trained enough to compare."""

    site: Site
    conditions: list[str]
    """The conditions that this is known of, as in run names."""
    numbers: str
    """What says so, and what follows if the dense dictionaries are among them."""

    @property
    def text(self) -> str:
        """In one line."""
        named = ", ".join(self.conditions)
        return f"{self.site.label} ({named}): {NOT_ENOUGH}: {self.numbers}"


def training_verdicts(tables: Tables) -> pd.DataFrame:
    """One row per run with the columns of `tables/sufficiency.csv`; without rows if none trained.

    A study that did not ask `sufficiency` still has how far its SAEs are from their start, and is
    judged by that alone: it can be found not trained enough, never trained enough.
    """
    asked = tables.get("sufficiency", pd.DataFrame())
    if len(asked):
        return asked
    trained = tables.get("sae_training", pd.DataFrame())
    if not len(trained):
        return pd.DataFrame()
    plain = trained[_is_plain(trained)].rename(columns={"init_seed": "seed", "steps": "step"})
    rows = []
    for names, part in plain.groupby(list(CONDITION), sort=False):
        found = sufficiency(part)
        rows.append({**dict(zip(CONDITION, names, strict=True)), **found._asdict()})
    return pd.DataFrame(rows)


def not_enough(tables: Tables) -> list[NotEnough]:
    """Where comparing dictionaries says little, one entry per model and layer."""
    rows = training_verdicts(tables)
    if not len(rows):
        return []
    found = []
    for (model, layer), part in rows[_judged(rows, False)].groupby(["model", "layer"], sort=False):
        conditions = [str(name) for name in condition_of(part["run"])]
        numbers = _numbers(part, above=True)
        if part["method"].eq("dense").any():
            numbers = f"{numbers}. {TAINTS}"
        found.append(NotEnough(Site(str(model), int(layer)), conditions, numbers))
    return found


def known_of_the_others(tables: Tables) -> str:
    """In a line, what is known of the runs that nothing is wrong with; empty if there are none."""
    rows = training_verdicts(tables)
    if not len(rows):
        return ""
    enough, unknown = rows[_judged(rows, True)], rows[_judged(rows, None)]
    parts = []
    if len(enough):
        parts.append(f"{_runs(enough)} trained enough: {_numbers(enough)}")
    if len(unknown):
        parts.append(
            f"of {_runs(unknown)} only the distance from the start is known: {_numbers(unknown)}"
        )
    return "; ".join(parts)


def verdict_words(rows: pd.DataFrame) -> list[str]:
    """The verdicts of `training_verdicts` for reading."""
    return [VERDICTS[None if pd.isna(v) else bool(v)] for v in rows["trained_enough"]]


def _is_plain(rows: pd.DataFrame) -> pd.Series:
    """The SAEs of the conditions themselves, not controls nor what was trained on from another."""
    own = rows["training"].isna() | (rows["training"] == "own")
    return own & ~rows["rotated"].astype(bool) & (rows["init_seed"] == rows["data_seed"])


def _judged(rows: pd.DataFrame, verdict: bool | None) -> list[bool]:
    return [word == VERDICTS[verdict] for word in verdict_words(rows)]


def _runs(rows: pd.DataFrame) -> str:
    return f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}"


def _numbers(rows: pd.DataFrame, *, above: bool = False) -> str:
    """Smallest and largest of the runs beside the limits; `above`: of what is above its limit."""
    cosines = sorted(rows["mean_init_retention"].dropna())
    falls = sorted(rows["fvu_fall_beyond_schedule"].dropna())
    if above:
        cosines = [value for value in cosines if value > RETENTION_LIMIT]
        falls = [value for value in falls if value > FALL_LIMIT]
    parts = []
    if cosines:
        cosine = _range([f"{value:.3f}" for value in cosines])
        parts.append(f"mean cosine to the start {cosine} (limit {RETENTION_LIMIT})")
    if falls:
        fall = _range([f"{100 * value:.1f}" for value in falls])
        parts.append(f"twice the steps lower FVU by {fall} % (limit {100 * FALL_LIMIT:g} %)")
    return ", ".join(parts)


def _range(sorted_words: list[str]) -> str:
    first, last = sorted_words[0], sorted_words[-1]
    return first if first == last else f"{first} to {last}"
