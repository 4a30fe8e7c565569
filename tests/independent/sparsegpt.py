"""SparseGPT from its definition: one row, one weight at a time, every inverse taken anew."""

import math
from decimal import Decimal

import numpy as np


def prune(weight, inputs, scope, sparsity_text, *, block=128, group=None, damping=0.01):
    """Weights [output, input] after pruning and what stays, both float64 / bool.

    inputs: [tokens, input]. Of every `block` columns so many weights go that up to the block's end
    floor(s * n) of them have; `group` (n, m): n of every m neighbours of a row.
    """
    weight = np.array(weight, dtype=np.float64)
    rows, columns = weight.shape
    hessian = np.zeros((columns, columns))
    for token in np.asarray(inputs, dtype=np.float64):
        hessian += np.outer(token, token)
    dead = [hessian[j, j] == 0 for j in range(columns)]
    mean = np.mean([hessian[j, j] for j in range(columns) if not dead[j]])
    for j in range(columns):
        hessian[j, j] = (mean if dead[j] else hessian[j, j]) + damping * mean
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    keep = np.ones((rows, columns), dtype=bool)
    for j in range(columns):
        if group and j % group[1] == 0:
            for i in range(rows):
                _drop(
                    keep, [(i, k) for k in range(j, j + group[1])], group[0], weight, inverses, dead
                )
        elif not group and j % block == 0:
            end = min(j + block, columns)
            members = [[(i, k) for k in range(j, end)] for i in range(rows)]
            if scope == "matrix":
                members = [[place for row in members for place in row]]
            share = Decimal(sparsity_text) * (rows if scope == "matrix" else 1)
            count = math.floor(share * end) - math.floor(share * j)
            for places in members:
                _drop(keep, places, count, weight, inverses, dead)
        for i in range(rows):
            if not keep[i, j]:
                # The least squares answer to w_j = 0, given all columns to the left are settled.
                weight[i, j:] -= weight[i, j] / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0.0
    return weight, keep


def _drop(keep, places, count, weight, inverses, dead):
    """The `count` places whose loss costs least; among equals the first."""
    costs = [0.0 if dead[k] else weight[i, k] ** 2 / inverses[k][0, 0] for i, k in places]
    for number in sorted(range(len(places)), key=lambda n: (costs[n], n))[:count]:
        keep[places[number]] = False
