"""Same-dictionary persistence: does the dense SAE still fire on the same tokens after pruning?

No second SAE is trained, so there is no initialisation to share. Beside the pruned activations
stand two noise controls of the same size, because any disturbance lowers these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.analyses.noise import isotropic_noise_like, other_token
from prunelens.analyses.statistics import fisher_z
from prunelens.sae.topk import SparseLatents, TopKSAE

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
    sae: TopKSAE,
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
        dense, pruned: paired rows, both normalised with the dense mean and deviation.
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
    sums = {source: [_Sums(sae.num_latents) for _ in range(n)] for source, n in draws.items()}
    for start in range(0, len(tokens), BATCH_TOKENS):
        batch = slice(start, start + BATCH_TOKENS)
        x = dense.rows(tokens[batch])
        difference = pruned.rows(tokens[batch]) - x
        before = _Fired(sae.encode(x), len(x))
        sums["pruned"][0].add(before, sae.encode(x + difference))
        for draw in range(NOISE_DRAWS):
            isotropic = isotropic_noise_like(difference, noise[draw])
            sums["noise_isotropic"][draw].add(before, sae.encode(x + isotropic))
            other = partners[draw][batch]
            shuffled = pruned.rows(other) - dense.rows(other)
            sums["noise_shuffled"][draw].add(before, sae.encode(x + shuffled))
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


class _Fired(NamedTuple):
    """Sparse latents of a batch of tokens."""

    latents: SparseLatents
    num_tokens: int


class _Sums:
    """Sums over tokens from which correlation and overlap of two sparse series follow.

    Only entries that fire are touched; float64, so that many tokens lose nothing.
    """

    def __init__(self, num_latents: int) -> None:
        self.num_tokens = 0
        self._sums = {
            name: torch.zeros(num_latents, dtype=torch.float64)
            for name in ("a", "aa", "b", "bb", "ab", "fired_a", "fired_b", "fired_both")
        }

    def add(self, before: _Fired, after: SparseLatents) -> None:
        """Add one batch: the dense SAE on dense (`before`) and on disturbed (`after`) tokens."""
        self.num_tokens += before.num_tokens
        a, b = before.latents, after
        wide = torch.zeros(before.num_tokens, len(self._sums["a"]), device=a.values.device)
        wide.scatter_(1, b.indices, b.values)
        b_where_a = wide.gather(1, a.indices)
        self._count("a", a.indices, a.values.double())
        self._count("aa", a.indices, a.values.double().square())
        self._count("b", b.indices, b.values.double())
        self._count("bb", b.indices, b.values.double().square())
        self._count("ab", a.indices, a.values.double() * b_where_a)
        self._count("fired_a", a.indices, (a.values > 0).double())
        self._count("fired_b", b.indices, (b.values > 0).double())
        self._count("fired_both", a.indices, ((a.values > 0) & (b_where_a > 0)).double())

    def correlation(self) -> np.ndarray:
        """Pearson over all tokens; 0 where silenced, NaN with too few dense firings."""
        n, s = self.num_tokens, {name: part.numpy() for name, part in self._sums.items()}
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
        return self._sums[f"fired_{series}"].numpy()

    def _count(self, name: str, indices: Tensor, weights: Tensor) -> None:
        length = len(self._sums[name])
        self._sums[name] += torch.bincount(indices.flatten(), weights.flatten(), length).cpu()


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
