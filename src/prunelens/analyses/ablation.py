"""Ablations run: one latent's part taken out of the states at a site, and the KL divergence read.

A column is a latent with the direction that is taken out: its own, or a random one of its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.upper_blocks import Baseline, UpperBlocks

_ENCODED_TOKENS = 2048
_NUMBERS_AT_ONCE = 2**23  # float64 logits: 64 MB per tensor


class States(NamedTuple):
    """What stands at the site, and the pass that it gives."""

    states: Float[Tensor, "prompts context d_model"]
    """float32."""
    kept: Baseline
    """Of `states` in the model's dtype."""


class Scene(NamedTuple):
    """Everything that the ablations share."""

    upper: UpperBlocks
    original: States
    """The model as it is."""
    replaced: States
    """The SAE's reconstruction in place of the activations."""
    z: Float[Tensor, "prompts context columns"]
    """How strongly each column's latent fires."""
    directions: Float[Tensor, "columns d_model"]
    """Raw space: what one unit of z adds."""


class Items(NamedTuple):
    """Ablations to run: which column in which prompt, changed from `first` to `last`."""

    columns: Int[Tensor, " items"]
    prompts: Int[Tensor, " items"]
    first: Int[Tensor, " items"]
    last: Int[Tensor, " items"]

    @property
    def num_positions(self) -> int:
        """Positions to run, over all items."""
        return int((self.last - self.first + 1).sum())


def make_scene(
    upper: UpperBlocks,
    sae: SparseAutoencoder,
    statistics: Statistics,
    columns: Sequence[tuple[str, int]],
    *,
    skip_first: int,
    seed: int,
) -> Scene:
    """Encode and decode every position, and run the baseline of what comes out.

    Args:
        columns: (`latent` or `random_direction`, index) pairs.
        skip_first: positions at the start that stay as they are.
        seed: of the random directions.
    """
    device = sae.decoder_bias.device
    mean, sigma = (part.to(device) for part in statistics)
    which = torch.tensor([latent for _, latent in columns], dtype=torch.long, device=device)
    x = upper.states
    rows, z = [], []
    for part in x.flatten(0, 1).split(_ENCODED_TOKENS):
        found = sae.encode((part.to(device).float() - mean) / sigma)
        rows.append(sae.decode(found) * sigma + mean)
        z.append(sae.dense_latents(found)[:, which])
    reconstruction = torch.cat(rows).view(*x.shape).to(x.device)
    values = torch.cat(z).view(*x.shape[:2], -1).to(x.device)
    reconstruction[:, :skip_first] = x[:, :skip_first].float()
    values[:, :skip_first] = 0
    directions = torch.stack(
        [_direction(sae, sigma, kind, latent, seed) for kind, latent in columns]
    )
    original = States(x.float(), upper.unchanged)
    replaced = States(reconstruction, upper.baseline(reconstruction.to(x.dtype)))
    return Scene(upper, original, replaced, values, directions.to(x.device))


def _direction(sae: SparseAutoencoder, sigma: Tensor, kind: str, latent: int, seed: int) -> Tensor:
    """The latent's feature vector in raw space, or a random one of the same norm there.

    Isotropic in normalised space, as a feature vector would be without a feature; the norm is
    equalised where the model sees it.
    """
    own = sae.decoder_weight[latent].detach() * sigma
    if kind == "latent":
        return own
    drawn = np.random.default_rng([seed, latent, 0]).standard_normal(sae.d_model)
    other = torch.from_numpy(drawn).to(own) * sigma
    return other * (torch.linalg.vector_norm(own) / torch.linalg.vector_norm(other))


def where_it_matters(z: Float[Tensor, "prompts context columns"]) -> Items:
    """For the final position: the prompts where a column fires, from where it first does."""
    fires = (z > 0).cpu()
    prompts, columns = fires.any(1).nonzero(as_tuple=True)
    first = fires.to(torch.uint8).argmax(1)[prompts, columns]  # argmax is the first maximum
    return Items(columns, prompts, first, torch.full_like(first, z.shape[1] - 1))


def firing_contexts(
    z: Float[Tensor, "prompts context columns"],
    columns: list[tuple[str, int]],
    contexts_per_latent: int,
    seed: int,
) -> Items:
    """For each column the places where it fires, or a draw of them (the same for both kinds)."""
    parts = []
    for column, (_, latent) in enumerate(columns):
        places = (z[:, :, column] > 0).nonzero().cpu()
        if len(places) > contexts_per_latent:
            generator = np.random.default_rng([seed, latent, 1])
            drawn = generator.choice(len(places), contexts_per_latent, replace=False)
            places = places[torch.from_numpy(np.sort(drawn))]
        parts.append(torch.nn.functional.pad(places, (1, 0), value=column))
    chosen, prompts, positions = torch.cat(parts).unbind(1)
    return Items(chosen, prompts, positions, positions)


def measure(
    scene: Scene,
    items: Items,
    start: States,
    references: Sequence[States],
    counted: Progress,
) -> list[Float[Tensor, " items"]]:
    """KL(reference || `start` without the item's column) at the item's last position."""
    found = [torch.full((len(items.columns),), torch.nan).double() for _ in references]
    for batch in scene.upper.batches(items.first, items.last):
        part = Items(*(field[batch] for field in items))
        scores = scene.upper.rerun(
            start.kept, part.prompts, part.last, _ablated(scene, part, start.states)
        )
        places, which = torch.stack([part.prompts, part.last]).unique(dim=1, return_inverse=True)
        for kl, reference in zip(found, references, strict=True):
            own = scene.upper.logits_at(reference.kept, *places)
            kl[batch] = divergence(own, scores, which)
        counted.add(part.num_positions)
    return found


def _ablated(
    scene: Scene, items: Items, states: Tensor
) -> Float[Tensor, "items positions d_model"]:
    """The states without the column's part, for as many positions as the longest item has.

    What an item has before its `first` is unchanged: there its latent does not fire.
    """
    columns, prompts, first, last = (field.to(states.device) for field in items)
    num_new = int((last - first).max()) + 1
    positions = last[:, None] + torch.arange(1 - num_new, 1, device=states.device)
    z = scene.z[prompts[:, None], positions, columns[:, None]]
    change = z[..., None] * scene.directions[columns][:, None]
    return (states[prompts[:, None], positions] - change).to(scene.upper.states.dtype)


def divergence(
    reference: Float[Tensor, "places vocabulary"],
    scores: Float[Tensor, "items vocabulary"],
    which: Int[Tensor, " items"] | None = None,
) -> Float[Tensor, " items"]:
    """KL(softmax(reference[which]) || softmax(scores)) in nats, float64, on the CPU.

    In float64 an error of the logits counts only squared; a float32 softmax would add its own.
    """
    which = torch.arange(len(scores)) if which is None else which
    at_once = max(1, _NUMBERS_AT_ONCE // scores.shape[1])
    parts = []
    for rows in torch.arange(len(scores)).split(at_once):
        log_p = reference[which[rows].to(reference.device)].double().log_softmax(1)
        log_q = scores[rows.to(scores.device)].double().log_softmax(1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(1).cpu())
    return torch.cat(parts).clamp_min(0)


class Progress:
    """Positions run so far, as a share of all."""

    def __init__(self, total: int, report: Callable[[float], None] | None) -> None:
        self._total, self._report, self._done = total, report, 0

    def add(self, num_positions: int) -> None:
        """So many more are done."""
        self._done += num_positions
        if self._report:
            self._report(self._done / self._total)
