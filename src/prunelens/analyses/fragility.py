"""RQ4: are rare features more or less likely to survive than frequent ones?

The paper compares five firing-rate groups of latents by one measure that a shared start inflates.
Here every measure stands beside it: other arms, persistence, and what persistence loses beyond
noise of equal size; each also latent by latent, and with `init_retention` held fixed.

Both tables start from `fates`: one row per seed and dense latent of ONE condition, with
    seed, latent
    firing_rate              on the whole eval set; sorts latents for the arms, as in the paper
    firing_rate_first_half   sorts latents for persistence, which is measured on the second half,
                             so that no latent is chosen by the noise that it is judged by
    init_retention           cosine of the decoder row to its start
    cosine_<arm>, mutual_<arm>   best match in the arms of MATCHED that the condition has;
                             NaN where that seed has no such arm (those rows are left out of it)
    persistence, persistence_z   Pearson correlation and its Fisher z; NaN = undefined; none of the
                             three for the dense condition
    persistence_noise_isotropic, persistence_noise_shuffled, and persistence_z_ of both
    scaling                  see `analyses.scaling`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from prunelens.analyses.measures import latent_measures
from prunelens.analyses.statistics import (
    RankCorrelations,
    RankSample,
    exact_spearman,
    holm_adjusted,
    rank_correlations,
)

MATCHED = (  # arms at every tau; of the dense run, what no pruning or a shared start shows
    *("shared_init", "shared_start", "cross_init"),
    *("ceiling_shared", "floor_shared", "ceiling_cross", "chance"),
)
UNMATCHED = (
    *("persistence", "excess_isotropic", "excess_shuffled"),
    *("relative_isotropic", "relative_shuffled", "scaling"),
)
NUM_QUINTILES = 5
SMALLEST_P = 2 / 120  # rho = +-1: two of the 5! orders
FAMILY = ["model", "layer", "measure", "tau"]  # Holm adjusts over the conditions within one


def quintiles(fates: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """Survival by firing-rate quintile.

    Alive latents of each seed (firing rate above 0 in the column that sorts) in five groups whose
    sizes differ by one at most, ties by index; group means per seed, then the mean over seeds.
    Args: fates as the module describes; taus for the arms.
    Returns: measure, tau (NaN for persistence), quintile (1 rare .. 5 frequent), firing_rate and
        survival_rate (of the latents with a value; NaN without any), num_latents (over all seeds).
        survival_rate is a share for an arm, for `persistence` a mean correlation, for `excess_*` a
        mean difference in Fisher z (below 0: harm particular to pruning), for `relative_*` the mean
        share of what noise leaves, for `scaling` the mean multiple of the direction that is there.
    Source: paper §4.5 and Table 3; methods §7 RQ4.
    """
    return _over_seeds(fates, _measures(fates, taus))


def quintiles_by_seed(fates: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """The group means of every seed, of which `quintiles` is the mean.

    Returns: measure, tau, seed, quintile, firing_rate, survival_rate, num_latents; no row for a
        seed's quintile in which no latent has a value.
    """
    measures = _measures(fates, taus)
    return _named(_by_seed(fates, measures).reset_index(), measures)


def fragility_tests(
    fates: pd.DataFrame, taus: Sequence[float], *, seed: int = 0, draws: int = 1000
) -> pd.DataFrame:
    """Rank correlation of firing rate and survival: over quintiles, and latent by latent.

    Returns: measure, tau, then
        rho, p_exact: Spearman over the five quintiles and its exact two-sided permutation p;
        p_smallest: the smallest p that five quintiles allow, 2/120;
        latent_rho, ci_low, ci_high: mean over seeds of the within-seed Spearman of firing rate and
            value, with a 95 % bootstrap interval; partial_rho, partial_low, partial_high: the same
            with init_retention held fixed;
        num_latents with a value; resampled: what the interval resamples; reason of every NaN.
    Source: methods §7 RQ4, §8; the bootstrap is described at `rank_correlations`.
    """
    measures = _measures(fates, taus)
    groups = _over_seeds(fates, measures)
    tests = []
    for m, (_, group) in zip(measures, groups.groupby(groups.index // NUM_QUINTILES), strict=True):
        exact = exact_spearman(group["firing_rate"].to_numpy(), group["survival_rate"].to_numpy())
        test = {"measure": m.name, "tau": m.tau, "rho": exact.rho, "p_exact": exact.p}
        test |= {"p_smallest": SMALLEST_P, "num_latents": int(group["num_latents"].sum())}
        tests.append(test | {"reason": f"quintiles: {exact.reason}" if exact.reason else ""})
    by_seeds: dict[tuple[int, ...], list[int]] = {}
    for i, m in enumerate(measures):
        by_seeds.setdefault(m.seeds(fates), []).append(i)
    for seeds, members in by_seeds.items():
        chosen = [measures[i] for i in members]
        per_latent = _latent_columns(fates, chosen, seeds, seed, draws)
        for i, columns in zip(members, per_latent, strict=True):
            reasons = [tests[i]["reason"], columns.pop("reason")]
            tests[i] |= columns | {"reason": "; ".join(r for r in reasons if r)}
    return pd.DataFrame(tests)[[*_TEST_COLUMNS]]


def holm(tests: pd.DataFrame) -> pd.DataFrame:
    """`fragility_tests` of many conditions with their Holm-adjusted p-values.

    Args: columns model, layer, measure, tau, p_exact, and those that tell conditions apart.
    Returns: the same rows with p_holm, adjusted within (model, layer, measure, tau) over the
        conditions that have a p, and p_holm_smallest = min(1, m * 2/120): the smallest adjusted p
        that m such conditions allow, so that nobody reads "not significant" as "absent".
    Source: methods §8.
    """
    p = tests.groupby(FAMILY, dropna=False)["p_exact"]
    adjusted = p.transform(lambda family: holm_adjusted(family.to_numpy(dtype=float)))
    smallest = (p.transform("count") * SMALLEST_P).clip(upper=1).where(tests["p_exact"].notna())
    return tests.assign(p_holm=adjusted.astype(float), p_holm_smallest=smallest)


_TEST_COLUMNS = (
    *("measure", "tau", "rho", "p_exact", "p_smallest"),
    *("latent_rho", "ci_low", "ci_high", "partial_rho", "partial_low", "partial_high"),
    *("num_latents", "resampled", "reason"),
)


class _Measure(NamedTuple):
    """One way to say how well each latent survived."""

    name: str
    tau: float
    rate: Float[np.ndarray, " rows"]
    """The firing rate that sorts."""
    value: Float[np.ndarray, " rows"]
    """NaN where undefined, and for dead latents."""

    def seeds(self, fates: pd.DataFrame) -> tuple[int, ...]:
        """The seeds in which any latent has a value."""
        return tuple(sorted(fates.loc[~np.isnan(self.value), "seed"].unique().tolist()))


def _measures(fates: pd.DataFrame, taus: Sequence[float]) -> list[_Measure]:
    """The arms that there are at every tau, and what needs no second dictionary."""
    found = latent_measures(fates)
    measures = []
    for name in (name for name in (*MATCHED, *UNMATCHED) if name in found):
        value, mutual, column = found[name]
        rate = fates[column].to_numpy(dtype=float)
        for tau in [np.nan] if mutual is None else taus:
            shown = value
            if mutual is not None:
                shown = np.where(np.isnan(value), np.nan, mutual & (value >= tau))
            defined = np.where(rate > 0, shown, np.nan)
            measures.append(_Measure(name, float(tau), rate, defined))
    return measures


def _by_seed(fates: pd.DataFrame, measures: Sequence[_Measure]) -> pd.DataFrame:
    """Group means by number of the measure, seed and quintile.

    One table of all measures below each other: grouping each by itself took five times as long.
    """
    known = [~np.isnan(measure.value) for measure in measures]
    seeds = fates["seed"].to_numpy()
    columns = {
        "which": np.repeat(np.arange(len(measures)), [int(rows.sum()) for rows in known]),
        "seed": _below_each_other([seeds] * len(measures), known),
        "quintile": _below_each_other([_quintile_of(fates, m.rate) for m in measures], known),
        "firing_rate": _below_each_other([m.rate for m in measures], known),
        "survival_rate": _below_each_other([m.value for m in measures], known),
    }
    groups = pd.DataFrame(columns).groupby(["which", "seed", "quintile"])
    return groups.mean().assign(num_latents=groups.size())


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
    table["num_latents"] = groups["num_latents"].sum().reindex(every, fill_value=0)
    return _named(table.reset_index(), measures)


def _named(table: pd.DataFrame, measures: Sequence[_Measure]) -> pd.DataFrame:
    """The table with measure and tau in place of the measure's number."""
    which = table.pop("which")
    table.insert(0, "measure", [measures[number].name for number in which])
    table.insert(1, "tau", [measures[number].tau for number in which])
    return table


def _quintile_of(fates: pd.DataFrame, rate: Float[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """1 (rare) to 5 (frequent) within the alive latents of each seed; 0 for dead ones."""
    quintile = np.zeros(len(fates), dtype=np.int64)
    seeds, latents = fates["seed"].to_numpy(), fates["latent"].to_numpy()
    for seed in np.unique(seeds):
        alive = np.flatnonzero((seeds == seed) & (rate > 0))
        order = alive[np.lexsort((latents[alive], rate[alive]))]
        quintile[order] = np.arange(len(order)) * NUM_QUINTILES // max(len(order), 1) + 1
    return quintile


def _latent_columns(
    fates: pd.DataFrame,
    measures: Sequence[_Measure],
    seeds: tuple[int, ...],
    seed: int,
    draws: int,
) -> list[dict]:
    """The per-latent columns of `fragility_tests` for measures that rest on the same seeds."""
    if not seeds:
        nan = dict.fromkeys(_TEST_COLUMNS[5:11], np.nan)
        return [nan | {"resampled": "", "reason": "no latent has a value"} for _ in measures]
    found = rank_correlations(_samples(fates, measures, seeds), seed=seed, draws=draws)
    resampled = "seeds, latents within each" if len(seeds) > 1 else "latents of one seed"
    rows = []
    for m in range(len(measures)):
        raw, partial = (
            [float(v[m]) for v in estimates] for estimates in (found.raw, found.partial)
        )
        row = dict(zip(_TEST_COLUMNS[5:11], raw + partial, strict=True))
        rows.append(row | {"resampled": resampled, "reason": _why_undefined(found, seeds, m)})
    return rows


def _samples(
    fates: pd.DataFrame, measures: Sequence[_Measure], seeds: tuple[int, ...]
) -> list[RankSample]:
    x = np.stack([measure.rate for measure in measures], axis=1)
    y = np.stack([measure.value for measure in measures], axis=1)
    given = fates["init_retention"].to_numpy(dtype=float)
    alive = (x > 0).any(1)  # the population that is resampled: the same for all measures
    assert not np.isnan(given[alive]).any(), "init_retention is a cosine of unit vectors"
    samples = []
    for s in seeds:
        rows = alive & (fates["seed"].to_numpy() == s)
        samples.append(RankSample(x[rows], y[rows], given[rows]))
    return samples


def _why_undefined(found: RankCorrelations, seeds: tuple[int, ...], measure: int) -> str:
    defined = found.defined[:, measure]
    if not defined.all():
        missing = ", ".join(str(s) for s, ok in zip(seeds, defined, strict=True) if not ok)
        return f"latents: firing rate or value is constant in seed {missing}"
    if np.isnan(found.partial.value[measure]):
        return "partial: init_retention is constant or determines firing rate or value"
    return ""
