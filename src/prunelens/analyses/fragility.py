"""RQ4: are rare features more or less likely to survive than frequent ones?

The paper compares five firing-rate groups of latents by one measure that a shared start inflates.
Here every measure stands beside it: other arms, persistence, and persistence as a share of what
noise of equal size leaves; each also latent by latent, with `init_retention` held fixed, and on the
null, where noise stands in the place of the pruned activations and firing rate changes nothing.

All tables start from `fates` (see `analyses.fates`): one row per seed and dense latent of ONE
condition. `firing_rate` sorts latents for the arms, as in the paper; `firing_rate_first_half` for
what is measured on the second half, so that no latent is chosen by the noise that it is judged by.
A seed without an arm (NaN) is left out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from prunelens.analyses.measures import Means, latent_measures
from prunelens.analyses.statistics import (
    LatentSample,
    RankSample,
    crossed,
    difference,
    exact_spearman,
    holm_adjusted,
    rank_correlation,
    ratio_of_means,
)

MATCHED = (  # arms at every tau; of the dense run, what no pruning or a shared start shows
    *("shared_init", "shared_start", "cross_init"),
    *("ceiling_shared", "floor_shared", "ceiling_cross", "chance"),
)
UNMATCHED = (
    *("persistence", "persistence_undone", "excess_isotropic", "excess_shuffled"),
    *("relative_isotropic", "relative_shuffled", "scaling"),
)
CONTRASTED = ("persistence", "relative_isotropic", "relative_shuffled")
GROUPS = ("Q1", "Q2", "Q3", "Q4", "Q5", "all", "Q1 - Q5")
NUM_QUINTILES = 5
SMALLEST_P = 2 / 120  # rho = +-1: two of the 5! orders
FAMILY = ["model", "layer", "measure", "source", "tau"]  # Holm adjusts over conditions within one


def quintiles(fates: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """Survival by firing-rate quintile.

    Alive latents of each seed (firing rate above 0 in the column that sorts) in five groups whose
    sizes differ by one at most, ties by index; group means per seed, then the mean over seeds.
    Args: fates as the module describes; taus for the arms.
    Returns: measure, source, tau (NaN for persistence), quintile (1 rare .. 5 frequent),
        firing_rate and survival_rate (of the latents with a value; NaN without any), num_latents
        (over all seeds), num_dropped (alive ones that have no value latent by latent).
        survival_rate is a share for an arm, for `persistence` a mean correlation, for `excess_*` a
        mean difference in Fisher z (below 0: harm particular to pruning), for `relative_*` the mean
        correlation as a share of the mean under noise (a ratio of means, in which latents that
        noise leaves too little of have their part), for `scaling` the mean multiple of the
        direction that is there. source: pruned, null, or dense for arms without pruning.
    Source: paper §4.5 and Table 3; methods §7 RQ4, §10.
    """
    return _over_seeds(fates, _measures(fates, taus))


def quintiles_by_seed(fates: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """The group means of every seed, of which `quintiles` is the mean.

    Returns: measure, source, tau, seed, quintile, firing_rate, survival_rate, num_latents,
        num_dropped; no row for a seed's quintile in which no latent has a value.
    """
    measures = _measures(fates, taus)
    return _named(_by_seed(fates, measures).reset_index(), measures)


def fragility_contrasts(fates: pd.DataFrame) -> pd.DataFrame:
    """The groups of CONTRASTED measures, rarest against most frequent, with their intervals.

    Returns: measure, source, group (Q1 .. Q5, all, Q1 - Q5), value (mean over seeds), low, high,
        error, df, least, most, skew, resampled (see `Estimate`), num_latents, num_dropped; and for
        contrasts of contrasts: beyond (the variance that latents add to that by documents),
        without (the value without each group of documents) and by_seed (the same of every seed, one
        after the other), which are arrays. Nothing for the dense condition.
    """
    rows = []
    for measure in _measures(fates, ()):
        if measure.means is None:
            continue
        by_seed = [_group_samples(fates, measure, seed) for seed in measure.seeds(fates)]
        for group in GROUPS if by_seed else ():
            samples = [groups[group] for groups in by_seed]
            found = crossed(samples)
            without = np.stack([sample.without for sample in samples])
            counted = np.isfinite(measure.means.above) & measure.alive & _in(measure, group)
            dropped = counted & ~np.isfinite(measure.value)
            rows.append(
                {"measure": measure.name, "source": measure.source, "group": group}
                | {"value": found.value, "low": found.low, "high": found.high}
                | {name: getattr(found, name) for name in ("error", "df", "least", "most", "skew")}
                | {"resampled": found.resampled, "num_latents": int(counted.sum())}
                | {"num_dropped": int(dropped.sum()), "beyond": found.added}
                | {"without": without.mean(0), "by_seed": without.ravel()}
            )
    return pd.DataFrame(rows)


def fragility_tests(fates: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """Rank correlation of firing rate and survival: over quintiles, and latent by latent.

    Returns: the columns of `fragility_tests.csv`, but for those that `holm` adds.
    Source: methods §7 RQ4, §8; the interval is described at `rank_correlation`.
    """
    measures = _measures(fates, taus)
    groups = _over_seeds(fates, measures)
    tests = []
    for m, (_, group) in zip(measures, groups.groupby(groups.index // NUM_QUINTILES), strict=True):
        exact = exact_spearman(group["firing_rate"].to_numpy(), group["survival_rate"].to_numpy())
        test = {"measure": m.name, "source": m.source, "tau": m.tau, "rho": exact.rho}
        test |= {"p_exact": exact.p, "p_smallest": SMALLEST_P}
        reasons = [f"quintiles: {exact.reason}" if exact.reason else ""]
        samples = [_rank_sample(fates, m, seed) for seed in m.seeds(fates)]
        for partial, names in ((False, _TEST_COLUMNS[6:9]), (True, _TEST_COLUMNS[9:12])):
            found = rank_correlation(samples, partial=partial)
            test |= dict(zip(names, (found.value, found.low, found.high), strict=True))
            if not found.error > 0:  # NaN is not
                reasons.append(f"{'partial' if partial else 'latents'}: {found.resampled}")
            elif not partial:
                test["resampled"] = found.resampled
        test |= {"num_latents": int(group["num_latents"].sum())}
        tests.append(test | {"reason": "; ".join(reason for reason in reasons if reason)})
    return pd.DataFrame(tests).reindex(columns=_TEST_COLUMNS)


def holm(tests: pd.DataFrame) -> pd.DataFrame:
    """`fragility_tests` of many conditions with their Holm-adjusted p-values.

    Args: columns of FAMILY, p_exact, and those that tell conditions apart.
    Returns: the same rows with p_holm, adjusted within FAMILY over the conditions that have a p,
        and p_holm_smallest = min(1, m * 2/120): the smallest adjusted p
        that m such conditions allow, so that nobody reads "not significant" as "absent".
    Source: methods §8.
    """
    p = tests.groupby(FAMILY, dropna=False)["p_exact"]
    adjusted = p.transform(lambda family: holm_adjusted(family.to_numpy(dtype=float)))
    smallest = (p.transform("count") * SMALLEST_P).clip(upper=1).where(tests["p_exact"].notna())
    return tests.assign(p_holm=adjusted.astype(float), p_holm_smallest=smallest)


_TEST_COLUMNS = [
    *("measure", "source", "tau", "rho", "p_exact", "p_smallest"),
    *("latent_rho", "ci_low", "ci_high", "partial_rho", "partial_low", "partial_high"),
    *("num_latents", "resampled", "reason"),
]


class _Measure(NamedTuple):
    """One way to say how well each latent survived."""

    name: str
    source: str
    tau: float
    rate: Float[np.ndarray, " rows"]
    """The firing rate that sorts."""
    quintile: Int[np.ndarray, " rows"]
    """1 (rare) to 5 (frequent) within the alive latents of each seed; 0 for dead ones."""
    value: Float[np.ndarray, " rows"]
    """NaN where undefined, and for dead latents."""
    means: Means | None
    """Of a measure that is contrasted; what `value` is of a group where it is a ratio."""

    @property
    def alive(self) -> np.ndarray:
        """Latents that fire where the rate is counted."""
        return self.rate > 0

    @property
    def above(self) -> np.ndarray:
        """What group values are means of."""
        if self.means is None:
            return self.value
        both = np.isfinite(self.means.above) & np.isfinite(self.means.below) & self.alive
        return np.where(both, self.means.above, np.nan)

    @property
    def below(self) -> np.ndarray:
        """By whose mean the group value is divided."""
        return np.ones(len(self.value)) if self.means is None else self.means.below

    def seeds(self, fates: pd.DataFrame) -> tuple[int, ...]:
        """The seeds in which any latent has a value."""
        return tuple(sorted(fates.loc[np.isfinite(self.above), "seed"].unique().tolist()))


def _measures(fates: pd.DataFrame, taus: Sequence[float]) -> list[_Measure]:
    """The arms that there are at every tau, and what needs no second dictionary."""
    measures = []
    quintiles: dict[str, Int[np.ndarray, " rows"]] = {}
    for source in ("pruned", "null"):
        found = latent_measures(fates, source)
        for name in (name for name in (*MATCHED, *UNMATCHED) if name in found):
            value, mutual, column, means = found[name]
            rate = fates[column].to_numpy(dtype=float)
            if column not in quintiles:
                quintiles[column] = _quintile_of(fates, rate)
            told = "dense" if name in MATCHED[3:] else source
            for tau in [np.nan] if mutual is None else taus:
                shown = value
                if mutual is not None:
                    shown = np.where(np.isnan(value), np.nan, mutual & (value >= tau))
                defined = np.where(rate > 0, shown, np.nan)
                kept = means if name in CONTRASTED else None
                facts = (name, told, float(tau), rate, quintiles[column], defined, kept)
                measures.append(_Measure(*facts))
    return measures


def _by_seed(fates: pd.DataFrame, measures: Sequence[_Measure]) -> pd.DataFrame:
    """Group values by number of the measure, seed and quintile.

    One table of all measures below each other: grouping each by itself took five times as long.
    """
    known = [np.isfinite(measure.above) for measure in measures]
    seeds = fates["seed"].to_numpy()
    columns = {
        "which": np.repeat(np.arange(len(measures)), [int(rows.sum()) for rows in known]),
        "seed": _below_each_other([seeds] * len(measures), known),
        "quintile": _below_each_other([m.quintile for m in measures], known),
        "firing_rate": _below_each_other([m.rate for m in measures], known),
        "above": _below_each_other([m.above for m in measures], known),
        "below": _below_each_other([m.below for m in measures], known),
        "dropped": _below_each_other([np.isnan(m.value) for m in measures], known),
    }
    groups = pd.DataFrame(columns).groupby(["which", "seed", "quintile"])
    found = groups[["firing_rate"]].mean()
    found["survival_rate"] = groups["above"].mean() / groups["below"].mean()
    return found.assign(num_latents=groups.size(), num_dropped=groups["dropped"].sum())


def _below_each_other(parts: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> np.ndarray:
    """One column of several measures, of each the rows that have a value."""
    return np.concatenate([part[rows] for part, rows in zip(parts, known, strict=True)])


def _over_seeds(fates: pd.DataFrame, measures: Sequence[_Measure]) -> pd.DataFrame:
    """Five rows per measure, whatever it has."""
    groups = _by_seed(fates, measures).groupby(["which", "quintile"])
    every = pd.MultiIndex.from_product(
        [range(len(measures)), range(1, NUM_QUINTILES + 1)], names=["which", "quintile"]
    )
    table = groups[["firing_rate", "survival_rate"]].mean().reindex(every)
    for count in ("num_latents", "num_dropped"):
        table[count] = groups[count].sum().reindex(every, fill_value=0)
    return _named(table.reset_index(), measures)


def _named(table: pd.DataFrame, measures: Sequence[_Measure]) -> pd.DataFrame:
    """The table with measure, source and tau in place of the measure's number."""
    which = table.pop("which")
    for place, field in enumerate(("name", "source", "tau")):
        values = [getattr(measures[number], field) for number in which]
        table.insert(place, "measure" if field == "name" else field, values)
    return table


def _quintile_of(fates: pd.DataFrame, rate: Float[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """As `_Measure.quintile`."""
    quintile = np.zeros(len(fates), dtype=np.int64)
    seeds, latents = fates["seed"].to_numpy(), fates["latent"].to_numpy()
    for seed in np.unique(seeds):
        alive = np.flatnonzero((seeds == seed) & (rate > 0))
        order = alive[np.lexsort((latents[alive], rate[alive]))]
        quintile[order] = np.arange(len(order)) * NUM_QUINTILES // max(len(order), 1) + 1
    return quintile


def _in(measure: _Measure, group: str) -> np.ndarray:
    """Which rows belong to a group; a contrast has those of both its sides."""
    if group == "all":
        return measure.alive
    numbers = [int(part.removeprefix("Q")) for part in group.split(" - ")]
    return np.isin(measure.quintile, numbers)


def _group_samples(fates: pd.DataFrame, measure: _Measure, seed: int) -> dict[str, LatentSample]:
    """The groups of one seed."""
    assert measure.means is not None
    own = (fates["seed"] == seed).to_numpy()
    samples = {}
    for group in GROUPS[:-1]:
        rows = own & _in(measure, group)
        samples[group] = ratio_of_means(*(part[rows] for part in measure.means))
    samples[GROUPS[-1]] = difference(samples["Q1"], samples["Q5"])
    return samples


def _rank_sample(fates: pd.DataFrame, measure: _Measure, seed: int) -> RankSample:
    """The latents of one seed that have a value, and without each group of documents."""
    rows = (fates["seed"] == seed).to_numpy() & np.isfinite(measure.value)
    without = np.empty((int(rows.sum()), 0))
    if measure.means is not None:
        without = measure.means.above_without[rows] / measure.means.below_without[rows]
    given = fates["init_retention"].to_numpy(dtype=float)[rows]
    return RankSample(measure.rate[rows], measure.value[rows], without, given)
