"""Activation matching and joint latent scaling: sparse against the same with zeros written out.

In turns, on the same activations, after a check that both give the same.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from prunelens.analyses.activation_matching import latent_series, match_activations
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.scaling import latent_scaling
from prunelens.match import Matches
from prunelens.sae.topk import TopKSAE
from side_by_side import options, publish, take_turns


class Rows:
    """Activations in memory."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def rows(self, index: Tensor) -> Tensor:
        """By number."""
        return self._values[index]


def main() -> None:
    """Two SAEs and paired activations of one size."""
    parser = options(__doc__)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    a, b = (
        TopKSAE.initialise(chosen.d_model, chosen.latents, chosen.k, init_seed=seed)
        .requires_grad_(False)
        .to(chosen.device)
        for seed in (0, 1)
    )
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, chosen.tokens, chosen.d_model, generator=generator)
    dense, pruned = x.to(chosen.device), (0.8 * x + 0.3 * noise).to(chosen.device)
    tokens = torch.arange(chosen.tokens)

    def match() -> Matches:
        series = (latent_series(sae, Rows(dense), tokens) for sae in (a, b))
        return match_activations(*series, lowest_tau=0.5)

    def scale() -> pd.DataFrame:
        rows = (Rows(dense), Rows(pruned))
        change, groups = fit_common_change(*rows, tokens), tokens * 20 // len(tokens)
        return latent_scaling(a, *rows, tokens, change=change, groups=groups, seed=0)

    _check_matching(match(), _dense_correlations(a, b, dense))
    difference = _check_scaling(scale(), _dense_scaling(a, dense, pruned))
    times = take_turns(
        {
            "matching, sparse": match,
            "matching, dense": lambda: _dense_correlations(a, b, dense),
            "scaling, sparse (five targets and a jackknife)": scale,
            "scaling, dense (two targets)": lambda: _dense_scaling(a, dense, pruned),
        },
        rounds=chosen.rounds,
        device=chosen.device,
    )
    results = {"milliseconds": times, "largest_difference_of_scaling": difference}
    publish("identity", settings=vars(chosen), results=results, marks=[], save=chosen.save)


def _check_matching(matches: Matches, correlations: Tensor) -> None:
    found = torch.from_numpy(matches.similarity_a).double()
    assert torch.allclose(found, correlations.cpu().max(1).values, atol=1e-4)


def _check_scaling(table: pd.DataFrame, expected: Tensor) -> float:
    """The largest difference, which is small."""
    pruned = table.loc[table["source"] == "pruned", "scaling"]
    found = torch.tensor(pruned.tolist(), dtype=torch.float64)
    known = ~found.isnan()
    assert known.any()
    assert torch.allclose(found[known], expected.cpu()[known], atol=1e-2)
    return float((found - expected.cpu())[known].abs().max())


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


if __name__ == "__main__":
    main()
