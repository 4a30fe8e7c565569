"""Rows of activations encoded a few whole windows at a time, with what stands around each token.

Shapes: W tokens of a context (either_side before, the one in the middle, either_side after).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.analyses.noise import Rows
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents
from prunelens.sae.sparse import SparseEncoder
from prunelens.sae.steps.pattern import order_by_latent

BATCH_TOKENS = 2048  # about; batches are whole windows
NUMBERS_AT_ONCE = 2**24  # activations written out with their zeros at a time: 64 MB


class TokenPlaces(NamedTuple):
    """Which token of the text each row of activations is; rows ascend through the text."""

    window: Int[Tensor, " rows"]
    """Which window."""
    position: Int[Tensor, " rows"]
    """Where in it, counted from its first token."""
    context_tokens: int
    """Tokens per window."""

    @classmethod
    def of(cls, kept: Int[Tensor, " rows"], *, context_tokens: int, skip_first: int) -> TokenPlaces:
        """Of the rows `kept`, which ascend, of a store that has `skip_first` tokens less per window
        (see activations.capture).
        """
        per_window = context_tokens - skip_first
        assert per_window > 0, "a window has more tokens than are skipped"
        return cls(kept // per_window, kept % per_window + skip_first, context_tokens)


def window_batches(
    sae: SparseEncoder,
    rows: Rows,
    places: TokenPlaces,
    either_side: int,
    progress: Callable[[int], None] | None,
) -> Iterator[WindowBatch]:
    """All rows in order, a few whole windows at a time; windows without rows are passed over."""
    at_once = max(1, BATCH_TOKENS // places.context_tokens)
    ranges = _ranges(places, at_once)
    # All encoded in one size, the last row as often as it takes: buffers are held by size.
    size = max((end - start for start, end in ranges), default=0)
    encoding, writing = Buffers(), Buffers()
    for start, end in ranges:
        x = rows.rows(torch.arange(start, start + size).clamp(max=end - 1))
        encoded = sae.encode_sparse(x, buffers=encoding)
        latents = SparseLatents(*(part[: end - start].to(x.device) for part in encoded))
        first = int(places.window[start])
        token = places.window[start:end] * places.context_tokens + places.position[start:end]
        layout = _Layout(first, at_once, places.context_tokens, either_side)
        yield WindowBatch(latents, token.to(x.device), layout, sae.num_latents, writing)
        if progress:
            progress(end)


def _ranges(places: TokenPlaces, num_windows: int) -> list[tuple[int, int]]:
    """First and last (excluded) row of `num_windows` windows at a time."""
    found, start = [], 0
    while start < len(places.window):
        behind = int(places.window[start]) + num_windows
        end = int(torch.searchsorted(places.window, behind))
        found.append((start, end))
        start = end
    return found


class WindowBatch:
    """The firings of some windows, by latent, and what any latent does around any token of them."""

    def __init__(
        self,
        latents: SparseLatents,
        token: Int[Tensor, " rows"],
        layout: _Layout,
        num_latents: int,
        buffers: Buffers,
    ) -> None:
        fires = latents.values > 0
        indices = latents.indices[fires]
        order = order_by_latent(indices, num_latents)
        self.latent = indices[order]
        """[firings] int64, ascending."""
        self.value = latents.values[fires][order]
        """[firings] float32, above 0."""
        row = fires.nonzero()[:, 0][order]
        self.token = token[row]
        """[firings] int64, counted through the whole text; ascending within a latent."""
        self.window = (token // layout.context_tokens - layout.first_window)[row]
        """[firings] int64, counted from the batch's first."""
        self.device = token.device
        self.first_window, self.num_windows = layout.first_window, layout.num_windows
        self._layout, self._num_latents, self._buffers = layout, num_latents, buffers
        self._begins = layout.context_begins(self.device)
        places = self._begins[token - layout.first_token] + layout.either_side
        self._place = places[row]
        self._usable = token.new_zeros(layout.size, dtype=torch.bool)
        self._usable[places] = True

    def around(
        self, latent: Int[Tensor, " contexts"], token: Int[Tensor, " contexts"]
    ) -> Float[Tensor, "contexts width"]:
        """The activations of each latent on the tokens around each token; latents ascend.

        Of as many latents at a time as fit they are written out with their zeros. Then every
        context is one piece of memory.
        """
        layout, width = self._layout, 2 * self._layout.either_side + 1
        begin = self._begins[token - layout.first_token]
        found = self.value.new_empty((len(latent), width))
        at_once = min(self._num_latents, max(1, NUMBERS_AT_ONCE // layout.size))
        shape = (at_once * layout.size,)
        wide = self._buffers.take("wide", shape, self.value.dtype, self.device)
        contexts = wide.unfold(0, width, 1)
        edges = torch.arange(0, self._num_latents + at_once, at_once, device=self.device)
        ends, firing_ends = (torch.searchsorted(of, edges).tolist() for of in (latent, self.latent))
        for number, first in enumerate(edges[:-1].tolist()):
            here, firings = (slice(*of[number : number + 2]) for of in (ends, firing_ends))
            if here.start == here.stop:
                continue
            entries = (self.latent[firings] - first) * layout.size + self._place[firings]
            wide[entries] = self.value[firings]
            found[here] = contexts[(latent[here] - first) * layout.size + begin[here]]
            wide[entries] = 0  # far less than all of it
        usable = self._usable.unfold(0, width, 1)[begin]
        return found.masked_fill_(~usable, torch.nan)


class _Layout(NamedTuple):
    """How the tokens of a batch lie in memory: window after window, each with room on both sides.

    So a context is W entries in a row, whichever window it is of.
    """

    first_window: int
    num_windows: int
    context_tokens: int
    either_side: int

    @property
    def size(self) -> int:
        return self.num_windows * (self.context_tokens + 2 * self.either_side)

    @property
    def first_token(self) -> int:
        """Counted through the whole text, as all tokens here."""
        return self.first_window * self.context_tokens

    def context_begins(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Where the context of each of the batch's tokens begins."""
        token = torch.arange(self.num_windows * self.context_tokens, device=device)
        return token + token // self.context_tokens * 2 * self.either_side
