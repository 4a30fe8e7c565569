"""What intervals and verdicts are worth, by simulation.

An interval of 95 % should hold the truth in 95 of 100 data sets, and hardly ever should a verdict
be reached where nothing is there. What reads pruned activations is asked by `simulation`: small
studies of the planted world through the code that real ones use; other intervals by `synthetic`:
numbers that vary over seeds, conditions, latents and documents as is stated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from prunelens import planted
from prunelens.analyses.claims import CLAIMS, verdicts_of
from prunelens.analyses.contrast import estimate_of
from prunelens.analyses.fragility import GROUPS, fragility_contrasts
from prunelens.analyses.grades import WITH_RATE, correlation_with_rate
from prunelens.analyses.measures import Source, latent_measures
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.simulation import simulated_fates
from prunelens.analyses.statistics import Estimate
from prunelens.analyses.synthetic import SYNTHETIC
from prunelens.columns import meanings_of
from prunelens.match import TAU

COVERS = (0.92, 0.98)  # what counts as 95 %
MOST_WRONG = 0.05  # share of sets in which a verdict may be reached that is wrong
SURE = 0.01  # how seldom chance alone makes a mark missed
COLUMNS = """
world: `none`, `by_rate` or `synthetic`.
kind: `interval` or `verdict`.
name: What the interval is of, or which verdict.
truth: What an interval should hold; empty of a verdict.
measured: Share of sets in which the interval holds its truth, or that reach the verdict.
low high: Between which the true share lies, 99 % (Clopper and Pearson).
num_sets: Sets that were simulated.
num_undefined: Those of them without an interval.
mark: 92 to 98 % of intervals hold the truth, at most 5 % of sets reach a verdict that is wrong;
    empty for one that is right.
passed: Whether it does; missed only where `low` and `high` rule it out.
reason: What the row misses.
"""
MEASURE = "relative_shuffled"
STATISTICS = (*GROUPS, WITH_RATE)
TRUTHS = {  # of MEASURE, in the order of STATISTICS
    "none": (1, 1, 1, 1, 1, 1, 0, 0),  # as it should be
    # large_sample("by_rate", numbers, (6, 48)) of 280 numbers far apart: as many documents to sort
    # latents by as a set has, for that is part of what is asked; standard error 0.005 at most
    "by_rate": (0.609, 0.708, 0.785, 0.869, 0.967, 0.794, -0.358, 0.330),
}
RUNS = {"wanda": ("wanda-row-0.50", 0.5), "magnitude": ("magnitude-global-0.50", 0.5)}
PREDICTED = 6  # sets of two are joined to a study of four conditions in one of so many
WRONG = {  # claim -> its verdicts that are wrong where rare features are destroyed more often
    1: ("holds",),
    2: ("holds", "fails"),
    6: ("fails",),
    7: ("holds",),
    8: ("holds",),
}


class _Found(NamedTuple):
    """One interval or one verdict of one set."""

    kind: str
    """interval or verdict."""
    name: str
    truth: float
    """What an interval should hold; NaN of a verdict."""
    is_so: float
    """Whether the interval holds it, or the verdict was reached; NaN where there is none."""


def coverage(
    world: str, num_sets: int, *, progress: Callable[[int], None] | None = None
) -> pd.DataFrame:
    """How often intervals hold the truth and verdicts are wrong, with COLUMNS.

    Args:
        world: `none`, where there is no effect, `by_rate`, where there is one of known size, or
            `synthetic`.
        num_sets: simulated.
        progress: told after how many.
    """
    if world == "synthetic":
        drawn = _synthetic(num_sets)
    else:
        drawn = _simulated(_choice(world), num_sets, progress)
    found = pd.DataFrame(drawn)
    rows = [
        _row(world, str(kind), str(name), part)
        for (kind, name), part in found.groupby(["kind", "name"], sort=False)
    ]
    return pd.DataFrame(rows).reindex(columns=[*meanings_of(COLUMNS)])


def large_sample(
    world: planted.Choice, numbers: Sequence[int], documents: tuple[int, int]
) -> list[float]:
    """What the intervals should hold: means over sets that have many documents, by STATISTICS."""
    sets = simulated_fates(world, numbers, documents=documents)
    every = [fates for conditions in sets for fates in conditions.values()]
    found = [_estimates(fates, fragility_contrasts(fates), "pruned") for fates in every]
    return np.mean([[each.value for each in estimates] for estimates in found], axis=0).tolist()


def _simulated(
    world: planted.Choice, num_sets: int, progress: Callable[[int], None] | None
) -> Iterator[_Found]:
    """All that a set says, and of some what the predictor says of two."""
    before = None
    for number, conditions in enumerate(simulated_fates(world, range(num_sets))):
        contrasts = {name: fragility_contrasts(fates) for name, fates in conditions.items()}
        yield from _intervals(world, conditions["wanda"], contrasts["wanda"])
        named = pd.concat([_with_run(table, name) for name, table in contrasts.items()])
        tables = {"fragility_contrasts": named, **_agreeing_dictionaries(number)}
        yield from _verdicts(tables, (1, 2, 6, 8))
        if before is not None and number % PREDICTED == 1:
            both = [*before.items(), *conditions.items()]
            models = ("one", "one", "other", "other")
            parts = [_with_run(f, n, model=m) for m, (n, f) in zip(models, both, strict=True)]
            predicted = fit_predictor(pd.concat(parts, ignore_index=True), []).table
            yield from _verdicts({"predictor": predicted}, (7,))
        before = conditions
        if progress:
            progress(number + 1)


def _choice(world: str) -> planted.Choice:
    """A world whose TRUTHS are known."""
    return {"none": "none", "by_rate": "by_rate"}[world]  # type: ignore[return-value]


def _synthetic(num_sets: int) -> Iterator[_Found]:
    for name, draw in SYNTHETIC.items():
        generator = np.random.default_rng(0)
        for _ in range(num_sets):
            estimate, truth = draw(generator)
            yield _Found("interval", name, truth, _holds(estimate, truth))


def _intervals(world: str, fates: pd.DataFrame, contrasts: pd.DataFrame) -> Iterator[_Found]:
    """Of the null, too, where the truth is that of the world without an effect."""
    sources: list[tuple[Source, str]] = [("pruned", world), ("null", "none")]
    for source, of_world in sources:
        found = zip(STATISTICS, _estimates(fates, contrasts, source), TRUTHS[of_world], strict=True)
        for statistic, estimate, truth in found:
            name = f"{MEASURE}, {statistic}" + (" (null)" if source == "null" else "")
            yield _Found("interval", name, truth, _holds(estimate, truth))


def _estimates(fates: pd.DataFrame, contrasts: pd.DataFrame, source: Source) -> list[Estimate]:
    """Of every one of STATISTICS."""
    rows = contrasts[(contrasts["measure"] == MEASURE) & (contrasts["source"] == source)]
    by_latent = latent_measures(fates, source)[MEASURE]
    return [*map(estimate_of, rows.itertuples()), correlation_with_rate(fates, by_latent)]


def _verdicts(tables: dict[str, pd.DataFrame], claims: Sequence[int]) -> Iterator[_Found]:
    """Of the controlled side, as `judge_claims` reaches them where SAEs are trained enough."""
    for claim in claims:
        reached = set(verdicts_of(CLAIMS[claim].controlled(tables)))
        holds, fails = reached == {"holds"}, "fails" in reached
        yield _Found("verdict", f"claim {claim} holds", math.nan, float(holds))
        yield _Found("verdict", f"claim {claim} fails", math.nan, float(fails))


def _with_run(table: pd.DataFrame, condition: str, *, model: str = "simulated") -> pd.DataFrame:
    """The table of one condition as a study has it."""
    name, sparsity = RUNS[condition]
    run = f"{model}/L0/{name}"
    named = {"run": run, "model": model, "layer": 0, "method": condition, "sparsity": sparsity}
    if "latent" in table:  # of the predictor, which is told of no arms
        named |= {"condition": run, "cosine_shared_init": math.nan, "mutual_shared_init": math.nan}
    return table.assign(**named)


def _agreeing_dictionaries(number: int) -> dict[str, pd.DataFrame]:
    """The part of claim 6 that reads no activations, such that the other part decides it."""
    values = np.random.default_rng(number).normal(0.1, 0.01, 3)
    arm = {"arm": "ceiling_cross", "coordinates": "normalised", "tau": TAU, "mnn": values}
    arm |= {"model": "simulated", "layer": 0, "run": "simulated/L0/dense"}
    rates = pd.DataFrame({**arm, "init_a": [0, 1, 2], "init_b": [1, 2, 0]})
    chance = rates.assign(arm="chance", mnn=0.0)
    return {"survival": pd.concat([rates, chance])}


def _holds(estimate: Estimate, truth: float) -> float:
    low, high = estimate.bounds()
    return math.nan if math.isnan(low) else float(low <= truth <= high)


def _row(world: str, kind: str, name: str, part: pd.DataFrame) -> dict[str, object]:
    """One row of the table; a share without a mark is what it is."""
    known = part["is_so"].dropna()
    hits, count = int(known.sum()), len(known)
    low, high = share_between(hits, count)
    row: dict[str, object] = {"world": world, "kind": kind, "name": name}
    row |= {"truth": part["truth"].mean(), "measured": hits / count if count else math.nan}
    row |= {"low": low, "high": high, "num_sets": len(part), "num_undefined": len(part) - count}
    if kind == "interval":
        mark = f"holds the truth in {COVERS[0]:.0%} to {COVERS[1]:.0%}"
        return row | verdict_columns(mark, count > 0 and high >= COVERS[0] and low <= COVERS[1])
    _, claim, verdict = name.split(" ")
    if world == "none" or verdict in WRONG[int(claim)]:
        return row | verdict_columns(f"wrong in at most {MOST_WRONG:.0%}", low <= MOST_WRONG)
    return row


def verdict_columns(mark: str, reached: bool) -> dict[str, object]:
    """mark, passed and reason."""
    return {"mark": mark, "passed": reached, "reason": "" if reached else f"misses: {mark}"}


def share_between(hits: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share, 99 %."""
    from scipy.special import betaincinv

    if not count:
        return 0.0, 1.0
    low = betaincinv(hits, count - hits + 1, SURE / 2) if hits else 0.0
    high = betaincinv(hits + 1, count - hits, 1 - SURE / 2) if hits < count else 1.0
    return float(low), float(high)
