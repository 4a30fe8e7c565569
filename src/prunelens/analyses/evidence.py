"""Where latents fire: of each one its strongest contexts, and a sample over its activation range.

One pass over the tokens, in memory that does not grow with them. A context is a token on which a
latent fires and the latent's activations on the tokens around it; `read_contexts` reads the same
places under other activations, such as those of the pruned model.

Shapes: W tokens of a context (either_side before, the one that fires, either_side after).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from prunelens.analyses.kept_firings import KeptContexts, Sample, Strongest
from prunelens.analyses.noise import Rows
from prunelens.analyses.window_batches import TokenPlaces, WindowBatch, window_batches
from prunelens.sae.sparse import SparseEncoder

__all__ = ["Evidence", "SparseEncoder", "TokenPlaces", "collect_contexts", "read_contexts"]


class Evidence(NamedTuple):
    """Where the latents of one SAE fire, on one set of activations."""

    contexts: pd.DataFrame
    """One row per context, by latent, kind and rank: latent, kind (`top` or `sample`), rank (0 the
    strongest, or the sample of the lowest bin), low, high (the bin: low < activation <= high; NaN
    for `top`), window, position, activation, activations (array of W float32: NaN outside the
    window and where a token has no row, 0 where the latent does not fire)."""
    latents: pd.DataFrame
    """One row per latent: latent, firing_rate (over all rows; NaN without rows), mean_activation
    (over the rows it fires on; NaN if none)."""


@torch.no_grad()
def collect_contexts(
    sae: SparseEncoder,
    rows: Rows,
    places: TokenPlaces,
    *,
    top: int = 10,
    samples: int = 8,
    either_side: int = 12,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evidence:
    """Encode all rows once; keep each latent's strongest contexts and a sample over its range.

    Memory: 4 W + 8 bytes for each of the (top + 2 samples) contexts of a latent, whatever the
    number of rows, and up to as much again while the first rows fill them; and one batch.

    Args:
        rows: as the SAE takes them; row i is the token `places` says.
        top: strongest contexts per latent, each from another window.
        samples: a latent's range, from 0 to the least power of two not below its maximum, is dealt
            into twice as many equal bins, of which at least this many lie below the maximum. Each
            in which it fires gives one of its firings, drawn uniformly.
        either_side: tokens on each side of the one that fires.
        seed: of the sample.
        progress: told the number of rows done.
    """
    firings = _FiringSums(sae.num_latents)
    strongest = Strongest(sae.num_latents, top, either_side)
    sample = Sample(sae.num_latents, 2 * samples, either_side, seed)
    for batch in window_batches(sae, rows, places, either_side, progress):
        firings.add(batch)
        strongest.offer(batch)
        sample.offer(batch)
    found = [strongest.contexts(), sample.contexts()]
    return Evidence(_table(found, places.context_tokens), firings.table(len(places.window)))


@torch.no_grad()
def read_contexts(
    sae: SparseEncoder,
    rows: Rows,
    places: TokenPlaces,
    contexts: pd.DataFrame,
    *,
    either_side: int = 12,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "contexts width"]:
    """The activations of each context's latent around its token, in these rows (float32).

    Args:
        contexts: latent, window and position, as `collect_contexts` gives them.
        rows, places, either_side, progress: as there.
    Returns: one row per context, W wide, with NaN and 0 as there.
    """
    latent, window, position = (
        torch.from_numpy(contexts[name].to_numpy(np.int64, copy=True))
        for name in ("latent", "window", "position")
    )
    assert not len(latent) or int(latent.max()) < sae.num_latents, "contexts are of this SAE"
    found = np.full((len(contexts), 2 * either_side + 1), np.nan, dtype=np.float32)
    token = window * places.context_tokens + position
    order = window.argsort(stable=True)
    in_order = window[order]
    for batch in window_batches(sae, rows, places, either_side, progress):
        ends = torch.tensor([batch.first_window, batch.first_window + batch.num_windows])
        start, end = torch.searchsorted(in_order, ends).tolist()
        here = order[start:end]
        here = here[latent[here].argsort(stable=True)]
        around = batch.around(latent[here].to(batch.device), token[here].to(batch.device))
        found[here.numpy()] = around.cpu().numpy()
    return found


class _FiringSums:
    """How often each latent fires, and how strongly in all."""

    def __init__(self, num_latents: int) -> None:
        self._count = np.zeros(num_latents, dtype=np.int64)
        self._sum = np.zeros(num_latents)

    def add(self, batch: WindowBatch) -> None:
        latent, num_latents = batch.latent, len(self._sum)
        self._count += torch.bincount(latent, minlength=num_latents).cpu().numpy()
        weights = batch.value.double()
        self._sum += torch.bincount(latent, weights, num_latents).cpu().numpy()

    def table(self, num_rows: int) -> pd.DataFrame:
        with np.errstate(invalid="ignore"):
            rate, mean = self._count / np.float64(num_rows), self._sum / self._count
        latent = np.arange(len(self._sum))
        return pd.DataFrame({"latent": latent, "firing_rate": rate, "mean_activation": mean})


def _table(found: list[KeptContexts], context_tokens: int) -> pd.DataFrame:
    """Columns of Evidence.contexts."""
    parts = []
    for kind in found:
        latent, token = kind.latent.cpu().numpy(), kind.token.cpu().numpy()
        around = kind.activations.cpu().numpy()
        # Rows of a latent are in a row, so its ranks count up from where it begins.
        rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
        columns = {
            "latent": latent,
            "kind": kind.kind,
            "rank": rank,
            "low": kind.low.cpu().numpy(),
            "high": kind.high.cpu().numpy(),
            "window": token // context_tokens,
            "position": token % context_tokens,
            "activation": around[:, around.shape[1] // 2],
            "activations": pd.Series(list(around), dtype=object),
        }
        parts.append(pd.DataFrame(columns))
    # Stable: the strongest stay before the sample.
    return pd.concat(parts, ignore_index=True).sort_values(
        "latent", kind="stable", ignore_index=True
    )
