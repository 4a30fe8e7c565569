"""Matching by brute force, written from methods §6: the whole matrix, plain loops."""

import numpy as np


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    left = a / np.linalg.norm(a, axis=1, keepdims=True)
    right = b / np.linalg.norm(b, axis=1, keepdims=True)
    return left @ right.T


def one_way(c: np.ndarray, tau: float) -> float:
    return sum(max(row) >= tau for row in c) / len(c)


def mnn(c: np.ndarray, tau: float) -> float:
    hits = 0
    for i in range(c.shape[0]):
        j = min(range(c.shape[1]), key=lambda j: (-c[i, j], j))
        back = min(range(c.shape[0]), key=lambda r: (-c[r, j], r))
        hits += back == i and c[i, j] >= tau
    return hits / len(c)


def greedy_pairs(c: np.ndarray, tau: float) -> dict[int, int]:
    pairs = [(-c[i, j], i, j) for i in range(c.shape[0]) for j in range(c.shape[1])]
    rows, columns, matched = set(), set(), {}
    for negative, i, j in sorted(pairs):
        if -negative >= tau and i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            matched[i] = j
    return matched
