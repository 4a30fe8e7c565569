"""Tests, fits and bootstraps from their definitions: counting, loops, plain Newton."""

import itertools
import math

import numpy as np


def ranks(values):
    """1 + how many are smaller + half of the others that are equal."""
    values = np.asarray(values).tolist()
    return np.array(
        [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
    )


def pearson(a, b):
    a, b = np.asarray(a, float) - np.mean(a), np.asarray(b, float) - np.mean(b)
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def partial_spearman(x, y, z):
    """Correlation of what is left of the ranks of x and y after a line in the ranks of z."""
    return partial_pearson(ranks(x), ranks(y), ranks(z))


def partial_pearson(a, b, c):
    design = np.column_stack([np.ones(len(c)), c])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (a, b)]
    return pearson(*left)


def permutation_p(x, y):
    """Share of the orders of y whose |rho| reaches the observed one."""
    observed = abs(spearman(x, y))
    orders = list(itertools.permutations(y))
    return sum(abs(spearman(x, order)) >= observed - 1e-9 for order in orders) / len(orders)


def holm(p):
    """Smallest first: times the number of tests not yet rejected, never below the one before."""
    adjusted, before = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        before = max(before, min(1.0, (len(p) - step) * p[i]))
        adjusted[i] = before
    return adjusted


def auc(y, scores):
    """Over all pairs of a positive and a negative."""
    y, scores = np.asarray(y).tolist(), np.asarray(scores).tolist()
    above = [s for s, positive in zip(scores, y, strict=True) if positive]
    below = [s for s, positive in zip(scores, y, strict=True) if not positive]
    won = sum((a > b) + (a == b) / 2 for a in above for b in below)
    return won / (len(above) * len(below))


def logistic(x, y):
    """Coefficients, intercept first, by plain Newton steps."""
    x = np.column_stack([np.ones(len(x)), x])
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ beta))
        beta = beta + np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]), x.T @ (y - p))
    return beta


def clustered_covariance(x, y, beta, clusters):
    """Sandwich with summed scores per cluster and the factor G/(G-1) (n-1)/(n-k)."""
    x = np.column_stack([np.ones(len(x)), x])
    n, k = x.shape
    p = 1 / (1 + np.exp(-x @ beta))
    bread = np.linalg.inv(x.T @ (x * (p * (1 - p))[:, None]))
    meat, names = np.zeros((k, k)), sorted(set(clusters))
    for name in names:
        score = sum((y[i] - p[i]) * x[i] for i in range(n) if clusters[i] == name)
        meat += np.outer(score, score)
    groups = len(names)
    return bread @ meat @ bread * groups / (groups - 1) * (n - 1) / (n - k)


def bootstrap_rank_correlation(seeds, draws, generator):
    """2.5 and 97.5 percentiles, raw and partial; seeds: list of (x, y, z), all defined.

    Seeds are drawn, then the latents of each drawn seed; ranks are those of the whole seed.
    """
    ranked = [tuple(ranks(v) for v in sample) for sample in seeds]
    raw, partial = [], []
    for _ in range(draws):
        found = []
        for s in generator.integers(len(ranked), size=len(ranked)):
            index = generator.integers(len(ranked[s][0]), size=len(ranked[s][0]))
            a, b, c = (r[index] for r in ranked[s])
            found.append((pearson(a, b), partial_pearson(a, b, c)))
        raw.append(np.mean([f[0] for f in found]))
        partial.append(np.mean([f[1] for f in found]))
    return np.percentile(raw, (2.5, 97.5)), np.percentile(partial, (2.5, 97.5))


def bootstrap_auc(y, scores, clusters, draws, generator):
    """Whole clusters are drawn; their rows are put together and every pair is compared."""
    names = sorted(set(clusters))
    values = []
    for _ in range(draws):
        rows = np.concatenate(
            [np.flatnonzero(clusters == name) for name in generator.choice(names, len(names))]
        )
        if y[rows].any() and not y[rows].all():
            values.append(auc(y[rows], scores[rows]))
    return np.percentile(values, (2.5, 97.5))
