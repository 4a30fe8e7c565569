"""Same-dictionary persistence: does the dense SAE still fire on the same tokens after pruning?

No second SAE is trained, so there is no initialisation to share. Beside the pruned activations
stand noise controls, because any disturbance lowers these numbers, and the null: a further draw of
that noise in the place of the pruned activations, of which nothing may be found (methods §10).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.analyses.noise import (
    CommonChange,
    NullRows,
    Rows,
    isotropic_noise_like,
    other_token,
    remainders,
)
from prunelens.analyses.statistics import LatentSample, crossed, fisher_z, ratio_of_means
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents
from prunelens.sae.sparse import SparseEncoder

NOISE_DRAWS = 3
DRAWS = {
    "pruned": 1,
    "undone": 1,
    "null": 1,
    "noise_isotropic": NOISE_DRAWS,
    "noise_shuffled": NOISE_DRAWS,
    "difference_shuffled": 1,
}
SOURCES = tuple(DRAWS)
JUDGED = ("pruned", "null")  # what is held against the noise controls
NOISES = ("isotropic", "shuffled")
FEWEST_FIRINGS = 10  # dense firings below which a correlation says nothing
SMALLEST_LEFT = (
    0.3  # correlation under noise; what is less is no more than its own error after ten firings
)
BATCH_TOKENS = 2048


@torch.no_grad()
def persistence(
    sae: SparseEncoder,
    dense: Rows,
    pruned: Rows,
    tokens: Int[Tensor, " tokens"],
    *,
    change: CommonChange,
    groups: Int[Tensor, " tokens"],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Per latent: how its activations on dense and on disturbed activations agree.

    With x and y a token's dense and pruned activations, y = m + A x + r, what is disturbed is
        pruned               y
        undone               what x would have given y without a remainder: A^-1 (y - m)
        null                 m + A x + r of another token, in the place of y: the same draw for
                             every SAE, as y is the same
        noise_isotropic      m + A x + a random vector of r's norm
        noise_shuffled       m + A x + r of another token
        difference_shuffled  x + (y - x) of another token: the control before the common change was
                             told apart, to read old results by

    Args:
        sae: trained on dense activations.
        dense, pruned: paired rows, both normalised with the dense mean and deviation; for an SAE
            that reads raw activations, raw. The isotropic noise is isotropic in their space.
        tokens: the rows to look at.
        change: m and A, fitted on other rows in the same space.
        groups: of every token the group of documents, which are 0 to G - 1.
        seed: of the noise, beside that of the change.
    Returns: one row per source and latent: source, latent, dense_firings, firings, correlation
        (Pearson, over all tokens), fisher_z (of each draw's correlation), jaccard (of the tokens
        fired on), silenced; draws (the correlation of each draw) and without (the correlation
        without each group of documents), which are arrays. A latent that fires on dense and never
        on the disturbed activations has correlation 0 and is silenced; one with fewer than 10 dense
        firings, or whose series never varies, has NaN; so has `undone` where A leaves too little to
        undo. Noise rows average three draws.
    Source: methods §7, same-dictionary persistence; §10.
    """
    first = int(change.seed) + 1000 * seed
    generators = [torch.Generator().manual_seed(first + draw) for draw in range(NOISE_DRAWS)]
    disturbed = _Disturbed(dense, pruned, tokens, change, generators)
    num_groups = int(groups.max()) + 1
    before = _Before(sae.num_latents, num_groups)
    sums = {source: [_Sums(before) for _ in range(n)] for source, n in DRAWS.items()}
    encode = functools.partial(sae.encode_sparse, buffers=Buffers())
    done = 0
    for group in range(num_groups):
        for places in (groups == group).nonzero().squeeze(1).split(BATCH_TOKENS):
            x = dense.rows(tokens[places])
            before.start_batch(encode(x), group)
            for source, draw, rows in disturbed.of(places, x):
                sums[source][draw].add(encode(rows), group)
            done += len(places)
            if progress:
                progress(done)
    return pd.concat([_table(source, sums[source]) for source in SOURCES], ignore_index=True)


def persistence_summary(latents: pd.DataFrame) -> pd.DataFrame:
    """One row per source from the per-latent table (columns of tables/persistence.csv)."""
    by_source = {str(name): part for name, part in latents.groupby("source")}
    rows = []
    for source in SOURCES:
        part = by_source[source]
        known = part["correlation"].notna()
        row = {
            "source": source,
            "mean_correlation": part["correlation"].mean(),
            "mean_jaccard": part["jaccard"].mean(),
            "share_above_0.7": (part.loc[known, "correlation"] > 0.7).mean(),
            "num_silenced": int(part["silenced"].sum()),
            "num_undefined": int((~known).sum()),
        }
        if source in JUDGED:
            noise = by_source["noise_shuffled"]
            row["excess_z"] = (part["fisher_z"].array - noise["fisher_z"]).mean()
        for noise_name in NOISES if source in JUDGED else ():
            noise = by_source[f"noise_{noise_name}"]
            found = crossed([ratio_to(part, noise)])
            name = f"relative_{noise_name}"
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def ratio_to(part: pd.DataFrame, noise: pd.DataFrame) -> LatentSample:
    """Mean correlation over latents as a share of that under noise, of per-latent tables."""
    columns = [(table["correlation"], np.stack(table["without"])) for table in (part, noise)]
    return ratio_of_means(*(np.asarray(each, dtype=float) for pair in columns for each in pair))


def relative_to_noise(pruned: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Persistence as a multiple of what noise of equal size leaves, latent by latent.

    Noise lowers the correlation of a rare latent more than that of a frequent one, whatever became
    of its feature. Dividing by it is the classical correction for attenuation (Spearman 1904). Not
    clipped: cutting at 1 would cut the error above and keep the error below, of which rare latents
    have more. NaN where either is, or where noise leaves less than SMALLEST_LEFT. Of a group of
    latents the ratio of the means is taken, which leaves none out and is not biased by the division
    (methods §10).
    """
    return pruned / np.where(noise >= SMALLEST_LEFT, noise, np.nan)


def relative_error(pruned: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Standard error of `relative_to_noise`, from its values without each group of documents.

    Args: pruned, noise: [latents, groups], the `without` of both.
    """
    groups = pruned.shape[1]
    relative = relative_to_noise(pruned, noise)
    off = relative - relative.mean(1, keepdims=True)
    error = np.sqrt((groups - 1) / groups * np.square(off).sum(1))
    return np.where(error > 0, error, np.nan)  # one group, or values that do not vary


class _Disturbed:
    """The disturbed activations of a batch, source by source."""

    def __init__(
        self,
        dense: Rows,
        pruned: Rows,
        tokens: Int[Tensor, " tokens"],
        change: CommonChange,
        generators: list[torch.Generator],
    ) -> None:
        self._both, self._tokens, self._change = (dense, pruned), tokens, change
        self._generators, self._can_undo = generators, change.can_be_undone
        self._partners = [tokens[other_token(len(tokens), generator)] for generator in generators]
        self._null = NullRows(dense, pruned, change, tokens)

    def of(
        self, places: Int[Tensor, " batch"], x: Float[Tensor, "batch d_model"]
    ) -> Iterator[tuple[str, int, Float[Tensor, "batch d_model"]]]:
        """Source, draw and rows; `x`: the dense rows of these places among the tokens."""
        y, common = self._both[1].rows(self._tokens[places]), self._change.of(x)
        remainder = y - common
        yield "pruned", 0, y
        if self._can_undo:
            yield "undone", 0, self._change.undone(y)
        yield "null", 0, self._null.rows(self._tokens[places])
        for draw, (generator, partners) in enumerate(
            zip(self._generators, self._partners, strict=True)
        ):
            isotropic = isotropic_noise_like(remainder, generator)
            yield "noise_isotropic", draw, isotropic.add_(common)
            other = remainders(*self._both, self._change, partners[places])
            yield "noise_shuffled", draw, other.add_(common)
        difference = self._both[1].rows(self._partners[0][places])
        difference -= self._both[0].rows(self._partners[0][places])
        yield "difference_shuffled", 0, difference.add_(x)


class _Before:
    """The dense SAE on dense tokens: one batch written out in full, and sums over all batches.

    Only entries that fire are touched; sums in float64, by group of documents.
    """

    def __init__(self, num_latents: int, num_groups: int) -> None:
        self.num_tokens = np.zeros(num_groups)
        self.sums = _zero_sums((num_groups, num_latents), ("a", "aa", "fired_a"))
        self._wide: Tensor | None = None
        self._batch: SparseLatents | None = None

    def start_batch(self, latents: SparseLatents, group: int) -> None:
        """Add one batch of a group, and hold it in place of the last."""
        self.num_tokens[group] += len(latents.values)
        _add_by_latent(
            self.sums,
            group,
            latents.indices,
            {"a": latents.values, "aa": latents.values.double().square()},
            {"fired_a": latents.values > 0},
        )
        if self._wide is None or len(self._wide) < len(latents.values):
            self._wide = latents.values.new_zeros(
                max(BATCH_TOKENS, len(latents.values)), self.sums["a"].shape[1]
            )
        elif self._batch is not None:  # what was set is cleared: far less than all of it
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
        names = ("b", "bb", "ab", "fired_b", "fired_both")
        self._after = _zero_sums(before.sums["a"].shape, names)
        self._added = False

    def add(self, after: SparseLatents, group: int) -> None:
        """Add the disturbed tokens of the batch that `before` has just started."""
        self._added = True
        b, a = after.values.double(), self._before.at(after.indices)
        _add_by_latent(
            self._after,
            group,
            after.indices,
            {"b": b, "bb": b.square(), "ab": a * b},
            {"fired_b": b > 0, "fired_both": (a > 0) & (b > 0)},
        )

    def correlation(self) -> Float[np.ndarray, " latents"]:
        """Pearson over all tokens; 0 where silenced, NaN with too few dense firings."""
        sums = {name: part.sum(0) for name, part in (self._before.sums | self._after).items()}
        return self._defined(_pearson(self._before.num_tokens.sum(), sums))

    def without(self) -> Float[np.ndarray, "latents groups"]:
        """The same without each group of documents; NaN where the latent fires in no other."""
        sums = self._before.sums | self._after
        left = {name: part.sum(0) - part for name, part in sums.items()}
        tokens = self._before.num_tokens.sum() - self._before.num_tokens
        return self._defined(_pearson(tokens[:, None], left)).T

    def jaccard(self) -> Float[np.ndarray, " latents"]:
        """Tokens on which both fire, over tokens on which either does; NaN with too few firings."""
        both = self.fired("both")
        either = np.maximum(self.fired("a") + self.fired("b") - both, 1)
        return self._defined(both / either)

    def silenced(self) -> Bool[np.ndarray, " latents"]:
        """Fires often enough on dense activations and never on the disturbed ones."""
        enough = self.fired("a") >= FEWEST_FIRINGS
        return enough & (self.fired("b") == 0) & self._added

    def fired(self, series: str) -> Float[np.ndarray, " latents"]:
        """Number of tokens fired on: series a, b or both."""
        return (self._before.sums | self._after)[f"fired_{series}"].sum(0)

    def _defined(self, values: np.ndarray) -> np.ndarray:
        defined = (self.fired("a") >= FEWEST_FIRINGS) & self._added
        return np.where(defined, values, np.nan)


def _pearson(num_tokens: np.ndarray | float, sums: dict[str, np.ndarray]) -> np.ndarray:
    """Of the series a and b; 0 where b never fires, NaN where a never does or does not vary."""
    a, b = sums["a"], sums["b"]
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (sums["aa"] - a**2 / num_tokens) * (sums["bb"] - b**2 / num_tokens)
        correlation = (sums["ab"] - a * b / num_tokens) / np.sqrt(spread)
    correlation = np.where((sums["fired_b"] == 0) & (sums["fired_a"] > 0), 0.0, correlation)
    return np.where(np.isfinite(correlation), correlation, np.nan)


def _zero_sums(shape: tuple[int, int], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape) for name in names}


def _add_by_latent(
    sums: dict[str, np.ndarray],
    group: int,
    indices: Int[Tensor, "tokens k"],
    weights: dict[str, Float[Tensor, "tokens k"]],
    where: dict[str, Bool[Tensor, "tokens k"]],
) -> None:
    """Add to a group's sums, per latent: the sum of each of the weights, and how often each is
    true."""
    at, num_latents = indices.flatten().cpu().numpy(), next(iter(sums.values())).shape[1]
    for name, weight in weights.items():
        sums[name][group] += np.bincount(at, weight.flatten().cpu().numpy(), num_latents)
    for name, true in where.items():
        fires = at[true.flatten().cpu().numpy()]
        sums[name][group] += np.bincount(fires, minlength=num_latents)


def _table(source: str, sums: list[_Sums]) -> pd.DataFrame:
    """Average the draws of one source; silenced means silenced in every draw."""
    draws = np.stack([part.correlation() for part in sums], axis=1)
    without = np.mean([part.without() for part in sums], axis=0)
    return pd.DataFrame(
        {
            "source": source,
            "latent": np.arange(len(draws)),
            "dense_firings": sums[0].fired("a").astype(np.int64),
            "firings": np.mean([part.fired("b") for part in sums], axis=0),
            "correlation": draws.mean(1),
            "fisher_z": fisher_z(draws).mean(1),
            "jaccard": np.mean([part.jaccard() for part in sums], axis=0),
            "silenced": np.all([part.silenced() for part in sums], axis=0),
            "draws": list(draws),
            "without": list(without),
        }
    )
