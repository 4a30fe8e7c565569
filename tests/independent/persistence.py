"""Same-dictionary persistence of one latent, from methods §7: two series over the same tokens."""

import math

import numpy as np

FEWEST_FIRINGS = 10


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
