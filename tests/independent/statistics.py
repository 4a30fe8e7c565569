"""Tests, fits and errors from their definitions: counting, loops, plain Newton, leaving out."""

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


def jackknife_covariance(x, y, clusters):
    """Of the coefficients, fitted again without each cluster."""
    names = sorted(set(clusters))
    fits = np.array([logistic(x[clusters != name], y[clusters != name]) for name in names])
    off = fits - fits.mean(0)
    return (len(names) - 1) / len(names) * off.T @ off


def jackknife(values):
    """Squared error of a statistic from its values without each unit: the delete-one jackknife."""
    count, mean = len(values), math.fsum(values) / len(values)
    return (count - 1) / count * math.fsum((value - mean) ** 2 for value in values)


def influence(statistic, num_latents, groups):
    """By how much the statistic moves as each latent counts more, per weight; numerically."""
    step, found = 1e-4, []
    for latent in range(num_latents):
        moved = [np.ones(num_latents), np.ones(num_latents)]
        moved[0][latent] += step
        moved[1][latent] -= step
        up, down = (statistic(weights, groups) for weights in moved)
        found.append((up - down) / (2 * step))
    return np.array(found)


def crossed(statistics, num_latents, num_groups, *, fisher=False):
    """(value, squared error by documents, squared error by latents) of a mean over seeds.

    statistics: per seed a function of the latents' weights and of the groups of documents that are
    left. What latents add is their variance (infinitesimal jackknife, L / (L - 1)) less what
    documents explain of it. Of that, the seeds' mean has what they share: less (1 - 1/S) times what
    the seeds differ by (less what documents explain of their differences); at least a share of 1/S,
    at most twice of it.
    """
    ones, every = np.ones(num_latents), list(range(num_groups))
    rest = [[group for group in every if group != left_out] for left_out in every]
    values = [statistic(ones, every) for statistic in statistics]
    without = [[statistic(ones, left) for left in rest] for statistic in statistics]
    beyond = []
    for statistic in statistics:
        own = influence(statistic, num_latents, every)
        parts = [influence(statistic, num_latents, left) for left in rest]
        explained = sum(jackknife(part) for part in zip(*parts, strict=True))
        beyond.append(max(0.0, num_latents / (num_latents - 1) * float(own @ own) - explained))
    latents, seeds = float(np.mean(beyond)), len(statistics)
    means = [float(np.mean(each)) for each in zip(*without, strict=True)]
    if seeds > 1:
        off = [[v - m for v, m in zip(part, means, strict=True)] for part in without]
        explained = sum(jackknife(part) for part in off if part) / (seeds - 1)
        differ = float(np.var(values, ddof=1)) - explained
        most = 2 * latents if num_groups else latents
        latents = min(max(latents - (1 - 1 / seeds) * differ, latents / seeds), most)
    value = float(np.mean(values))
    if fisher:
        means, latents = np.arctanh(means), latents / (1 - value**2) ** 2
    return value, jackknife(list(means)) if num_groups else 0.0, latents


def weighted_pearson(a, b, weights):
    a, b = (v - np.average(v, weights=weights) for v in (a, b))
    return float((weights * a) @ b / math.sqrt(((weights * a) @ a) * ((weights * b) @ b)))


def weighted_partial_pearson(a, b, c, weights):
    """Of what is left after a weighted line in c."""
    root = np.sqrt(weights)
    design = np.column_stack([np.ones(len(c)), c])
    left = [v - design @ np.linalg.lstsq(design * root[:, None], v * root)[0] for v in (a, b)]
    return weighted_pearson(*left, weights)
