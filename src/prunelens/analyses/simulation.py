"""Small studies of planted activations, one after the other, through the code that real ones use.

What an interval is worth shows over many data sets of which the truth is known. Training SAEs for
each would take hours, so each has the planted directions themselves for dictionaries: a seed has
most of them, slightly off. Everything else is drawn anew: directions, rates, fates, documents,
noise. From persistence to claims nothing is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens import planted
from prunelens.analyses.fates import latent_fates
from prunelens.analyses.noise import CommonChange, fit_common_change
from prunelens.analyses.persistence import persistence
from prunelens.sae import kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents

WIDTH = 32
NUM_DIRECTIONS = 125
RATES = (0.008, 0.15)  # a rare latent has some 25 firings to be measured by
NUM_LATENTS = 100  # of a seed: four in five of the directions
OFF_BY = 0.1  # length of what is added to them, which have length 1
THRESHOLD = -0.5  # encoder bias: half of the mean activation
K = 6
HALVES = (6, 12)  # documents that latents are sorted by, and that they are measured on
SEEDS = (0, 1)
CONDITIONS = ("wanda", "magnitude")  # prunings of one world, whose fates have nothing in common
TOGETHER = 10  # sets in one pass over tokens, side by side: most of a small pass is overhead


def simulated_fates(
    choice: planted.Choice, numbers: Sequence[int], *, documents: tuple[int, int] = HALVES
) -> Iterator[dict[str, pd.DataFrame]]:
    """Condition -> what became of the latents of both seeds (see `analyses.fates`), set by set.

    Args:
        choice: what fates depend on.
        numbers: of the sets; equal ones give equal sets.
        documents: of the first and of the second half.
    """
    for first in range(0, len(numbers), TOGETHER):
        some = numbers[first : first + TOGETHER]
        drawn = [_drawn(choice, number, documents) for number in some]
        yield from _measured(drawn, some, documents[0])


class _Set(NamedTuple):
    """One study's activations, normalised with the statistics of the dense ones."""

    dense: Float[Tensor, "tokens width"]
    pruned: list[Float[Tensor, "tokens width"]]
    """By condition."""
    saes: list[_Dictionary]
    """By seed."""


class _Dictionary(NamedTuple):
    """An SAE that nobody trained."""

    encoder: Float[Tensor, "latents width"]
    init_retention: Float[Tensor, " latents"]
    """Anything: it has no start."""


def _drawn(choice: planted.Choice, number: int, documents: tuple[int, int]) -> _Set:
    """Equal numbers give equal sets."""
    sizes = {"num_directions": NUM_DIRECTIONS, "d_model": WIDTH}
    world = planted.dense_world(seed=number, firing_rates=RATES, **sizes)
    tokens, first = (planted.DOCUMENT_TOKENS * n for n in (sum(documents), documents[0]))
    raw = planted.world_activations(world, tokens, tokens_seed=number, noise_seed=0)
    mean, sigma = raw[:first].mean(0), raw[:first].std(0)
    dense, pruned = (raw - mean) / sigma, []
    for seed in range(len(CONDITIONS) * number, len(CONDITIONS) * (number + 1)):
        changed, _ = planted.pruned_world(world, choice, seed=seed, by_lot=True)
        raw = planted.world_activations(changed, tokens, tokens_seed=number, noise_seed=1 + seed)
        pruned.append((raw - mean) / sigma)
    covariance = torch.cov(dense[:first].T)
    generator = torch.Generator().manual_seed(number)
    saes = [_dictionary(world, sigma, covariance, generator) for _ in SEEDS]
    return _Set(dense, pruned, saes)


def _dictionary(
    world: planted.World,
    sigma: Float[Tensor, " width"],
    covariance: Float[Tensor, "width width"],
    generator: torch.Generator,
) -> _Dictionary:
    """Most of the planted directions, each read as well as a linear map can read it."""
    kept = torch.randperm(NUM_DIRECTIONS, generator=generator)[:NUM_LATENTS]
    directions = world.directions[kept, 0] / sigma
    lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    away = torch.nn.functional.normalize(torch.randn(directions.shape, generator=generator), dim=1)
    rows = directions + OFF_BY * lengths * away
    readers = torch.linalg.solve(covariance, rows.T).T
    readers /= (readers * rows).sum(1, keepdim=True)  # an activation of 1 is read as 1
    return _Dictionary(readers, torch.rand(NUM_LATENTS, generator=generator))


class _SideBySide:
    """The dictionaries of many sets, as one that reads their activations next to each other."""

    def __init__(self, sets: Sequence[_Set]) -> None:
        self._encoders = torch.stack([torch.stack([s.encoder for s in each.saes]) for each in sets])
        self.num_latents = self._encoders[..., 0].numel()

    def encode_sparse(
        self, x: Float[Tensor, "tokens widths"], *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """Of every dictionary the k latents that it keeps, as `TopKSAE` does."""
        sets, seeds, latents, width = self._encoders.shape
        pre = torch.einsum("tnw,nslw->tnsl", x.view(-1, sets, width), self._encoders) + THRESHOLD
        found = kernels.top_k(pre.reshape(-1, latents), K)
        first = torch.arange(sets * seeds)[:, None] * latents
        indices = found.indices.view(len(x), sets * seeds, K) + first
        return SparseLatents(found.values.view(len(x), -1), indices.view(len(x), -1))


class _Rows(NamedTuple):
    """Activations of several sets, side by side."""

    whole: Float[Tensor, "tokens widths"]

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch widths"]:
        """Rows in the order of `index`."""
        return self.whole[index]


def _measured(
    sets: Sequence[_Set], numbers: Sequence[int], first_documents: int
) -> Iterator[dict[str, pd.DataFrame]]:
    """What became of the latents of every set."""
    sae, dense = _SideBySide(sets), _Rows(torch.cat([each.dense for each in sets], 1))
    documents = planted.document_of(len(dense.whole)) - first_documents
    first, second = (which.nonzero().squeeze(1) for which in (documents < 0, documents >= 0))
    fired = torch.zeros(sae.num_latents)
    for batch in first.split(2048):
        found = sae.encode_sparse(dense.rows(batch))
        fired += torch.bincount(found.indices[found.values > 0], minlength=sae.num_latents)
    by_condition = {}
    for place, name in enumerate(CONDITIONS):
        parts = [(_Rows(each.dense), _Rows(each.pruned[place])) for each in sets]
        changes = [fit_common_change(*pair, first) for pair in parts]
        change = CommonChange(
            torch.cat([each.shift for each in changes]),
            torch.cat([each.matrix for each in changes]),
            torch.tensor(len(CONDITIONS) * numbers[0] + place),
        )
        table = persistence(
            sae,
            dense,
            _Rows(torch.cat([pair[1].whole for pair in parts], 1)),
            second,
            change=change,
            groups=documents[second],
            seed=numbers[0],
        )
        by_condition[name] = _by_set(table, len(sets))
    firing_rate = (fired / len(first)).view(len(sets), len(SEEDS), -1).numpy()
    for number, each in enumerate(sets):
        yield {
            name: _fates(tables[number], firing_rate[number], each)
            for name, tables in by_condition.items()
        }


def _by_set(table: pd.DataFrame, num_sets: int) -> list[pd.DataFrame]:
    """Per set the per-latent table of `persistence`, with a column seed."""
    which, latent = np.divmod(table["latent"].to_numpy(), NUM_LATENTS)
    number, seed = np.divmod(which, len(SEEDS))
    table = table.assign(seed=seed, latent=latent)
    return [table[number == each] for each in range(num_sets)]


def _fates(
    persisted: pd.DataFrame, firing_rate: Float[np.ndarray, "seeds latents"], drawn: _Set
) -> pd.DataFrame:
    """As `analyses.fates` makes them; there are no arms, for nothing was trained."""
    latents = {}
    for seed in SEEDS:
        own = {"latent": np.arange(NUM_LATENTS), "firing_rate": firing_rate[seed]}
        own |= {"firing_rate_first_half": firing_rate[seed], "mean_activation": np.nan}
        own |= {"init_retention": drawn.saes[seed].init_retention.numpy(), "resampled": 0}
        latents[seed] = pd.DataFrame(own)
    no_arms = pd.DataFrame(columns=["arm", "init_a", "init_b"])
    return latent_fates(latents, no_arms, SEEDS, persistence=persisted)
