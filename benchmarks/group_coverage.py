"""Simulate how often the interval of a group's mean KL, and of a contrast, covers the truth (RQ5).

usage: python benchmarks/group_coverage.py [--draws 1000] [--sizes 10,20,30,100] [--spread 1.5]

True KLs of latents are lognormal, and what is measured of one varies by document (alike for all
latents, and for each by itself) and by context. A latent's rate decides how many contexts it has,
at most 64; rare ones have none. Seeds either find the same features (`shared`: true KLs within
20 %) or draw their own. The contrast is to a second group, of equal mean or of a fifth of it.
`plain` is the same without regard to heavy tails: Student's t with latents - 1.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
from jaxtyping import Float

from prunelens.analyses.statistics import (
    Estimate,
    LatentSample,
    crossed,
    difference,
    ratio_of_means,
)

GROUPS, CONTEXTS, CONTEXTS_PER_DOCUMENT = 20, 64, 0.6
BY_DOCUMENT, BY_LATENT_AND_DOCUMENT, BY_CONTEXT, BY_SEED = 0.3, 0.5, 0.7, 0.2
SEEDS = ((1, "own"), (3, "shared"), (3, "own"))


def main() -> None:
    """Simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--sizes", default="10,20,30,100", help="latents per group")
    parser.add_argument("--spread", type=float, default=1.5, help="of the log of true KLs")
    chosen = parser.parse_args()
    print("| latents | documents | seeds | second group | mean | plain | contrast | plain |")
    print("|---|---|---|---|---|---|---|---|")
    for size in map(int, chosen.sizes.split(",")):
        for documents, (seeds, features), ratio in itertools.product((16, 64), SEEDS, (1.0, 0.2)):
            generator = np.random.default_rng(1)
            hits = [
                one_draw(generator, size, documents, seeds, features, ratio, chosen.spread)
                for _ in range(chosen.draws)
            ]
            shares = " | ".join(f"{100 * share:.1f}" for share in np.mean(hits, axis=0))
            print(
                f"| {size} | {documents} | {seeds} {features} | {ratio:g} | {shares} |", flush=True
            )


def one_draw(
    generator: np.random.Generator,
    size: int,
    documents: int,
    seeds: int,
    features: str,
    ratio: float,
    spread: float,
) -> list[bool]:
    """Does each interval cover: the group's mean, the same plain, the contrast, the same plain?"""
    measured = BY_DOCUMENT**2 + BY_LATENT_AND_DOCUMENT**2 + BY_CONTEXT**2
    mean = math.exp((spread**2 + measured) / 2)
    text = BY_DOCUMENT * generator.normal(size=documents)
    found = generator.normal(size=(2, size))  # of features that all seeds share
    groups: list[list[LatentSample]] = [[], []]
    for _ in range(seeds):
        own = spread * (found if features == "shared" else generator.normal(size=(2, size)))
        if features == "shared":
            own = own + BY_SEED * generator.normal(size=own.shape) - BY_SEED**2 / 2
        for samples, level, factor in zip(groups, own, (1.0, ratio), strict=True):
            samples.append(_measured(generator, factor * np.exp(level), text))
    contrasts = [difference(*both) for both in zip(*groups, strict=True)]
    hits = []
    for samples, truth in ((groups[0], mean), (contrasts, mean * (1 - ratio))):
        hits += [_covers(crossed(samples, heavy_tails=heavy), truth) for heavy in (True, False)]
    return hits


def _covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def _measured(
    generator: np.random.Generator,
    true: Float[np.ndarray, " latents"],
    text: Float[np.ndarray, " documents"],
) -> LatentSample:
    """A group's sample from contexts of its latents; what is left out are groups of documents."""
    rate = CONTEXTS_PER_DOCUMENT * np.exp(1.2 * generator.normal(size=len(true)))
    counts = generator.poisson(rate[:, None], (len(true), len(text)))
    for latent in np.flatnonzero(counts.sum(1) > CONTEXTS):
        counts[latent] = generator.multivariate_hypergeometric(counts[latent], CONTEXTS)
    place = BY_LATENT_AND_DOCUMENT * generator.normal(size=counts.shape) + text
    latents, documents = np.nonzero(counts)
    each = np.repeat(np.arange(len(latents)), counts[latents, documents])
    noise = BY_CONTEXT * generator.normal(size=len(each))
    kl = true[latents[each]] * np.exp(place[latents[each], documents[each]] + noise)
    groups = min(GROUPS, len(text))
    sums, group = np.zeros((len(true), groups)), documents * groups // len(text)
    np.add.at(sums, (latents[each], group[each]), kl)
    number = np.zeros_like(sums)
    np.add.at(number, (latents, group), counts[latents, documents])
    above, below = sums.sum(1), number.sum(1)
    with np.errstate(invalid="ignore"):
        means = above / below
        without = (above[:, None] - sums) / (below[:, None] - number)
    without[below[:, None] <= number] = np.nan
    return ratio_of_means(means, without, np.ones_like(means), np.ones_like(without))


if __name__ == "__main__":
    main()
