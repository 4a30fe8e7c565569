"""Activation correlation, latent scaling and subspace overlap from their definitions, in numpy.

Whole matrices, plain loops, one regression per latent; z is dense [tokens, latents].
"""

import numpy as np

FEWEST_FIRINGS = 10


def correlations(za, zb):
    """[latents_a, latents_b] Pearson; 0 where either fires on too few tokens or never varies."""
    c = np.zeros((za.shape[1], zb.shape[1]))
    for i, a in enumerate(za.T):
        for j, b in enumerate(zb.T):
            if min((a > 0).sum(), (b > 0).sum()) >= FEWEST_FIRINGS and a.std() and b.std():
                c[i, j] = np.corrcoef(a, b)[0, 1]
    return c


def slopes(z, decoder, bias, y):
    """Per latent: least-squares slope, on its activation, of what the others leave along its row.

    In lengths of the row; NaN where it fires on too few tokens.
    """
    found = np.full(z.shape[1], np.nan)
    for j, row in enumerate(decoder):
        if (z[:, j] > 0).sum() < FEWEST_FIRINGS:
            continue
        others = [i for i in range(len(decoder)) if i != j]
        left = y - bias - z[:, others] @ decoder[others]
        design = np.stack([z[:, j], np.ones(len(z))], axis=1)
        found[j] = np.linalg.lstsq(design, left @ row / (row @ row), rcond=None)[0][0]
    return found


def jackknife(groups, statistic):
    """Standard error of statistic(kept tokens), leaving out one group of tokens at a time."""
    values = np.array([statistic(np.flatnonzero(groups != group)) for group in np.unique(groups)])
    return np.sqrt((len(values) - 1) * values.var(axis=0))


def null(x, y, gain, shift, other):
    """Token by token, the common change of x and the remainder of another token of y."""
    rest = [y[t] - (gain * x[t] + shift) for t in range(len(x))]
    return np.array([gain * x[t] + shift + rest[other[t]] for t in range(len(x))])


def isotropic(x, y, gain, shift, directions):
    """Token by token, the common change of x and as much of a direction as y has of remainder."""
    found = []
    for one, two, direction in zip(x, y, directions, strict=True):
        common = gain * one + shift
        size = np.sqrt(((two - common) ** 2).sum() / (direction**2).sum())
        found.append(common + size * direction)
    return np.array(found)


def subspace_overlap(row, others, size=4):
    """1 - |unit row - its least-squares fit by the `size` others of largest |cosine||^2."""
    row = row / np.linalg.norm(row)
    others = others / np.linalg.norm(others, axis=1, keepdims=True)
    nearest = others[np.argsort(-np.abs(others @ row))[:size]]
    fit = nearest.T @ np.linalg.lstsq(nearest.T, row, rcond=1e-4)[0]
    return 1 - (row - fit) @ (row - fit)


def joint_scales(z, decoder, y):
    """Least squares for all latents at once: y - mean as scales times their own contributions."""
    parts = (z - z.mean(0))[:, None, :] * decoder.T[None]  # [tokens, d_model, latents]
    design = parts.reshape(-1, len(decoder))
    return np.linalg.lstsq(design, (y - y.mean(0)).reshape(-1), rcond=None)[0]
