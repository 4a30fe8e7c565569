"""A number with its standard error: the one kind of interval that prunelens gives.

What is resampled is left out in turn (documents, seeds, conditions), and Student's t widens the
error by how few there were. No random draw enters, so an interval is the same on every machine.
`prunelens selftest` simulates the coverage of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Scale = Literal["plain", "fisher", "logit"]
FEWEST_UNITS = 5  # documents, prompts, windows; left out in turn, fewer say too little
FEWEST_LATENTS = 40  # of a group, over all seeds; the intervals of fewer are too narrow
ROUNDING = 1e-12  # numbers that differ by less do not differ


class Estimate(NamedTuple):
    """A value and how far it may be off."""

    value: float
    error: float
    """Standard error, on the `scale`; NaN: there is none."""
    df: float
    """Degrees of freedom of the t that goes with it."""
    resampled: str
    """What the error accounts for, or why there is none."""
    least: float = math.nan
    """The smallest value that leaving one unit out gives."""
    most: float = math.nan
    """The largest."""
    scale: Scale = "plain"
    """Where the error is symmetric: at the value, at Fisher's z of a correlation, at the log odds
    of a share."""
    added: float = 0.0
    """What part of the squared error is not by leaving units out: what latents add."""
    skew: float = 0.0
    """Third standardised moment of the value, on its scale: the interval reaches further there."""

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; NaN without an error."""
        return self.bounds()[0]

    @property
    def high(self) -> float:
        """Upper end."""
        return self.bounds()[1]

    def bounds(self) -> tuple[float, float]:
        """Both ends of the 95 % interval."""
        quantile, middle = t_quantile(self.df), on_scale(self.value, self.scale)
        off = np.array([_skewed(sign * quantile, self.skew) for sign in (1, -1)])
        low, high = from_scale(middle - off * self.error, self.scale)
        return float(low), float(high)

    def columns(self, name: str) -> dict[str, float]:
        """As in tables: the value under that name, what else is known of it with a tail."""
        tails = ("low", "high", "error", "df", "least", "most")
        return {name: self.value} | {f"{name}_{tail}": getattr(self, tail) for tail in tails}

    def shifted(self, by: float) -> Estimate:
        """The same distance further up."""
        return self._replace(value=self.value + by, least=self.least + by, most=self.most + by)

    def p_above(self, limit: float) -> float:
        """One-sided p of `not above limit`, a point: small where the value is clearly above."""
        from scipy.special import stdtr

        value, edge = (on_scale(each, self.scale) for each in (self.value, limit))
        if not self.error > 0:  # NaN is not
            return math.nan
        return float(stdtr(self.df, -_symmetric(float(value - edge) / self.error, self.skew)))

    def p_below(self, limit: float) -> float:
        """One-sided p of `not below limit`."""
        return 1 - self.p_above(limit)


class LatentSample(NamedTuple):
    """A statistic of one seed whose latents are a sample as well as the documents."""

    value: float
    without: Float[np.ndarray, " groups"]
    """The statistic without each group of documents."""
    parts: Float[np.ndarray, " latents"]
    """What each latent adds to the statistic beyond its mean: they sum to 0, and their squares to
    the variance over latents (linearised)."""
    parts_without: Float[np.ndarray, "groups latents"]
    """The same without each group of documents; NaN where the latent does not fire there."""
    fewest: int
    """Latents, of the smaller group where the statistic compares two."""


def no_estimate(value: float, why: str) -> Estimate:
    """A value without an interval, and why."""
    return Estimate(value, math.nan, math.nan, why)


def jackknifed(
    value: float,
    without: Float[np.ndarray, " units"],
    resampled: str,
    *,
    added: float = 0.0,
    added_df: float = math.inf,
    fewest: int = FEWEST_UNITS,
    scale: Scale = "plain",
) -> Estimate:
    """The delete-one jackknife of a statistic.

    Args:
        value: from everything.
        without: from all but each unit in turn (a group of documents, a seed, a condition).
        resampled: what the units are.
        added: variance from another source, independent of the units; with `added_df`.
        fewest: units below which there is no interval.
        scale: fisher for a correlation, logit for a share: the variance is then taken there.
    Returns: no error with fewer units, an undefined replicate, or replicates that do not differ
        at all (an interval of zero width would claim a certainty that nobody has).
    """
    count = len(without)
    if count < fewest:
        return no_estimate(value, f"no interval: {count} {resampled}, fewer than {fewest}")
    if not math.isfinite(value) or not np.isfinite(without).all():
        return no_estimate(value, f"no interval: undefined without some of the {resampled}")
    replicates = on_scale(without, scale)
    differ = np.ptp(replicates) > ROUNDING * max(1.0, float(np.abs(replicates).max()))
    own = (count - 1) / count * float(np.square(replicates - replicates.mean()).sum()) * differ
    variance = own + added
    if not variance > 0:
        return no_estimate(value, f"no interval: the same without any of the {resampled}")
    shares = own**2 / (count - 1) + added**2 / added_df  # Welch and Satterthwaite
    df = variance**2 / shares if shares > 0 else math.inf
    ends = float(without.min()), float(without.max())
    return Estimate(value, math.sqrt(variance), df, resampled, *ends, scale, added)


def ratio_of_means(
    above: Float[np.ndarray, " latents"],
    above_without: Float[np.ndarray, "latents groups"],
    below: Float[np.ndarray, " latents"],
    below_without: Float[np.ndarray, "latents groups"],
) -> LatentSample:
    """Mean of one number over latents, divided by the mean of another; latents with both count.

    Args: `_without`: the numbers without each group of documents; NaN where they are undefined.
    """
    known = np.isfinite(above) & np.isfinite(below)
    a, b = above[known], below[known]
    a_without, b_without = above_without[known].T, below_without[known].T
    both = np.isfinite(a_without) & np.isfinite(b_without)
    a_without, b_without = (np.where(both, part, np.nan) for part in (a_without, b_without))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = float(a.sum() / b.sum())
        totals = np.nansum(b_without, axis=1, keepdims=True)
        ratios = np.nansum(a_without, axis=1, keepdims=True) / totals
        parts, parts_without = (a - ratio * b) / b.sum(), (a_without - ratios * b_without) / totals
    return LatentSample(ratio, ratios[:, 0], parts, parts_without, len(parts))


def difference(first: LatentSample, second: LatentSample) -> LatentSample:
    """First minus second, of different latents on the same documents."""
    return LatentSample(
        first.value - second.value,
        first.without - second.without,
        np.concatenate([first.parts, -second.parts]),
        np.concatenate([first.parts_without, -second.parts_without], axis=1),
        min(first.fewest, second.fewest),
    )


def crossed(
    samples: Sequence[LatentSample],
    *,
    units: str = "documents",
    scale: Scale = "plain",
    heavy_tails: bool = False,
    fewest: int = FEWEST_LATENTS,
) -> Estimate:
    """The mean over seeds of a statistic of latents, measured on documents: both are a sample.

    Leaving out documents, the same ones for all seeds, gives the variance of the mean by what was
    measured. The latents add what their parts vary beyond that (their own variance minus that by
    documents, which would count twice). Latents of several seeds may stand for the same features,
    so their variance is divided by the number of seeds only as far as the seeds are seen to differ
    by more than documents explain. Of few seeds that difference is uncertain; where it comes out
    below 0 it stands (up to twice the variance), for cutting it at 0 would leave the errors of one
    sign and make the interval too narrow. A statistic without documents (samples without groups)
    has its latents alone. With fewer latents than `fewest` over all seeds there is no interval.

    With `heavy_tails` (a few latents may hold most of a plain mean) the degrees of freedom follow
    the kurtosis of the parts, and the interval their skewness (Hall 1992): what a sample misses
    lies on that side.
    """
    count, groups = len(samples), len(samples[0].without)
    values = np.array([sample.value for sample in samples])
    if (latents := sum(sample.fewest for sample in samples)) < fewest:
        why = f"no interval: {latents} latents of all seeds, fewer than {fewest}"
        return no_estimate(float(values.mean()), why)
    beyond = float(np.mean([_beyond_documents(sample) for sample in samples]))
    each = np.stack([sample.without for sample in samples])
    between = _between_beyond_documents(values, each) if count > 1 else 0.0
    shared = beyond - (1 - 1 / count) * between
    added = float(np.clip(shared, beyond / count, 2 * beyond if groups else beyond))
    df = max(sum(len(sample.parts) for sample in samples) / count - 1, 1)
    resampled = "latents" + (" of every seed" if count > 1 else " of one seed")
    value = float(values.mean())
    third = 0.0
    if scale == "fisher":
        added /= (1 - min(value**2, 1 - 1e-6)) ** 2
    elif heavy_tails and beyond > 0:
        seeds = max(beyond / added, 1)  # that the seeds count for
        third = float(np.mean([np.power(sample.parts, 3).sum() for sample in samples])) / seeds**2
        df = seeds * float(np.mean([_heavy_tailed_df(sample) for sample in samples]))
    if groups:
        found = jackknifed(
            value, each.mean(0), f"{units} and {resampled}", added=added, added_df=df, scale=scale
        )
        return found._replace(skew=third / found.error**3)
    if not added > 0:  # NaN is not
        return no_estimate(value, f"no interval: the {resampled} do not differ")
    least, most = (min(values), max(values)) if count > 1 else (value, value)
    ends, skew = (float(least), float(most)), third / added**1.5
    return Estimate(value, math.sqrt(added), df, resampled, *ends, scale, added, skew)


def mean_over(values: Sequence[float], units: str, *, scale: Scale = "plain") -> Estimate:
    """The mean of independent values with Student's t: seeds, or conditions, one value each."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return no_estimate(math.nan, f"no interval: no value of any of the {units}")
    total = known.sum()
    without = (total - known) / max(len(known) - 1, 1)
    return jackknifed(float(known.mean()), without, units, fewest=2, scale=scale)


def on_scale(value: np.ndarray | float, scale: Scale) -> np.ndarray:
    """A value where its error is symmetric; shares are cut so that 0 and 1 stay finite."""
    if scale == "fisher":
        return fisher_z(value)
    if scale == "logit":
        return np.asarray(2 * fisher_z(2 * value - 1))
    return np.asarray(value)


def from_scale(value: np.ndarray, scale: Scale) -> np.ndarray:
    """Back again."""
    if scale == "fisher":
        return np.tanh(value)
    return (np.tanh(value / 2) + 1) / 2 if scale == "logit" else value


def fisher_z(correlation: np.ndarray | float) -> np.ndarray:
    """atanh of a correlation, which is cut at +-(1 - 1e-6) so that 1 stays finite."""
    return np.asarray(np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6)))


def t_quantile(degrees_of_freedom: float) -> float:
    """97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.975))


def _symmetric(t: float, skew: float) -> float:
    """Hall's transformation, which takes the skewness out of a studentised value."""
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _skewed(t: float, skew: float) -> float:
    """Its inverse."""
    if abs(skew) < 1e-6:  # NaN is not
        return t
    return 3 / skew * (float(np.cbrt(1 + skew * (t - skew / 6))) - 1)


def _heavy_tailed_df(sample: LatentSample) -> float:
    """Degrees of freedom of the variance over latents: as many as hold it, at least 1.

    Of normal parts a third of the latents; a sample of few hides how heavy its tails are.
    """
    squares = np.square(sample.parts)
    return float(squares.sum() ** 2 / np.square(squares).sum())


def _between_beyond_documents(
    values: Float[np.ndarray, " seeds"], without: Float[np.ndarray, "seeds groups"]
) -> float:
    """Variance between seeds, less what documents explain of their differences; may be below 0."""
    count, groups = without.shape
    explained = 0.0
    if groups:
        own = without - without.mean(0)
        off = own - own.mean(1, keepdims=True)
        explained = (groups - 1) / groups * float(np.square(off).sum()) / (count - 1)
    return float(values.var(ddof=1)) - explained


def _beyond_documents(sample: LatentSample) -> float:
    """Variance of the statistic over latents, less what documents explain of it; at least 0."""
    latents, groups = len(sample.parts), len(sample.parts_without)
    if latents < 2:
        return 0.0
    over_latents = latents / (latents - 1) * float(np.square(sample.parts).sum())
    if not over_latents > ROUNDING**2:
        return 0.0
    if not groups:
        return over_latents
    known = np.isfinite(sample.parts_without)
    counts = known.sum(0)
    means = np.where(known, sample.parts_without, 0).sum(0) / np.maximum(counts, 1)
    off = np.where(known, sample.parts_without - means, 0)
    by_documents = (groups - 1) / groups * float(np.square(off).sum())
    return max(0.0, over_latents - by_documents)
