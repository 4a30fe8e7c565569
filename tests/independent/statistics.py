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
