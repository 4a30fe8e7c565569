"""RQ5: what becomes of the model's output when one latent is ablated (methods §7).

The paper reads KL(original || SAE reconstruction without the latent), most of which may be the
SAE's own reconstruction error. Two controls leave that out: they compare the reconstruction with
and without the latent (`isolated`), and the model's own activations with and without it
(`error_preserving`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.analyses.ablation import (
    Items,
    Progress,
    divergence,
    firing_contexts,
    make_scene,
    measure,
    where_it_matters,
)
from prunelens.errors import UserError
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.upper_blocks import UpperBlocks

PROTOCOLS = ("paper", "isolated", "error_preserving")
KINDS = ("latent", "random_direction")


class Ablations(NamedTuple):
    """Every single measurement, in one model."""

    kl: pd.DataFrame
    """One row per thing measured: latent, kind (latent, random_direction), protocol (paper,
    isolated, error_preserving), contexts (final, firing), prompt, position (where KL is read), kl
    (nats), fires_final (the latent fires at that position)."""
    reconstruction: Float[np.ndarray, " prompts"]
    """KL(original || SAE reconstruction) at the last position, in nats."""


def nothing_ablated(num_prompts: int) -> Ablations:
    """The result where there is no latent to ablate: no rows, and nothing known of the SAE."""
    columns = ["latent", "kind", "protocol", "contexts", "prompt", "position", "kl", "fires_final"]
    return Ablations(pd.DataFrame(columns=columns), np.full(num_prompts, np.nan))


@torch.no_grad()
def ablate(
    upper: UpperBlocks,
    sae: SparseAutoencoder,
    statistics: Statistics,
    *,
    latents: Sequence[int],
    random_direction_latents: Sequence[int],
    contexts_per_latent: int,
    seed: int,
    skip_first: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Ablations:
    """Ablate every latent by itself and measure KL divergences of the next token (methods §7, RQ5).

    With x the activation, x_sae = sigma * SAE((x - mean) / sigma) + mean and z_f d_f what latent f
    adds in normalised space:

    - `paper`: KL(original || x_sae - sigma z_f d_f).
    - `isolated`: KL(x_sae || x_sae - sigma z_f d_f).
    - `error_preserving`: KL(original || x - sigma z_f d_f).
    - contexts `final`: changed at every position, read at the last one, a row for every prompt.
      Where the latent never fires nothing changes: `paper` is KL(original || x_sae), the others 0.
    - contexts `firing` (not for `paper`): changed and read at one position where the latent fires.
    - kind `random_direction`: the same with a random direction of the same norm in place of d_f.

    KL is summed in float64; rounding below 0 (1e-15 or so) is cut to 0.

    Args:
        upper: the model above the SAE's site, with the prompts, BOS included; several SAEs of one
            model share it.
        sae: in normalised space, with the `statistics` that it was trained under.
        latents: whose own directions are ablated; duplicates count once.
        random_direction_latents: for which random directions are.
        contexts_per_latent: places where it fires, at most, drawn from all of them.
        seed: of the draws; a latent's draw does not depend on which others are asked for.
        skip_first: positions at the start that the SAE was not trained on: they are neither
            reconstructed nor changed. 0 is the paper's protocol.
        progress: called with the share that is done.
    Raises: UserError for latents that the SAE does not have, widths that differ, or no contexts.
    """
    _check(upper, sae, [*latents, *random_direction_latents], contexts_per_latent, skip_first)
    columns = [("latent", latent) for latent in sorted(set(latents))]
    columns += [("random_direction", latent) for latent in sorted(set(random_direction_latents))]
    scene = make_scene(upper, sae, statistics, columns, skip_first=skip_first, seed=seed)
    final = where_it_matters(scene.z)
    firing = firing_contexts(scene.z, columns, contexts_per_latent, seed)
    counted = Progress(2 * (final.num_positions + firing.num_positions), progress)

    from_sae = measure(scene, final, scene.replaced, [scene.original, scene.replaced], counted)
    from_own = measure(scene, final, scene.original, [scene.original], counted)
    isolated = measure(scene, firing, scene.replaced, [scene.replaced], counted)
    preserving = measure(scene, firing, scene.original, [scene.original], counted)

    num_prompts, context, _ = upper.states.shape
    every = torch.arange(num_prompts)
    last = torch.full_like(every, context - 1)
    states = (scene.original, scene.replaced)
    ends = [upper.logits_at(part.kept, every, last) for part in states]
    reconstruction = divergence(*ends).numpy()
    found = dict(zip(PROTOCOLS, [*from_sae, *from_own], strict=True))
    tables = [
        _final_table(scene.z, columns, protocol, final, kl, reconstruction)
        for protocol, kl in found.items()
    ]
    for protocol, (kl,) in (("isolated", isolated), ("error_preserving", preserving)):
        tables.append(_firing_table(columns, protocol, firing, kl))
    return Ablations(pd.concat(tables, ignore_index=True), reconstruction)


def _final_table(
    z: Tensor,
    columns: list[tuple[str, int]],
    protocol: str,
    items: Items,
    kl: Tensor,
    reconstruction: Float[np.ndarray, " prompts"],
) -> pd.DataFrame:
    """A row for every column and prompt, also where nothing had to be run."""
    num_prompts, context, _ = z.shape
    unchanged = reconstruction if protocol == "paper" else np.zeros(num_prompts)
    values = np.tile(unchanged, (len(columns), 1))
    values[items.columns.numpy(), items.prompts.numpy()] = kl.numpy()
    return _table(
        columns,
        protocol,
        "final",
        column=np.repeat(np.arange(len(columns)), num_prompts),
        prompt=np.tile(np.arange(num_prompts), len(columns)),
        position=np.full(values.size, context - 1),
        kl=values.ravel(),
        fires_final=(z[:, -1] > 0).T.cpu().numpy().ravel(),
    )


def _firing_table(
    columns: list[tuple[str, int]], protocol: str, items: Items, kl: Tensor
) -> pd.DataFrame:
    return _table(
        columns,
        protocol,
        "firing",
        column=items.columns.numpy(),
        prompt=items.prompts.numpy(),
        position=items.last.numpy(),
        kl=kl.numpy(),
        fires_final=np.ones(len(kl), dtype=bool),
    )


def _table(
    columns: list[tuple[str, int]],
    protocol: str,
    contexts: Literal["final", "firing"],
    *,
    column: np.ndarray,
    **values: np.ndarray,
) -> pd.DataFrame:
    kinds, latents = (np.array([pair[i] for pair in columns]) for i in (0, 1))
    first = {"latent": latents[column], "kind": kinds[column]}
    return pd.DataFrame({**first, "protocol": protocol, "contexts": contexts, **values})


def _check(
    upper: UpperBlocks,
    sae: SparseAutoencoder,
    latents: Sequence[int],
    contexts_per_latent: int,
    skip_first: int,
) -> None:
    if not latents:
        raise UserError("latents: there are none to ablate; give at least one")
    if min(latents) < 0 or max(latents) >= sae.num_latents:
        wrong = next(latent for latent in latents if not 0 <= latent < sae.num_latents)
        raise UserError(f"latents: {wrong} is not one of the SAE's {sae.num_latents}, from 0")
    _, context, width = upper.states.shape
    if sae.d_model != width:
        raise UserError(
            f"sae: made for d_model {sae.d_model}, but the model has {width}; use the SAE of this"
            " model"
        )
    if contexts_per_latent < 1:
        raise UserError(
            f"causal.contexts_per_latent: {contexts_per_latent} is too few; make it at least 1"
        )
    if not 0 <= skip_first < context:
        raise UserError(
            f"activations.skip_first: {skip_first} leaves nothing of a window of {context} tokens;"
            " make it smaller"
        )
