"""What the explorer shows, as arrays: one `View` per model, layer and dictionary.

F is the number of latents of a dictionary, n of its contexts, W = 2 * either_side + 1 the tokens of
one context. Nothing here knows files, studies or the page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DENSE = "dense"  # the name of the dense model among `Contexts.activations`


@dataclass(frozen=True)
class Column:
    """One number per latent."""

    key: str
    """Short and stable: it stands in addresses of the page."""
    label: str
    """What the page calls it."""
    help: str
    """One sentence: what it means and in which direction it is bad."""
    values: np.ndarray
    """[F] float32 or int32; NaN where undefined, and -1 for an index that there is not."""


@dataclass(frozen=True)
class Tokens:
    """The eval text, once; everything else refers to it by window and position."""

    vocabulary: tuple[str, ...]
    """The text of every token that occurs or is promoted, spaces and line breaks included."""
    ids: np.ndarray
    """[windows, context_tokens] uint32, indices into `vocabulary`."""


@dataclass(frozen=True)
class Contexts:
    """Where the latents of a dictionary fire; rows sorted by latent, then kind, then rank."""

    latent: np.ndarray
    """[n] int32."""
    is_sample: np.ndarray
    """[n] bool: one of the sample over the activation range; otherwise one of the strongest."""
    window: np.ndarray
    """[n] int32."""
    position: np.ndarray
    """[n] int32: of the token in the middle, within its window."""
    low: np.ndarray
    """[n] float32: the interval of activations that a sample stands for; NaN for the strongest."""
    high: np.ndarray
    """[n] float32."""
    either_side: int
    """Tokens shown before and after the middle one."""
    activations: dict[str, np.ndarray]
    """[n, W] float32 by condition (`dense` or a condition's id): the same latent on the same
    tokens. NaN before and behind the window and where a token was not read."""


@dataclass(frozen=True)
class Effects:
    """Which next tokens a latent's direction promotes and suppresses; indices into `vocabulary`."""

    promoted: np.ndarray
    """[F, m] uint32, the strongest first."""
    promoted_logits: np.ndarray
    """[F, m] float32: the logit over the mean of all tokens' logits."""
    suppressed: np.ndarray
    """[F, m] uint32."""
    suppressed_logits: np.ndarray
    """[F, m] float32."""


@dataclass(frozen=True)
class OwnLatents:
    """The dictionary that was trained on a condition's own activations."""

    columns: tuple[Column, ...]
    """Its firing rates and the like; `match` [F of the dense dictionary] lies in the condition."""
    contexts: Contexts
    """`activations` has one entry, the condition's id."""
    effects: Effects | None


@dataclass(frozen=True)
class Condition:
    """A pruned condition."""

    id: str
    """`c0`, `c1`, …: in addresses and file names."""
    label: str
    """As in tables, e.g. wanda-row-0.30."""
    run: str
    """The run's name."""
    sparsity: float
    """Requested."""
    columns: tuple[Column, ...]
    """What became of each latent of the view's dictionary: persistence, survival per arm, …"""
    kept: np.ndarray
    """[F] float32: 1 where the latent is kept by the view's measure, 0 where it is lost, NaN where
    it cannot be said (it hardly fires)."""
    match: np.ndarray | None
    """[F] int32: the latent of `own` nearest to each latent of the view's dictionary; None where
    there is no own dictionary."""
    matched_back: np.ndarray | None
    """[F of own] int32: the latent of the view's dictionary that is its mutual nearest neighbour at
    the view's tau, or -1: then it is new."""
    own: OwnLatents | None


@dataclass(frozen=True)
class View:
    """One dictionary of one model and layer, under every condition."""

    id: str
    """`v0`, `v1`, …"""
    label: str
    """For people: model, layer and dictionary."""
    model: str
    layer: int
    dictionary: str
    """`seed 0` for our own, or the label of a pretrained SAE."""
    num_latents: int
    tau: float
    """Of `matched_back`."""
    kept_means: str
    """By which measure a latent counts as kept: what follows "Kept:", to the end of a sentence."""
    columns: tuple[Column, ...]
    """Of the dense dictionary: firing rate, mean activation, init retention, …"""
    conditions: tuple[Condition, ...]
    contexts: Contexts
    effects: Effects | None
    tokens: Tokens
    neuronpedia: str | None = None
    """`MODEL/SAE` on Neuronpedia, where latents have pages and labels; None where there is none."""


@dataclass(frozen=True)
class Explorer:
    """A study, ready to be looked at."""

    study: str
    """Its name."""
    views: tuple[View, ...]
