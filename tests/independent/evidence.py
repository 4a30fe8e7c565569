"""Where one latent fires, from the definitions: loops over its activations, one token at a time.

And the gain that activations [tokens, d_model] have in common.
"""

import math
from fractions import Fraction

import numpy as np

WORD = 2**64


def strongest(fires, count):
    """The (window, position, activation) of the `count` strongest, at most one of each window."""
    by_window = {}
    for window, position, activation in fires:
        by_window.setdefault(window, []).append((-activation, window, position))
    best = sorted(min(each) for each in by_window.values())
    return [(window, position, -negative) for negative, window, position in best[:count]]


def sample(fires, samples, priority):
    """(low, high, firing) of each bin that has one: of its firings, that of the least priority."""
    if not fires:
        return []
    largest = max(Fraction(activation) for _, _, activation in fires)
    end = Fraction(1)
    while end < largest:
        end *= 2
    while end / 2 >= largest:
        end /= 2
    found = []
    for number in range(2 * samples):
        low, high = (end * Fraction(edge, 2 * samples) for edge in (number, number + 1))
        inside = [fire for fire in fires if low < Fraction(fire[2]) <= high]
        if inside:
            found.append((low, high, min(inside, key=lambda fire: priority(*fire[:2]))))
    return found


def around(activations, window, position, context_tokens, either_side):
    """Activations by (window, position); NaN behind the window's ends and where there is none."""
    found = []
    for place in range(position - either_side, position + either_side + 1):
        inside = 0 <= place < context_tokens
        found.append(activations.get((window, place), math.nan) if inside else math.nan)
    return found


def priority(seed, latent, token):
    """The upper 31 bits of splitmix64 over the three, and the token where they are equal."""
    state = 0
    for number in (seed, latent, token):
        state = (state + number + 0x9E3779B97F4A7C15) % WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB % WORD
        state ^= state >> 31
    return state >> 33, token


def common_gain(x, y):
    """(g, m) of the least squares fit of y by g x + m, all dimensions in one regression."""
    tokens, width = x.shape
    design = np.zeros((tokens * width, 1 + width))
    for token in range(tokens):
        for dimension in range(width):
            row = token * width + dimension
            design[row, 0], design[row, 1 + dimension] = x[token, dimension], 1
    found = np.linalg.lstsq(design, y.reshape(-1), rcond=None)[0]
    return found[0], found[1:]
