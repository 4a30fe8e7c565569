"""Intervals, tests and fits; the only place where anything is resampled or tested (methods §8).

scipy, scikit-learn and statsmodels are imported inside the functions that need them: that takes
seconds, and most stages need none of them.
"""

from prunelens.analyses.statistics.estimates import (
    Estimate,
    LatentSample,
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
    Interval,
    JackknifeInterval,
    PromptInterval,
    PromptTerm,
    interval_over_prompts,
    interval_over_seeds,
    interval_over_windows,
    jackknife_over_seeds,
)
from prunelens.analyses.statistics.prediction import (
    Auc,
    LogisticFit,
    clustered_auc,
    clustered_covariance,
    fit_logistic,
)
from prunelens.analyses.statistics.ranks import (
    Estimates,
    ExactTest,
    RankCorrelations,
    RankSample,
    exact_spearman,
    holm_adjusted,
    rank_correlations,
)

__all__ = [
    "Auc",
    "Estimate",
    "Estimates",
    "ExactTest",
    "Interval",
    "JackknifeInterval",
    "LatentSample",
    "LogisticFit",
    "PromptInterval",
    "PromptTerm",
    "RankCorrelations",
    "RankSample",
    "clustered_auc",
    "clustered_covariance",
    "crossed",
    "difference",
    "exact_spearman",
    "fisher_z",
    "fit_logistic",
    "holm_adjusted",
    "interval_over_prompts",
    "interval_over_seeds",
    "interval_over_windows",
    "jackknife_over_seeds",
    "jackknifed",
    "mean_over",
    "no_estimate",
    "rank_correlations",
    "ratio_of_means",
    "t_quantile",
]
