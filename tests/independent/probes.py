"""Probes once more, token by token: a logistic ridge by Newton's method, AUCs by counting pairs."""

from __future__ import annotations

import numpy as np


def logistic_ridge(x: np.ndarray, y: np.ndarray, *, c: float) -> np.ndarray:
    """Weights and intercept of least c * log loss + |w|^2 / 2; the intercept is free."""
    x = np.column_stack([x, np.ones(len(x))]).astype(float)
    ridge = np.diag(np.append(np.ones(x.shape[1] - 1), 0.0))
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ beta))
        gradient = ridge @ beta - c * x.T @ (y - p)
        beta = beta - np.linalg.solve(ridge + c * (x.T * (p * (1 - p))) @ x, gradient)
    return beta


def auc(scores: np.ndarray, y: np.ndarray) -> float:
    """Pairs with the positive above, ties half."""
    won = [(a > b) + (a == b) / 2 for a in scores[y] for b in scores[~y]]
    return float(np.mean(won))


def auc_without(scores: np.ndarray, y: np.ndarray, groups: np.ndarray) -> list[float]:
    """The same without each group, one after the other."""
    return [auc(scores[groups != g], y[groups != g]) for g in np.unique(groups)]


def jackknife(value: float, without: list[float]) -> float:
    """Standard error by leaving one out."""
    count, parts = len(without), np.array(without)
    return float(np.sqrt((count - 1) / count * np.square(parts - parts.mean()).sum()))


def furthest_apart(latents: np.ndarray, y: np.ndarray, count: int) -> list[int]:
    """Latents whose means with and without are furthest apart, in deviations around the middle."""
    found = []
    for latent, values in enumerate(latents.T.astype(float)):
        means = values[y].mean(), values[~y].mean()
        spread = np.mean(values**2) - np.mean(means) ** 2
        found.append((-abs(means[0] - means[1]) / np.sqrt(spread) if spread > 0 else 0.0, latent))
    return [latent for _, latent in sorted(found)[:count]]
