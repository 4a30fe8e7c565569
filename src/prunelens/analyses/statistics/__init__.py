"""Intervals, tests and fits; the only place where anything is resampled or tested (methods §8).

scipy and scikit-learn are imported inside the functions that need them: that takes seconds, and
most stages need neither.
"""

from prunelens.analyses.statistics.estimates import (
    FEWEST_UNITS,
    Estimate,
    LatentSample,
    Scale,
    crossed,
    difference,
    fisher_z,
    jackknifed,
    mean_over,
    no_estimate,
    ratio_of_means,
    t_quantile,
)
from prunelens.analyses.statistics.intervals import (
    interval_over_windows,
    jackknife_over_seeds,
)
from prunelens.analyses.statistics.prediction import (
    Auc,
    LogisticFit,
    clustered_auc,
    fit_logistic,
    pooled_auc,
)
from prunelens.analyses.statistics.ranks import (
    ExactTest,
    RankSample,
    exact_spearman,
    holm_adjusted,
    rank_correlation,
)

__all__ = [
    "FEWEST_UNITS",
    "Auc",
    "Estimate",
    "ExactTest",
    "LatentSample",
    "LogisticFit",
    "RankSample",
    "Scale",
    "clustered_auc",
    "crossed",
    "difference",
    "exact_spearman",
    "fisher_z",
    "fit_logistic",
    "holm_adjusted",
    "interval_over_windows",
    "jackknife_over_seeds",
    "jackknifed",
    "mean_over",
    "no_estimate",
    "pooled_auc",
    "rank_correlation",
    "ratio_of_means",
    "t_quantile",
]
