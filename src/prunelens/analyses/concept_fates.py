"""What became of each concept, from the readings of `probes`; and whether that is true.

What the dense probe loses and the one fitted on pruned activations does not has *moved*; what both
lose is *gone* or *blurred*. What the probe reads and the best latents do not, the SAE cannot read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from prunelens.analyses.coverage import COLUMNS as COVERAGE_COLUMNS
from prunelens.analyses.coverage import MOST_WRONG, share_between, verdict_columns
from prunelens.analyses.probes import SOURCES
from prunelens.analyses.statistics import RankSample, jackknifed, rank_correlation
from prunelens.columns import meanings_of

DISTURBED = SOURCES[1:]
READS = 0.65  # AUC below which a concept is not there to be lost
KEPT, GONE = 0.9, 0.5  # shares of the dense AUC above chance
CONCEPT_COLUMNS = """
concept
frequency
source: `pruned`, `noise_shuffled` or `null`.
verdict: `kept` (`left` at least 0.9), `moved` (only `left_refit` is), `blurred` (`left_refit`
    below 0.9), `gone` (below 0.5), each by the whole interval, else `undecided`; `not read` where
    `auc_dense` is below 0.65.
auc_dense: AUC of the probe fitted on dense activations, on others.
left: Share of its AUC above one half that the dense probe keeps on the source.
left_low left_high
left_refit: Share of the dense probe's AUC above one half that one fitted on the source has.
left_refit_low left_refit_high
beyond_noise: AUC of the dense probe on the source less that under noise of equal size.
beyond_noise_low beyond_noise_high
sae: Whether the dense SAE `reads` it (`sae_reads` at least 0.9), `partly`, `cannot` (below 0.5) or
    `undecided`.
sae_reads: AUC above one half of the SAE's five best latents, as a share of the probe's.
sae_reads_low sae_reads_high
sae_left: What is left of that AUC above one half on the source.
sae_left_low sae_left_high
reason: Why there is nothing.
"""
TRUE_VERDICTS = {  # planted fates -> what may be said of them
    ("kept", "rescaled"): ("kept",),
    ("weakened",): ("kept", "blurred", "gone"),
    ("rotated",): ("moved", "blurred"),
    ("removed",): ("gone",),
}
RIGHT = 0.95  # share of verdicts
SMALLEST_P = 0.001  # of what is found where nothing is
RARITY_COLUMNS = """
source: `pruned` or `null`.
rho: Rank correlation over concepts of `frequency` with `beyond_noise`.
low high
p: Two-sided p of `rho`.
num_concepts: Concepts that the dense probe reads.
reason: Why there is no interval.
"""


def concept_fates(readings: pd.DataFrame) -> pd.DataFrame:
    """A row per concept and disturbed source, with CONCEPT_COLUMNS."""
    rows = []
    for concept, part in readings.groupby("concept", sort=False):
        row: dict[str, Any] = {"concept": concept, "frequency": part["frequency"].iloc[0]}
        reason = part["reason"].dropna()
        auc, count = _Auc(part), part["num_positive"].iloc[0]
        for source in DISTURBED:
            row = row | {"source": source}
            if len(reason):
                rows.append(row | {"verdict": "undecided", "reason": reason.iloc[0]})
            else:
                rows.append(row | _fate(auc, source, int(count)))
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(CONCEPT_COLUMNS)])


def rarity(fates: pd.DataFrame, readings: pd.DataFrame) -> pd.DataFrame:
    """Do rare concepts fare worse (claim 1, asked without an SAE)? With RARITY_COLUMNS.

    Rank correlation over concepts of their frequency with `beyond_noise`, which is above 0 where
    pruning's own harm is the rare ones'; interval over concepts and documents. Of the null it says
    what the measure finds where nothing is. (The same of the refitted probe finds something in the
    planted world where fates do not depend on frequency, and is not given.)
    """
    rows = []
    read = fates[fates["auc_dense"] >= READS].drop_duplicates("concept")
    by_concept = readings[readings["concept"].isin(read["concept"])].groupby("concept", sort=False)
    aucs = {name: _Auc(part) for name, part in by_concept}
    frequency = read.set_index("concept")["frequency"].loc[list(aucs)].to_numpy(dtype=float)
    for source in ("pruned", "null"):
        row: dict[str, Any] = {"source": source, "num_concepts": len(aucs)}
        if aucs:
            values = np.stack([_beyond_noise(auc, source) for auc in aucs.values()])
            # A group without tokens of a concept changes nothing.
            values = np.where(np.isnan(values), values[:, :1], values)
            sample = RankSample(frequency, values[:, 0], values[:, 1:], frequency)
            found = rank_correlation([sample])
            p = 2 * min(found.p_above(0.0), found.p_below(0.0))
            row |= {"rho": found.value, "low": found.low, "high": found.high, "p": p}
            row["reason"] = found.resampled if math.isnan(found.low) else ""
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(RARITY_COLUMNS)])


class _Auc:
    """The AUCs of one concept, each with its values without each group of documents."""

    def __init__(self, readings: pd.DataFrame) -> None:
        seeds: dict[tuple[str, str, str], list[np.ndarray]] = {}
        names = ("reader", "source", "fit", "auc", "auc_without")
        for *key, auc, without in zip(*(readings[name] for name in names), strict=True):
            seeds.setdefault(tuple(key), []).append(np.append(auc, without))
        self._means = {key: np.mean(values, axis=0) for key, values in seeds.items()}

    def of(self, reader: str, source: str, fit: str = "dense") -> Float[np.ndarray, " replicates"]:
        """The mean over seeds."""
        return self._means[reader, source, fit]

    def above_chance(self, reader: str, source: str, fit: str = "dense") -> np.ndarray:
        """What it has above one half; a share is taken of it."""
        return self.of(reader, source, fit) - 0.5


def _fate(auc: _Auc, source: str, num_positive: int) -> dict[str, Any]:
    """What became of one concept in one source."""
    dense, latents = (auc.above_chance(name, "dense") for name in ("probe", "latents_5"))
    found: dict[str, Any] = {"auc_dense": float(dense[0] + 0.5)}
    shares = {
        "left": (auc.above_chance("probe", source), dense),
        "left_refit": (auc.above_chance("probe", source, "refit"), dense),
        "sae_reads": (latents, dense),
        "sae_left": (auc.above_chance("latents_5", source), latents),
    }
    intervals = {name: _share(*pair, num_positive) for name, pair in shares.items()}
    there = found["auc_dense"] >= READS
    found["verdict"] = _verdict(intervals["left"], intervals["left_refit"]) if there else "not read"
    found["sae"] = _sae_verdict(intervals["sae_reads"]) if there else "not read"
    if source != "noise_shuffled":
        intervals["beyond_noise"] = _over_documents(_beyond_noise(auc, source))
    for name, each in intervals.items():
        found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
    return found


def _beyond_noise(auc: _Auc, source: str) -> Float[np.ndarray, " replicates"]:
    return auc.of("probe", source) - auc.of("probe", "noise_shuffled")


class _Interval(NamedTuple):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


def _share(
    part: Float[np.ndarray, " replicates"],
    whole: Float[np.ndarray, " replicates"],
    num_positive: int,
) -> _Interval:
    """Of two AUCs above chance, over documents.

    Where no token at all is misread, leaving documents out changes nothing: of as many tokens at
    most three in `num_positive` are misread (the rule of three), each of which costs twice its
    share.
    """
    known = np.isfinite(whole)
    if (part[known] == 0.5).all() and (whole[known] == 0.5).all():
        return _Interval(1.0, max(0.0, 1 - 6 / num_positive), 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _over_documents(part / whole)


def _over_documents(replicates: Float[np.ndarray, " replicates"]) -> _Interval:
    without = replicates[1:]
    found = jackknifed(float(replicates[0]), without[~np.isnan(without)], "documents")
    return _Interval(found.value, found.low, found.high)


def _verdict(left: _Interval, refit: _Interval) -> str:
    if left.low >= KEPT:
        return "kept"
    if refit.high < GONE:
        return "gone"
    if refit.low >= KEPT:
        return "moved" if left.high < KEPT else "undecided"
    return "blurred" if refit.high < KEPT else "undecided"


def _sae_verdict(reads: _Interval) -> str:
    if reads.low >= KEPT:
        return "reads"
    if reads.high < GONE:
        return "cannot"
    return "partly" if reads.high < KEPT and reads.low >= GONE else "undecided"


def probe_grades(concepts: pd.DataFrame, rare: pd.DataFrame, world: str) -> pd.DataFrame:
    """What is said of planted directions whose fate is known, with the columns of `coverage`.

    Args:
        concepts: as `concept_fates` makes it, with a column fate.
        rare: as `rarity` makes it.
        world: whose fates they are.
    Returns: measured: the share of the concepts of that fate (or of all of which nothing may be
        said) that get the verdict; of the undecided there is a number alone.
    """
    rows = []
    for source in ("pruned", "null"):
        part = concepts[concepts["source"] == source]
        if source == "pruned" and world != "none":
            for fates, verdicts in TRUE_VERDICTS.items():
                verdict = part.loc[part["fate"].isin(fates), "verdict"]
                said = verdict[~verdict.isin(("undecided", "not read"))].isin(verdicts)
                name = f"probes say {' or '.join(verdicts)} of {' and '.join(fates)}"
                rows.append(_grade(world, name, said, len(verdict), at_least=RIGHT))
        if source == "null" or world == "none":
            known = part.dropna(subset=["beyond_noise_low"])
            said = (known["beyond_noise_low"] > 0) | (known["beyond_noise_high"] < 0)
            name = f"probes find harm beyond noise where nothing is ({source})"
            rows.append(_grade(world, name, said, len(part), at_most=MOST_WRONG))
    for found in rare.itertuples():
        effect = found.source == "pruned" and world == "by_rate"
        mark = (
            "rare concepts fare worse" if effect else f"nothing is found: p at least {SMALLEST_P}"
        )
        passed = found.low > 0 if effect else found.p >= SMALLEST_P
        row: dict[str, Any] = {"world": world, "kind": "interval"}
        row |= {"name": f"probes, frequency ({found.source})"}
        row |= {"measured": found.rho, "low": found.low, "high": found.high}
        row |= {"num_sets": found.num_concepts, "num_undefined": 0}
        rows.append(row | verdict_columns(mark, bool(passed)))
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(COVERAGE_COLUMNS)])


def _grade(
    world: str,
    name: str,
    said: pd.Series,
    count: int,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """One row; of so many concepts those are in `said` of which anything is said."""
    low, high = share_between(int(said.sum()), len(said))
    row: dict[str, Any] = {"world": world, "kind": "verdict", "name": name, "truth": math.nan}
    row |= {"measured": said.mean() if len(said) else math.nan, "low": low, "high": high}
    row |= {"num_sets": count, "num_undefined": count - len(said)}
    if at_least is not None:
        mark, passed = f"right in at least {at_least:.0%}", len(said) > 0 and high >= at_least
    else:
        mark, passed = f"wrong in at most {at_most:.0%}", low <= (at_most or 0)
    return row | verdict_columns(mark, passed)
