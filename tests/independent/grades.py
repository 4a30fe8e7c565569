"""What a measure tells of a planted truth, latent by latent from the definitions."""

import math

import numpy as np
from scipy.stats import binomtest
from tests.independent.statistics import auc, spearman

SURVIVED, DESTROYED = {"kept", "rescaled"}, {"removed", "rotated"}
AMOUNT_FIRING = {
    **dict.fromkeys(("kept", "rescaled", "weakened", "turned", "rotated"), 1),
    "split": 0.5,
    "merged": 0.5,
    "removed": 0,
}


def grade(rows, threshold, *, rotated_survives=False):
    """Of rows {seed, alive, fate, share, value, mutual (None: no match), rate, planted or NaN}."""
    survived = {"kept", "rescaled", "rotated"} if rotated_survives else SURVIVED

    def left(row):
        return AMOUNT_FIRING[row["fate"]] if rotated_survives else row["share"]

    asked = [row for row in rows if row["alive"] and row["fate"] in SURVIVED | DESTROYED]
    known = [row for row in rows if row["alive"] and not math.isnan(row["value"])]
    judged = [row for row in known if row["fate"] in SURVIVED | DESTROYED]
    did = [row["fate"] in survived for row in judged]
    said = [row["value"] >= threshold and row["mutual"] in (None, True) for row in judged]
    hits = sum(d and s for d, s in zip(did, said, strict=True))
    feigned = sum(s and not d for d, s in zip(did, said, strict=True))
    return {
        "num_latents": len(judged),
        "share_defined": len(judged) / len(asked) if asked else math.nan,
        "auc": auc(did, [row["value"] for row in judged]) if 0 < sum(did) < len(did) else math.nan,
        "precision": hits / sum(said) if any(said) else math.nan,
        "recall": hits / sum(did) if any(did) else math.nan,
        "false_survival": feigned / (len(did) - sum(did)) if not all(did) else math.nan,
        "bias": mean_error(known, SURVIVED),
        "bias_rotated": mean_error(known, {"rotated"}),
        "rate_rho": mean_rho(known, lambda row: row["value"]),
        "truth_rho": mean_rho(known, left),
        "share_rho": mean_rho(known, left, lambda row: row["value"], firing=False),
    }


def mean_error(known, fates):
    """Measure minus what was planted."""
    errors = [row["value"] - row["planted"] for row in known if row["fate"] in fates]
    errors = [error for error in errors if not math.isnan(error)]
    return sum(errors) / len(errors) if errors else math.nan


def mean_rho(known, number, other=lambda row: row["rate"], *, firing=True):
    """With firing rate, latents that fire; mean over the seeds in which neither is constant."""
    found = []
    for seed in sorted({row["seed"] for row in known}):
        own = [row for row in known if row["seed"] == seed and (row["rate"] > 0 or not firing)]
        rates, numbers = [other(row) for row in own], [number(row) for row in own]
        if len(set(rates)) > 1 and len(set(numbers)) > 1:
            found.append(spearman(rates, numbers))
    return sum(found) / len(found) if found else math.nan


def share_between(hits, count):
    """Of a share, 99 %: where the exact test does not reject either side."""
    found = binomtest(hits, count).proportion_ci(0.99, method="exact")
    return found.low, found.high


def nearest_direction(row, directions, sigma):
    """(index, cosine) of the planted direction most like a decoder row, in normalised space."""
    best = (0, -2.0)
    for index, direction in enumerate(directions):
        cosine = angle_cosine(row, [x / s for x, s in zip(direction, sigma, strict=True)])
        if cosine > best[1]:
            best = (index, cosine)
    return best


def part_along(later, earlier):
    """Length of `later`'s shadow on the line of `earlier`, in lengths of `earlier`."""
    length = math.sqrt(sum(x * x for x in earlier))
    shadow = sum(x * y for x, y in zip(later, earlier, strict=True)) / length
    return shadow / length


def angle_cosine(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return float(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)))
