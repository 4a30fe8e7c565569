"""Same-dictionary persistence: does the dense SAE still fire on the same tokens after pruning?

No second SAE is trained, so there is no initialisation to share. Beside the pruned activations
stand two noise controls of the same size, because any disturbance lowers these numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.analyses.noise import isotropic_noise_like, other_token
from prunelens.analyses.statistics import fisher_z
from prunelens.sae.buffers import Buffers
from prunelens.sae.sparse import SparseEncoder
from prunelens.sae.topk import SparseLatents

SOURCES = ("pruned", "noise_isotropic", "noise_shuffled")
NOISE_DRAWS = 3
FEWEST_FIRINGS = 10  # dense firings below which a correlation says nothing
SMALLEST_LEFT = 0.1  # correlation under noise below which nothing can be said relative to it
BATCH_TOKENS = 2048


@runtime_checkable
class Rows(Protocol):
    """Normalised activations by row number, as `Activations` gives them."""

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Rows in the order of `index`."""
        ...


@torch.no_grad()
def persistence(
    sae: SparseEncoder,
    dense: Rows,
    pruned: Rows,
    tokens: Int[Tensor, " tokens"],
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Per latent: how its activations on dense and on disturbed activations agree.

    Args:
        sae: trained on dense activations.
        dense, pruned: paired rows, both normalised with the dense mean and deviation; for an SAE
            that reads raw activations, raw. The isotropic noise is isotropic in their space.
        tokens: the rows to look at.
        seed: of the noise.
    Returns: one row per source and latent: source, latent, dense_firings, firings, correlation
        (Pearson, over all tokens), fisher_z (of each draw's correlation), jaccard (of the tokens
        fired on), silenced. A latent that fires on dense and never on the disturbed activations
        has correlation 0 and is silenced; one with fewer than 10 dense firings, or whose series
        never varies, has NaN. Noise rows average three draws.
    Source: methods §7, same-dictionary persistence.
    """
    noise = [torch.Generator().manual_seed(1000 * seed + draw) for draw in range(NOISE_DRAWS)]
    partners = [tokens[other_token(len(tokens), generator)] for generator in noise]
    draws = {"pruned": 1, "noise_isotropic": NOISE_DRAWS, "noise_shuffled": NOISE_DRAWS}
    before = _Before(sae.num_latents)
    sums = {source: [_Sums(before) for _ in range(n)] for source, n in draws.items()}
    encode = functools.partial(sae.encode_sparse, buffers=Buffers())
    for start in range(0, len(tokens), BATCH_TOKENS):
        batch = slice(start, start + BATCH_TOKENS)
        x = dense.rows(tokens[batch])
        difference = pruned.rows(tokens[batch]) - x
        before.start_batch(encode(x))
        sums["pruned"][0].add(encode(x + difference))
        for draw in range(NOISE_DRAWS):
            isotropic = isotropic_noise_like(difference, noise[draw])
            sums["noise_isotropic"][draw].add(encode(isotropic.add_(x)))
            other = partners[draw][batch]
            shuffled = pruned.rows(other) - dense.rows(other)
            sums["noise_shuffled"][draw].add(encode(shuffled.add_(x)))
        if progress:
            progress(start + len(x))
    return pd.concat([_table(source, sums[source]) for source in SOURCES], ignore_index=True)


def persistence_summary(latents: pd.DataFrame) -> pd.DataFrame:
    """One row per source from the per-latent table (columns of tables/persistence.csv).

    `excess_z` of a noise row is the mean over latents of Fisher z (pruned) - z (that noise): below
    0 is harm particular to pruning; `mean_relative` that of `relative_to_noise`: below 1 is. Both
    are NaN for the pruned row, which has nothing to be held against.
    """
    by_source = {source: latents[latents["source"] == source] for source in SOURCES}
    pruned = by_source["pruned"].set_index("latent")
    rows = []
    for source, part in by_source.items():
        known = part["correlation"].notna()
        excess = relative = np.nan
        if source != "pruned":
            noise = part.set_index("latent")
            excess = (pruned["fisher_z"] - noise["fisher_z"]).mean()
            relative = relative_to_noise(pruned["correlation"], noise["correlation"]).mean()
        rows.append(
            {
                "source": source,
                "mean_correlation": part["correlation"].mean(),
                "mean_jaccard": part["jaccard"].mean(),
                "share_above_0.7": (part.loc[known, "correlation"] > 0.7).mean(),
                "num_silenced": int(part["silenced"].sum()),
                "num_undefined": int((~known).sum()),
                "excess_z": excess,
                "mean_relative": relative,
            }
        )
    return pd.DataFrame(rows)


def relative_to_noise(pruned: pd.Series, noise: pd.Series) -> pd.Series:
    """Persistence as a share of what noise of equal size leaves, between 0 and 1.

    Noise lowers the correlation of a rare latent more than that of a frequent one, whatever became
    of its feature. Dividing by it is the classical correction for attenuation (Spearman 1904); a
    difference, on whatever scale, leaves lost latents (whose correlation is 0 at any rate) further
    below noise the more often they fire. Clipped at 1: who fares better than under noise has lost
    nothing. NaN where either is, or where noise leaves less than SMALLEST_LEFT.
    """
    left = noise.where(noise >= SMALLEST_LEFT)
    return (pruned / left).clip(0, 1)


class _Before:
    """The dense SAE on dense tokens: one batch written out in full, and sums over all batches.

    Only entries that fire are touched; sums in float64, so that many tokens lose nothing.
    """

    def __init__(self, num_latents: int) -> None:
        self.num_latents = num_latents
        self.num_tokens = 0
        self.sums = _zero_sums(num_latents, ("a", "aa", "fired_a"))
        self._wide: Tensor | None = None
        self._batch: SparseLatents | None = None

    def start_batch(self, latents: SparseLatents) -> None:
        """Add one batch, and hold it in place of the last."""
        self.num_tokens += len(latents.values)
        _add_by_latent(
            self.sums,
            latents.indices,
            {"a": latents.values, "aa": latents.values.double().square()},
            {"fired_a": latents.values > 0},
        )
        if self._wide is None:
            self._wide = latents.values.new_zeros(len(latents.values), self.num_latents)
        if self._batch is not None:  # what was set is cleared: far less than all of it
            self._wide[: len(self._batch.indices)].scatter_(1, self._batch.indices, 0.0)
        self._wide[: len(latents.indices)].scatter_(1, latents.indices, latents.values)
        self._batch = latents

    def at(self, indices: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """Activations of these latents on the tokens of this batch, 0 where they do not fire."""
        assert self._wide is not None, "a batch was started"
        return self._wide[: len(indices)].gather(1, indices)


class _Sums:
    """Sums over tokens from which correlation and overlap of two sparse series follow.

    Series a is the dense SAE on dense tokens (`before`), b on disturbed ones.
    """

    def __init__(self, before: _Before) -> None:
        self._before = before
        self._after = _zero_sums(before.num_latents, ("b", "bb", "ab", "fired_b", "fired_both"))

    def add(self, after: SparseLatents) -> None:
        """Add the disturbed tokens of the batch that `before` has just started."""
        b, a = after.values.double(), self._before.at(after.indices)
        _add_by_latent(
            self._after,
            after.indices,
            {"b": b, "bb": b.square(), "ab": a * b},
            {"fired_b": b > 0, "fired_both": (a > 0) & (b > 0)},
        )

    def correlation(self) -> np.ndarray:
        """Pearson over all tokens; 0 where silenced, NaN with too few dense firings."""
        n, s = self._before.num_tokens, self._before.sums | self._after
        covariance = s["ab"] - s["a"] * s["b"] / n
        spread = (s["aa"] - s["a"] ** 2 / n) * (s["bb"] - s["b"] ** 2 / n)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = covariance / np.sqrt(spread)
        correlation[self.silenced()] = 0.0
        return np.where(self.fired("a") < FEWEST_FIRINGS, np.nan, correlation)

    def jaccard(self) -> np.ndarray:
        """Tokens on which both fire, over tokens on which either does; NaN with too few firings."""
        both = self.fired("both")
        either = np.maximum(self.fired("a") + self.fired("b") - both, 1)
        return np.where(self.fired("a") < FEWEST_FIRINGS, np.nan, both / either)

    def silenced(self) -> np.ndarray:
        """Fires often enough on dense activations and never on the disturbed ones."""
        return (self.fired("a") >= FEWEST_FIRINGS) & (self.fired("b") == 0)

    def fired(self, series: str) -> np.ndarray:
        """Number of tokens fired on: series a, b or both."""
        return (self._before.sums | self._after)[f"fired_{series}"]


def _zero_sums(num_latents: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(num_latents) for name in names}


def _add_by_latent(
    sums: dict[str, np.ndarray],
    indices: Int[Tensor, "tokens k"],
    weights: dict[str, Float[Tensor, "tokens k"]],
    where: dict[str, Bool[Tensor, "tokens k"]],
) -> None:
    """Add to `sums`, per latent: the sum of each of the weights, and how often each is true."""
    at = indices.flatten().cpu().numpy()
    for name, weight in weights.items():
        sums[name] += np.bincount(at, weight.flatten().cpu().numpy(), len(sums[name]))
    for name, true in where.items():
        sums[name] += np.bincount(at[true.flatten().cpu().numpy()], minlength=len(sums[name]))


def _table(source: str, sums: list[_Sums]) -> pd.DataFrame:
    """Average the draws of one source; silenced means silenced in every draw."""
    return pd.DataFrame(
        {
            "source": source,
            "latent": np.arange(len(sums[0].fired("a"))),
            "dense_firings": sums[0].fired("a").astype(np.int64),
            "firings": np.mean([part.fired("b") for part in sums], axis=0),
            "correlation": np.mean([part.correlation() for part in sums], axis=0),
            "fisher_z": np.mean([fisher_z(part.correlation()) for part in sums], axis=0),
            "jaccard": np.mean([part.jaccard() for part in sums], axis=0),
            "silenced": np.all([part.silenced() for part in sums], axis=0),
        }
    )
