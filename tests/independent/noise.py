"""The common change of activations and noise around it, from methods §10, with numpy's lstsq.

x and y are float64 [tokens, d_model]; a change is (m, A) with A [d_model, d_model].
"""

import numpy as np


def scalar(x, y):
    """(m, g I): one regression of all numbers on x, with an intercept for every dimension."""
    tokens, width = x.shape
    dimensions = np.tile(np.eye(width), (tokens, 1))
    found = np.linalg.lstsq(np.column_stack([x.ravel(), dimensions]), y.ravel(), rcond=None)[0]
    return found[1:], found[0] * np.eye(width)


def diagonal(x, y):
    """(m, A): one regression for every dimension."""
    lines = [
        np.linalg.lstsq(np.column_stack([a, np.ones(len(a))]), b, rcond=None)[0]
        for a, b in zip(x.T, y.T, strict=True)
    ]
    return np.array([line[1] for line in lines]), np.diag([line[0] for line in lines])


def low_rank(x, y, rank, generator, rounds):
    """(m, g I + U V^T) by alternating regressions from a random start.

    With U held, g, m and V are one regression, and with V held, g, m and U; each lowers the error.
    """
    tokens, width = x.shape
    dimensions, factor = np.tile(np.eye(width), (tokens, 1)), generator.normal(size=(width, rank))
    for turn in range(2 * rounds):
        # A x = g x + U (V^T x): with U held linear in V, whose numbers multiply U_ik x_j; and back.
        if turn % 2 == 0:
            products = np.einsum("ik,tj->tijk", factor, x)  # numbers: V [j, k]
        else:
            seen = x @ factor
            products = np.einsum("tk,ij->tijk", seen, np.eye(width))  # numbers: U [j, k]
        design = np.column_stack(
            [x.ravel(), dimensions, products.reshape(tokens * width, width * rank)]
        )
        found = np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
        other = found[1 + width :].reshape(width, rank)
        u, v = (factor, other) if turn % 2 == 0 else (other, factor)
        factor = np.linalg.qr(other)[0] if turn % 2 == 0 else other
    return found[1 : 1 + width], found[0] * np.eye(width) + u @ v.T


def remainder(x, y, change):
    """r = y - m - A x, token by token."""
    m, a = change
    return np.array([b - m - a @ one for one, b in zip(x, y, strict=True)])


def squared(vectors):
    """Mean squared norm."""
    return float(np.mean([v @ v for v in vectors]))


def shares(x, y, change):
    """(squared difference in lengths of x, shares of it that m, A - I and r hold).

    m is what the mean moves by; taken away first, A - I second.
    """
    m, a = change
    mean = x.mean(0)
    moved = m + a @ mean - mean
    total = squared(y - x)
    after_shift, left = squared(y - x - moved), squared(remainder(x, y, change))
    return (
        total / squared(x),
        (total - after_shift) / total,
        (after_shift - left) / total,
        left / total,
    )


def without_common_change(y, change):
    """A^-1 (y - m), by solving for every token."""
    m, a = change
    return np.array([np.linalg.solve(a, b - m) for b in y])
