"""Same-dictionary persistence from methods §7 and §10: two series over the same tokens."""

import math

import numpy as np
import torch
from tests.independent import noise

FEWEST_FIRINGS = 10
NULL_SEED = 999_999


def disturbed(x, y, change, groups, *, change_seed, seed):
    """Source -> the disturbed activations of every draw, of float64 x and y [tokens, d_model].

    Partners are drawn one by one, isotropic noise group of documents after group.
    """
    m, a = change
    common = np.array([m + a @ one for one in x])
    r = noise.remainder(x, y, change)
    generators = [torch.Generator().manual_seed(change_seed + 1000 * seed + n) for n in range(3)]
    partners = [partner_of(len(x), generator) for generator in generators]
    null = partner_of(len(x), torch.Generator().manual_seed(change_seed + NULL_SEED))
    isotropic = [np.empty_like(x) for _ in generators]
    for group in range(int(groups.max()) + 1):
        own = np.flatnonzero(groups == group)
        for made, generator in zip(isotropic, generators, strict=True):
            drawn = torch.randn(len(own), x.shape[1], generator=generator).double().numpy()
            for token, direction in zip(own, drawn, strict=True):
                length = np.linalg.norm(r[token]) / np.linalg.norm(direction)
                made[token] = common[token] + direction * length
    return {
        "pruned": [y],
        "undone": [noise.without_common_change(y, change)],
        "null": [common + r[null]],
        "noise_isotropic": isotropic,
        "noise_shuffled": [common + r[other] for other in partners],
        "difference_shuffled": [x + (y - x)[partners[0]]],
    }


def partner_of(num_tokens, generator):
    """So many tokens further on, from the start again after the last."""
    ahead = torch.randint(1, num_tokens, (num_tokens,), generator=generator).tolist()
    every = list(range(num_tokens))
    return [(every[token:] + every)[steps] for token, steps in enumerate(ahead)]


def without(before, after, groups):
    """The correlation of one latent over the tokens that remain, group after group left out.

    Whether it fires often enough is asked of all tokens; NaN where it never fires on those left.
    """
    if sum(a > 0 for a in before) < FEWEST_FIRINGS:
        return [math.nan] * (max(groups) + 1)
    found = []
    for left_out in range(max(groups) + 1):
        pairs = [
            (float(a), float(b))
            for a, b, group in zip(before, after, groups, strict=True)
            if group != left_out
        ]
        fires, silent = any(a > 0 for a, _ in pairs), all(b == 0 for _, b in pairs)
        found.append(0.0 if fires and silent else pearson(pairs))
    return found


def persistence(before, after):
    """(correlation, Jaccard overlap, silenced) of activations before and after."""
    pairs = [(float(a), float(b)) for a, b in zip(before, after, strict=True)]
    if sum(a > 0 for a, _ in pairs) < FEWEST_FIRINGS:
        return math.nan, math.nan, False
    both = sum(a > 0 and b > 0 for a, b in pairs)
    either = sum(a > 0 or b > 0 for a, b in pairs)
    silenced = all(b == 0 for _, b in pairs)
    return 0.0 if silenced else pearson(pairs), both / either, silenced


def pearson(pairs):
    """NaN where a series never varies."""
    n = len(pairs)
    means = [math.fsum(pair[side] for pair in pairs) / n for side in (0, 1)]
    left = [(a - means[0], b - means[1]) for a, b in pairs]
    spread = math.fsum(a * a for a, _ in left) * math.fsum(b * b for _, b in left)
    return math.fsum(a * b for a, b in left) / math.sqrt(spread) if spread > 0 else math.nan


def summary(table):
    """The columns of persistence.csv for one source; rows: correlation, Jaccard, silenced."""
    known = [row for row in table if not math.isnan(row[0])]
    overlaps = [row[1] for row in table if not math.isnan(row[1])]
    return {
        "mean_correlation": np.mean([row[0] for row in known]) if known else math.nan,
        "mean_jaccard": np.mean(overlaps) if overlaps else math.nan,
        "share_above_0.7": np.mean([row[0] > 0.7 for row in known]) if known else math.nan,
        "num_silenced": sum(row[2] for row in table),
        "num_undefined": len(table) - len(known),
    }
