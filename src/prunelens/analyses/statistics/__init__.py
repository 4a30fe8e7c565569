"""Intervals, tests and fits; the only place where anything is resampled or tested (methods §8).

scipy, scikit-learn and statsmodels are imported inside the functions that need them: that takes
seconds, and most stages need none of them.
"""

from prunelens.analyses.statistics.intervals import (
    Interval,
    JackknifeInterval,
    PromptInterval,
    PromptTerm,
    fisher_z,
    interval_over_prompts,
    interval_over_seeds,
    interval_over_windows,
    jackknife_over_seeds,
    t_quantile,
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
    LatentSample,
    RankCorrelations,
    exact_spearman,
    holm_adjusted,
    rank_correlations,
)

__all__ = [
    "Auc",
    "Estimates",
    "ExactTest",
    "Interval",
    "JackknifeInterval",
    "LatentSample",
    "LogisticFit",
    "PromptInterval",
    "PromptTerm",
    "RankCorrelations",
    "clustered_auc",
    "clustered_covariance",
    "exact_spearman",
    "fisher_z",
    "fit_logistic",
    "holm_adjusted",
    "interval_over_prompts",
    "interval_over_seeds",
    "interval_over_windows",
    "jackknife_over_seeds",
    "rank_correlations",
    "t_quantile",
]
