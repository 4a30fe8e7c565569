"""The files of the stage `evidence` -> the explorer's contexts, tokens and effects."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from prunelens.report.explorer.content import Contexts, Effects, Tokens

Array = np.ndarray


def contexts_of(folder: pathlib.Path, either_side: int, condition: str) -> Contexts:
    """The contexts of an artifact, with the activations under its own condition.

    Args:
        folder: of the artifact.
        either_side: tokens before and after the middle one.
        condition: what the run is called among `Contexts.activations`.
    """
    table = pq.read_table(folder / "contexts.parquet")
    flat = table["activations"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = table.drop_columns("activations").to_pandas()

    def values(name: str, dtype: type) -> Array:
        return rows[name].to_numpy(dtype=dtype)

    return Contexts(
        values("latent", np.int32),
        (rows["kind"] == "sample").to_numpy(),
        values("window", np.int32),
        values("position", np.int32),
        values("low", np.float32),
        values("high", np.float32),
        either_side,
        {condition: flat.astype(np.float32).reshape(len(rows), 2 * either_side + 1)},
    )


def activations_under_pruning(folder: pathlib.Path) -> Array:
    """[n, W] float32: at the dense run's contexts, in a pruned run's artifact."""
    return load_file(folder / "under_pruning.safetensors")["activations"]


class Words(NamedTuple):
    """The tokens that a view shows: those of the text, and those promoted or suppressed."""

    token_ids: Array
    """Ascending."""
    texts: tuple[str, ...]

    @classmethod
    def of(cls, folders: Iterable[pathlib.Path]) -> Words:
        """Those of all artifacts of one model together."""
        files = [folder / "tokens.parquet" for folder in folders]
        every = pd.concat([pd.read_parquet(file) for file in files if file.is_file()])
        every = every.drop_duplicates("token_id").sort_values("token_id")
        return cls(every["token_id"].to_numpy(dtype=np.int64), tuple(every["text"]))

    def indices(self, token_ids: Array) -> Array:
        """Places in `texts`, uint32."""
        found = np.searchsorted(self.token_ids, token_ids)
        assert (self.token_ids[found] == token_ids).all(), "the text of every token is kept"
        return found.astype(np.uint32)

    def tokens(self, folder: pathlib.Path) -> Tokens:
        """The eval text, from the dense run's artifact."""
        return Tokens(self.texts, self.indices(load_file(folder / "text.safetensors")["ids"]))

    def effects(self, folder: pathlib.Path) -> Effects:
        """Which tokens the latents of an artifact promote and suppress."""
        found = load_file(folder / "effects.safetensors")
        return Effects(
            self.indices(found["promoted"]),
            found["promoted_logits"].astype(np.float32),
            self.indices(found["suppressed"]),
            found["suppressed_logits"].astype(np.float32),
        )
