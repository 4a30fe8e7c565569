"""Logistic regression, and the AUC with clusters left out in turn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from prunelens.analyses.statistics.estimates import Estimate, Scale, jackknifed, no_estimate

FEWEST_CLUSTERS = 4  # conditions; fewer, left out in turn, say too little


class LogisticFit(NamedTuple):
    """An unpenalised logistic regression."""

    coefficients: Float[np.ndarray, " coefficients"]
    """Intercept first, then one per feature in its own unit; NaN where `reason` says why."""
    reason: str


class Auc(NamedTuple):
    """Area under the ROC curve, clusters left out in turn; NaN where `reason` says why."""

    pooled: Estimate
    within: Estimate
    """Of pairs from the same cluster only."""
    reason: str


def fit_logistic(features: pd.DataFrame, y: Bool[np.ndarray, " rows"]) -> LogisticFit:
    """Maximum likelihood without penalty.

    NaN with a reason where no unique maximum exists: one class, a constant feature, features that
    determine each other, or classes that a line separates (coefficients would be infinite).
    """
    from sklearn.linear_model import LogisticRegression

    x = features.to_numpy(dtype=float)
    if reason := _not_identified(features, y):
        return LogisticFit(np.full(x.shape[1] + 1, np.nan), reason)
    centre, scale = x.mean(0), x.std(0)
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9, max_iter=200)
    model.fit((x - centre) / scale, y)
    slopes = model.coef_[0] / scale
    return LogisticFit(np.append(model.intercept_ - slopes @ centre, slopes), "")


def clustered_auc(
    y: Bool[np.ndarray, " rows"],
    scores: Float[np.ndarray, " rows"],
    clusters: Int[np.ndarray, " rows"],
    *,
    less: Float[np.ndarray, " rows"] | None = None,
) -> Auc:
    """Chance that a positive row scores above a negative one (ties count half).

    `within` compares rows of one cluster only. A pooled AUC also compares clusters, and when each
    was held out in turn, that part is biased downwards: leaving out a cluster of many positives
    lowers the fit's intercept for just that cluster.
    The intervals leave out clusters in turn, scores fixed. Pairs won are counted once per pair of
    clusters, so leaving one out is a weighted sum.
    Args: less: other scores of the same rows, whose AUC is taken away: a paired difference.
    """
    nothing = no_estimate(np.nan, "one class only")
    if not y.any() or y.all():
        return Auc(nothing, nothing, "one class only")
    wins, positives, negatives = _pairs_won(y, scores, clusters)
    if less is not None:
        wins = wins - _pairs_won(y, less, clusters)[0]
    count = len(positives)
    pooled, weights = _pooled(wins, positives, negatives), _left_out(count)
    with np.errstate(invalid="ignore"):
        within = (weights @ np.diag(wins)) / (weights @ (positives * negatives))
    reason = "every condition has one class only" if np.isnan(within[0]) else ""
    if count < FEWEST_CLUSTERS:
        reason = f"an interval of the AUC needs {FEWEST_CLUSTERS} conditions"
    scale: Scale = "logit" if less is None else "plain"
    of_pooled, of_within = (
        jackknifed(float(v[0]), v[1:], "conditions", fewest=FEWEST_CLUSTERS, scale=scale)
        for v in (pooled, within)
    )
    return Auc(of_pooled, of_within, reason)


def pooled_auc(
    y: Bool[np.ndarray, " rows"],
    scores: Float[np.ndarray, " rows"],
    clusters: Int[np.ndarray, " rows"],
) -> Float[np.ndarray, " replicates"]:
    """The AUC, and then without each cluster in turn; NaN where one class only is left."""
    return _pooled(*_pairs_won(y, scores, clusters))


def _pooled(wins: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    weights = _left_out(len(positives))
    with np.errstate(invalid="ignore"):
        pooled = np.einsum("dp,pn,dn->d", weights, wins, weights, optimize=True)
        return np.asarray(pooled / ((weights @ positives) * (weights @ negatives)))


def _left_out(count: int) -> np.ndarray:
    """Weights of the clusters in the data themselves, and then without each."""
    return np.vstack([np.ones(count), 1 - np.eye(count)])


def _not_identified(features: pd.DataFrame, y: np.ndarray) -> str:
    """Why no unique maximum of the likelihood exists; empty where one does."""
    if not len(y):
        return "no rows"
    if y.all() or not y.any():
        return "one class only"
    for name in features:
        if features[name].min() == features[name].max():
            return f"{name} is the same in every row"
    x = features.to_numpy(dtype=float)
    x = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return "the features determine each other"
    return "a line separates the two classes" if _separated(x, y) else ""


def _separated(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether some b has (2y - 1) x b >= 0 in every row and > 0 in one (complete or quasi).

    A linear programme in b. Among rows that differ in x[:, 1] alone only its extremes can bind,
    and the other columns (sparsity) have few values, so the programme is tiny.
    """
    from scipy.optimize import linprog

    order = np.lexsort((x[:, 1], *x[:, 2:].T, y))
    others = np.column_stack([y, x[:, 2:]])[order]
    changes = (others[1:] != others[:-1]).any(1)
    extremes = order[np.append(True, changes) | np.append(changes, True)]
    signed = x[extremes] * np.where(y[extremes], 1.0, -1.0)[:, None]
    bounds = [(-1, 1)] * signed.shape[1]
    best = linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=bounds)
    assert best.success, best.message
    # The solver's tolerance is 1e-7; x is standardised, so a separation is far larger.
    return bool(-best.fun > 1e-5)


def _pairs_won(
    y: np.ndarray, scores: np.ndarray, clusters: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """wins[p, n]: pairs (positive of cluster p, negative of n) with the positive above, ties half;
    and the number of positives and of negatives per cluster.
    """
    codes = np.unique(scores, return_inverse=True)[1]
    cluster = np.unique(clusters, return_inverse=True)[1]
    num = int(cluster.max()) + 1
    positives, negatives = (np.bincount(cluster[rows], minlength=num) for rows in (y, ~y))
    values = int(codes.max()) + 1
    equal = np.bincount(cluster[~y] * values + codes[~y], minlength=num * values)
    equal = equal.reshape(num, values)
    beaten = (np.cumsum(equal, axis=1) - equal / 2)[:, codes[y]]
    wins = (np.arange(num)[:, None] == cluster[y]).astype(float) @ beaten.T
    return wins, positives.astype(float), negatives.astype(float)
