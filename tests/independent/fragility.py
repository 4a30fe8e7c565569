"""Survival by firing-rate quintile, latent by latent in exact fractions (methods §7, RQ4)."""

from fractions import Fraction

import numpy as np


def survived(latent, measure, tau, source="pruned"):
    """(what the measure says of one latent, a row of fates, and by what it is divided), or None."""
    kind, _, noise = measure.partition("_")
    tail = "_null" if source == "null" else ""
    value, below = latent.get(f"{measure}{tail}"), 1.0
    if kind == "excess":
        value = latent[f"persistence{tail}_z"] - latent[f"persistence_noise_{noise}_z"]
    elif kind == "relative":  # of a group: sum over sum
        value, below = latent[f"persistence{tail}"], latent[f"persistence_noise_{noise}"]
    elif kind not in ("persistence", "scaling"):
        value = latent[f"cosine_{measure}"]
        if not np.isnan(value):
            value = float(latent[f"mutual_{measure}"] == 1 and value >= tau)
    return None if np.isnan(value) or np.isnan(below) else (value, below)


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


def quintiles(latents, measure, tau, source="pruned"):
    """quintile -> (mean rate, survival, latents): per seed, then the mean over seeds.

    Only latents with a value count; a quintile without any has NaN, NaN, 0.
    """
    by_seed = {}
    for latent in latents:
        by_seed.setdefault(latent["seed"], []).append(latent)
    rates, values, counts = ({q: [] for q in range(1, 6)} for _ in range(3))
    for own in by_seed.values():
        for quintile, group in enumerate(groups_of(own, measure), start=1):
            known = [latent for latent in group if survived(latent, measure, tau, source)]
            if known:
                found = [survived(latent, measure, tau, source) for latent in known]
                above, below = (mean(part) for part in zip(*found, strict=True))
                rates[quintile].append(mean(sorting_rate(latent, measure) for latent in known))
                values[quintile].append(above / below)
                counts[quintile].append(len(known))
    return {q: (mean(rates[q]), mean(values[q]), sum(counts[q])) for q in range(1, 6)}


def mean(values):
    """Summed without rounding; NaN of nothing."""
    exact = [Fraction(value) for value in values]
    return float(sum(exact) / len(exact)) if exact else np.nan
