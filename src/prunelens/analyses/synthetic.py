"""Numbers whose truth is known, drawn from stated models, for intervals that read no activations.

Every function draws one data set and gives the interval that the tool gives for such numbers, with
the truth that it should hold.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float

from prunelens.analyses.causal_groups import FEWEST_LATENTS
from prunelens.analyses.statistics import (
    Estimate,
    LatentSample,
    RankSample,
    clustered_auc,
    crossed,
    difference,
    interval_over_windows,
    jackknife_over_seeds,
    jackknifed,
    mean_over,
    pooled_auc,
    rank_correlation,
    ratio_of_means,
)
from prunelens.analyses.verdict import Recovery, drop_estimate, ratio_estimate

Drawn = tuple[Estimate, float]
Draw = Callable[[np.random.Generator], Drawn]
MEAN = 0.7  # of what seeds, conditions or latents are drawn around
GROUPS = 20  # of documents
LATENTS = 40  # of a quintile
ALL_LATENTS = 150
# Of what a latent's rank has of its feature, and of the seed; squares add up.
SHARED, OWN = 0.8, 0.6
CELL = 0.3  # deviation of a latent on a group of documents, beyond what either has by itself
TEXT = 60  # windows, each of which resembles the one before
KL_SPREAD = 0.8  # deviation of the log of what ablating a latent does, as measured
BY_DOCUMENT, BY_LATENT_AND_DOCUMENT, BY_SEED = 0.3, 0.5, 0.2  # and of the log of its parts
LOSSES = 0.4  # deviation of the log of a document's mean loss
TOKENS = 200  # with a concept, and as many without
AUC_HALF_APART = 0.6369  # of scores half a deviation apart: Phi(0.5 / sqrt(2 + 0.2**2))
AUC_APART = 0.7581  # of scores one deviation apart, give or take 0.2: Phi(1 / sqrt(2 + 0.2**2))


def _over_seeds(num_seeds: int, conditions: int) -> Draw:
    """One value per seed and condition; a seed is good or bad at all of them."""

    def draw(generator: np.random.Generator) -> Drawn:
        own = generator.normal(0, 0.05, (num_seeds, 1))
        values = MEAN + own + generator.normal(0, 0.05, (num_seeds, conditions))
        cells = itertools.product(range(num_seeds), range(conditions))
        rows = [{"value": values[s, c], "condition": c, "seeds": (s,)} for s, c in cells]
        return jackknife_over_seeds(pd.DataFrame(rows)), MEAN

    return draw


def _over_pairs(num_seeds: int) -> Draw:
    """One value per pair of seeds, which both seeds have their part in."""

    def draw(generator: np.random.Generator) -> Drawn:
        own = generator.normal(0, 0.05, num_seeds)
        rows = [
            {"value": MEAN + own[[a, b]].sum() + generator.normal(0, 0.03), "seeds": (a, b)}
            for a, b in itertools.combinations(range(num_seeds), 2)
        ]
        return jackknife_over_seeds(pd.DataFrame(rows).assign(condition="all")), MEAN

    return draw


def _over_conditions(generator: np.random.Generator) -> Drawn:
    """Four conditions, one value each."""
    return mean_over(generator.normal(MEAN, 0.1, 4).tolist(), "conditions"), MEAN


def _auc(generator: np.random.Generator, *, within: bool, less: bool = False) -> Drawn:
    """Four conditions of 200 latents, of which some are harder; scores one deviation apart."""
    shift = generator.normal(0, 0.3, 4)  # of a condition's odds
    apart = generator.normal(1.0, 0.2, 4)
    clusters = np.repeat(np.arange(4), 200)
    y = generator.random(800) < 1 / (1 + np.exp(-shift[clusters]))
    scores = generator.normal(0, 1, 800) + np.where(y, apart[clusters], 0.0)
    other = generator.normal(0, 1, 800) if less else None
    found = clustered_auc(y, scores, clusters, less=other)
    return (found.within if within else found.pooled), AUC_APART - (0.5 if less else 0.0)


def _auc_over_documents(generator: np.random.Generator, *, share: bool) -> Drawn:
    """Two probes of one concept on documents that have it seldom or often and read well or badly;
    the AUC of the second, or its share of what the first has above chance."""
    frequent = generator.dirichlet(np.full(GROUPS, 2.0))
    documents = generator.choice(GROUPS, (2, TOKENS), p=frequent).ravel()
    y = np.arange(2 * TOKENS) < TOKENS
    common = generator.normal(0, 0.7, 2 * TOKENS)
    replicates = []
    for apart, spread in ((1.0, 0.2), (0.5, 0.2)):
        own = generator.normal(0, np.sqrt(1 - 0.7**2), 2 * TOKENS)
        read = generator.normal(apart, spread, GROUPS)[documents]
        replicates.append(pooled_auc(y, common + own + np.where(y, read, 0.0), documents))
    first, second = replicates
    if not share:
        return jackknifed(float(second[0]), second[1:], "documents", scale="logit"), AUC_HALF_APART
    left = (second - 0.5) / (first - 0.5)
    truth = (AUC_HALF_APART - 0.5) / (AUC_APART - 0.5)
    return jackknifed(float(left[0]), left[1:], "documents"), truth


def _rank_correlation(num_seeds: int, rho: float, *, shared: bool) -> Draw:
    """Latents of one seed, or of several that found the same features, or others."""

    def draw(generator: np.random.Generator) -> Drawn:
        pearson = 2 * np.sin(np.pi * rho / 6)  # of normal numbers with that rank correlation
        seen = generator.normal(0, 1, (1 if shared else num_seeds, 2, ALL_LATENTS))
        samples = []
        for x, rest in np.broadcast_to(seen, (num_seeds, 2, ALL_LATENTS)):
            own = generator.normal(0, 1, ALL_LATENTS)
            y = pearson * x + np.sqrt(1 - pearson**2) * (SHARED * rest + OWN * own)
            samples.append(RankSample(x, y, np.empty((ALL_LATENTS, 0)), x))
        return rank_correlation(samples), rho

    return draw


def _windows(generator: np.random.Generator) -> Drawn:
    """A text whose windows resemble their neighbours."""
    values = generator.normal(0, 0.1, TEXT + 1)
    return interval_over_windows(MEAN + values[1:] + values[:-1] / 3), MEAN


def _latents_on_documents(
    num_seeds: int, *, shared: float = 0.0, own: float = 0.0, documents: float = 0.0
) -> Draw:
    """A ratio of means over latents, which differ for all seeds alike (`shared`) or in each for
    itself (`own`), on documents that differ, too."""

    def draw(generator: np.random.Generator) -> Drawn:
        features = generator.normal(0, 1, LATENTS)
        text = generator.normal(0, documents, GROUPS)
        samples = []
        for _ in range(num_seeds):
            latents = shared * features + own * generator.normal(0, 1, LATENTS)
            noise = generator.normal(0, CELL, (2, LATENTS, GROUPS))
            above = MEAN + latents[:, None] + text + noise[0]
            below = 1 + latents[:, None] / 3 + noise[1] / 2
            samples.append(_sample(above, below))
        return crossed(samples), MEAN

    return draw


def _ablations(
    num_latents: int, ratio: float | None, *, shared: bool, spread: float = KL_SPREAD
) -> Draw:
    """Lognormal effects of latents that three seeds share, or not; less those of a second group,
    which are `ratio` times as large."""

    def draw(generator: np.random.Generator) -> Drawn:
        text = BY_DOCUMENT * generator.normal(size=GROUPS)
        features = generator.normal(size=(2, num_latents, 1))
        samples = []
        for _ in range(3):
            own = spread * (features if shared else generator.normal(size=features.shape))
            own = own + BY_SEED * generator.normal(size=features.shape)
            cells = BY_LATENT_AND_DOCUMENT * generator.normal(size=(2, num_latents, GROUPS))
            kl = np.exp(own + text + cells)
            first, second = (
                _sample(part, np.ones_like(part)) for part in (kl[0], (ratio or 0) * kl[1])
            )
            samples.append(difference(first, second) if ratio is not None else first)
        spreads = (spread, BY_SEED, BY_DOCUMENT, BY_LATENT_AND_DOCUMENT)
        mean = np.exp(np.square(spreads).sum() / 2)
        found = crossed(samples, heavy_tails=True, fewest=FEWEST_LATENTS)
        return found, float(mean * (1 - (ratio or 0)))

    return draw


def _fvu_ratio(generator: np.random.Generator) -> Drawn:
    """Documents differ in how much there is to explain, and in what either model leaves."""
    variance = np.exp(generator.normal(0, LOSSES, GROUPS))
    left = np.exp(generator.normal(-0.02, 0.2, (2, GROUPS)))
    found = ratio_estimate(MEAN * variance * left[0], variance, variance / 2 * left[1], variance)
    return found, 2 * MEAN


def _ce_drop(generator: np.random.Generator) -> Drawn:
    """Documents differ in their loss, and in what the ablation and either SAE add to it."""
    loss = np.exp(generator.normal(0, LOSSES, GROUPS))
    harm = loss * np.exp(generator.normal(-0.02, 0.2, GROUPS))
    added = harm * np.exp(generator.normal(-0.02, 0.2, (2, GROUPS)))
    recoveries = [
        Recovery(loss, loss + harm, loss + share * part)
        for share, part in zip((0.1, 0.05), added, strict=True)
    ]
    return drop_estimate(*recoveries), 0.05


def _sample(
    above: Float[np.ndarray, "latents groups"], below: Float[np.ndarray, "latents groups"]
) -> LatentSample:
    parts = []
    for cells in (above, below):
        parts += [cells.mean(1), (cells.sum(1, keepdims=True) - cells) / (GROUPS - 1)]
    return ratio_of_means(*parts)


SYNTHETIC: dict[str, Draw] = {
    "seeds: 3, of 3 conditions": _over_seeds(3, 3),
    "seeds: 5, of 1 condition": _over_seeds(5, 1),
    "pairs of 3 seeds": _over_pairs(3),
    "pairs of 5 seeds": _over_pairs(5),
    "4 conditions": _over_conditions,
    "AUC over 4 conditions": functools.partial(_auc, within=False),
    "AUC within 4 conditions": functools.partial(_auc, within=True),
    "AUC within 4 conditions, less another": functools.partial(_auc, within=True, less=True),
    "AUC over documents": functools.partial(_auc_over_documents, share=False),
    "share of an AUC above chance": functools.partial(_auc_over_documents, share=True),
    "rank correlation 0, 1 seed": _rank_correlation(1, 0.0, shared=True),
    "rank correlation 0.5, 1 seed": _rank_correlation(1, 0.5, shared=True),
    "rank correlation 0.5, 3 seeds of the same features": _rank_correlation(3, 0.5, shared=True),
    "rank correlation 0.5, 3 seeds of other features": _rank_correlation(3, 0.5, shared=False),
    "windows of a text": _windows,
    "latents alike, 1 seed": _latents_on_documents(1),
    "latents differ, 1 seed": _latents_on_documents(1, shared=0.2, documents=0.05),
    "latents alike, 3 seeds": _latents_on_documents(3, documents=0.05),
    "latents of the same features, 3 seeds": _latents_on_documents(3, shared=0.2),
    "latents of the same features, 5 seeds": _latents_on_documents(5, shared=0.1),
    "ablations, 10 latents of 3 seeds": _ablations(10, None, shared=False),
    "ablations, 30 latents of the same features": _ablations(30, None, shared=True),
    "ablations, 10 latents less as many": _ablations(10, 1.0, shared=False),
    "ablations, 10 latents less as many of a fifth": _ablations(10, 0.2, shared=False),
    "ablations, 30 latents less as many of a fifth, same features": _ablations(
        30, 0.2, shared=True
    ),
    "FVU over the dense one": _fvu_ratio,
    "drop of cross-entropy recovered": _ce_drop,
    "latents of other features, 3 seeds": _latents_on_documents(3, own=0.2),
    "latents partly the same, 3 seeds": _latents_on_documents(
        3, shared=0.15, own=0.15, documents=0.05
    ),
}
"""Name -> one draw of it."""
