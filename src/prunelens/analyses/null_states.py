"""Whole windows of activations in which nothing particular to pruning is left (methods §10).

What an SAE, or the model above the site, makes of them is what noise of equal size does to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.activations import Activations
from prunelens.analyses.noise import CommonChange, NullRows


class NullStates:
    """A pruned model's activations with those of some tokens replaced by the null's.

    A token keeps what pruning does to all tokens alike; the rest is that of another token of them.
    """

    def __init__(
        self,
        dense: Activations,
        pruned: Activations,
        change: CommonChange,
        at: Bool[Tensor, "windows context"],
        *,
        skip_first: int,
    ) -> None:
        """
        Args:
            dense, pruned: stores of the windows, normalised with the dense statistics.
            at: the tokens to replace; those that the stores lack are left as they are.
            skip_first: positions of every window that the stores lack.
        """
        self._at = at.clone()
        self._at[:, :skip_first] = False
        self._stored_from, self._per_window = skip_first, at.shape[1] - skip_first
        tokens = self._rows(torch.arange(len(at)))
        self._null = NullRows(dense, pruned, change, tokens)
        self._mean, self._sigma = dense.mean, dense.sigma

    def of(
        self, states: Float[Tensor, "batch context d_model"], windows: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch context d_model"]:
        """The states of the windows of these numbers, raw, with the null's where it stands."""
        null = self._null.rows(self._rows(windows)) * self._sigma + self._mean
        states = states.clone()
        states[self._at[windows].to(states.device)] = null.to(states)
        return states

    def _rows(self, windows: Int[Tensor, " batch"]) -> Int[Tensor, " tokens"]:
        """The stores' rows of the windows' tokens that are replaced."""
        window, position = self._at[windows].nonzero(as_tuple=True)
        return windows[window] * self._per_window + position - self._stored_from


class NullSource(NamedTuple):
    """What the null of one condition is made of."""

    change: CommonChange
    evaluation: tuple[Activations, Activations]
    """Dense and pruned stores of the eval windows, normalised with the dense statistics."""
    refit: tuple[Activations, Activations]
    """The same of the training windows for refitting, and of no other."""
    skip_first: int
    """Positions of every window that the stores lack."""

    def states(
        self,
        at_refit: Bool[Tensor, "refit_windows context"],
        at_eval: Bool[Tensor, "windows context"],
    ) -> tuple[NullStates, NullStates]:
        """Of the windows for refitting and of the eval windows."""
        skip = self.skip_first
        return (
            NullStates(*self.refit, self.change, at_refit, skip_first=skip),
            NullStates(*self.evaluation, self.change, at_eval, skip_first=skip),
        )
