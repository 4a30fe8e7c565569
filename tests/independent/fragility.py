"""Survival by firing-rate quintile, latent by latent in exact fractions (methods §7, RQ4)."""

from fractions import Fraction

import numpy as np


def survived(latent, measure, tau):
    """What the measure says of one latent (a row of fates), or None where it says nothing.

    Of a measure that is a share of something else: what is shared, see `whole`.
    """
    kind, _, noise = measure.partition("_")
    if measure in ("persistence", "scaling"):
        value = latent[measure]
    elif kind == "excess":
        value = latent["persistence_z"] - latent[f"persistence_noise_{noise}_z"]
    elif kind == "relative":
        value = latent["persistence"] + 0 * whole(latent, measure)  # NaN where either is
    elif np.isnan(latent[f"cosine_{measure}"]):
        return None
    else:
        mutual = latent[f"mutual_{measure}"] == 1
        value = 1.0 if mutual and latent[f"cosine_{measure}"] >= tau else 0.0
    return None if np.isnan(value) else value


def whole(latent, measure):
    """What the group's sum is divided by, latent by latent: 1, or what noise leaves."""
    kind, _, noise = measure.partition("_")
    return latent[f"persistence_noise_{noise}"] if kind == "relative" else 1.0


def sorting_rate(latent, measure):
    """What is measured on the second half of the text is sorted by the first."""
    halves = ("persistence", "scaling", "excess", "relative")
    half = measure.split("_")[0] in halves
    return latent["firing_rate_first_half" if half else "firing_rate"]


def groups_of(latents, measure):
    """Five lists of the alive latents of ONE seed, the rare first; equal rates by index."""
    alive = [latent for latent in latents if sorting_rate(latent, measure) > 0]
    alive.sort(key=lambda latent: (sorting_rate(latent, measure), latent["latent"]))
    groups = [[], [], [], [], []]
    for place, latent in enumerate(alive):
        groups[5 * place // len(alive)].append(latent)
    return groups


def quintiles(latents, measure, tau):
    """quintile -> (mean rate, mean survival, latents): per seed, then the mean over seeds.

    Only latents with a value count; a quintile without any has NaN, NaN, 0.
    """
    by_seed = {}
    for latent in latents:
        by_seed.setdefault(latent["seed"], []).append(latent)
    rates, values, counts = ({q: [] for q in range(1, 6)} for _ in range(3))
    for own in by_seed.values():
        for quintile, group in enumerate(groups_of(own, measure), start=1):
            known = [latent for latent in group if survived(latent, measure, tau) is not None]
            if known:
                rates[quintile].append(mean(sorting_rate(latent, measure) for latent in known))
                share = mean(survived(latent, measure, tau) for latent in known)
                values[quintile].append(share / mean(whole(latent, measure) for latent in known))
                counts[quintile].append(len(known))
    return {q: (mean(rates[q]), mean(values[q]), sum(counts[q])) for q in range(1, 6)}


def mean(values):
    """Summed without rounding; NaN of nothing."""
    exact = [Fraction(value) for value in values]
    return float(sum(exact) / len(exact)) if exact else np.nan
