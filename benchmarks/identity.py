"""Activation matching and joint latent scaling: sparse against the same with zeros written out.

`python benchmarks/identity.py [d_model] [latents] [k] [tokens]` prints seconds of both ways, side
by side, and checks that they agree.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from prunelens.analyses.activation_matching import latent_series, match_activations
from prunelens.analyses.scaling import latent_scaling
from prunelens.sae.topk import TopKSAE

Result = TypeVar("Result")


class Rows:
    """Activations in memory."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def rows(self, index: Tensor) -> Tensor:
        """By number."""
        return self._values[index]


def main() -> None:
    """Two SAEs and paired activations of one size."""
    d_model, num_latents, k, num_tokens = (
        int(sys.argv[i]) if len(sys.argv) > i else default
        for i, default in enumerate((128, 1024, 16, 20_000), start=1)
    )
    generator = torch.Generator().manual_seed(0)
    a = TopKSAE.initialise(d_model, num_latents, k, init_seed=0).requires_grad_(False)
    b = TopKSAE.initialise(d_model, num_latents, k, init_seed=1).requires_grad_(False)
    dense = torch.randn(num_tokens, d_model, generator=generator)
    pruned = 0.8 * dense + 0.3 * torch.randn(num_tokens, d_model, generator=generator)
    tokens = torch.arange(num_tokens)
    print(f"d {d_model}, {num_latents} latents, k {k}, {num_tokens} tokens")

    series = [latent_series(sae, Rows(dense), tokens) for sae in (a, b)]
    ours = _timed("matching, sparse", lambda: match_activations(*series, lowest_tau=0.5))
    theirs = _timed("matching, dense", lambda: _dense_correlations(a, b, dense))
    best = torch.from_numpy(ours.similarity_a)
    assert torch.allclose(best.double(), theirs.max(1).values, atol=1e-4)

    table = _timed(
        "scaling, sparse",
        lambda: latent_scaling(a, Rows(dense), Rows(pruned), tokens, seed=0),
    )
    found = _timed("scaling, dense (two targets)", lambda: _dense_scaling(a, dense, pruned))
    scaling = torch.tensor(
        table.loc[table["source"] == "pruned", "scaling"].tolist(), dtype=torch.float64
    )
    known = ~scaling.isnan()
    print(f"largest difference {float((scaling - found)[known].abs().max()):.1e}")
    assert torch.allclose(scaling[known], found[known], atol=1e-2)


def _dense_correlations(a: TopKSAE, b: TopKSAE, x: Tensor) -> Tensor:
    """Every correlation of two full latent matrices."""
    left, right = (sae.dense_latents(sae.encode(x)).double() for sae in (a, b))
    left, right = (z - z.mean(0) for z in (left, right))
    return (left / left.norm(dim=0)).T @ (right / right.norm(dim=0))


def _dense_scaling(sae: TopKSAE, dense: Tensor, pruned: Tensor) -> Tensor:
    """The normal equations of the joint regression, solved directly."""
    z = sae.dense_latents(sae.encode(dense)).double()
    z -= z.mean(0)
    rows = sae.decoder_weight.double()
    normal = (z.T @ z) * (rows @ rows.T)
    targets = [(z * ((y - y.mean(0)).double() @ rows.T)).sum(0) for y in (dense, pruned)]
    solved = torch.linalg.solve(normal, torch.stack(targets, 1))
    return solved[:, 1] / solved[:, 0]


def _timed(label: str, work: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = work()
    print(f"{label:30} {time.perf_counter() - start:8.2f} s")
    return result


if __name__ == "__main__":
    main()
