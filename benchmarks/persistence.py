"""Persistence and activation matching against the encoding of what they look at alone (row 7).

The floor is `sae.encode` of exactly the activations that are encoded, in the same batches, in turns
with ours: dense and every disturbed copy per token for persistence (the common change is fitted
within ours), the same tokens by two SAEs for matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunelens.analyses.activation_matching import latent_series, match_activations
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.persistence import BATCH_TOKENS, DRAWS, persistence
from prunelens.match import Matches, match_rates
from prunelens.sae.topk import TopKSAE
from side_by_side import Mark, options, publish, take_turns

MOST_TIME = 1.5  # of encoding alone
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9)
CHECKED = 256  # latents that are also looked at with their zeros written out


class Shape(NamedTuple):
    """SAEs and the tokens that are looked at."""

    d_model: int
    num_latents: int
    k: int
    persistence_tokens: int
    matching_tokens: int


SHAPES = {
    "demo": Shape(128, 1024, 16, 20_000, 20_000),
    "paper": Shape(1152, 9216, 64, 4096, 20_000),
}


class Rows:
    """Activations in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def rows(self, index: Tensor) -> Tensor:
        """By number."""
        return self.values[index]


def main() -> None:
    """Both analyses at both shapes."""
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results, marks = {}, []
    for name in chosen.shapes:
        for analysis, measure in (("persistence", _persistence), ("matching", _matching)):
            found = measure(SHAPES[name], chosen.rounds, chosen.device)
            results[f"{name} {analysis}"] = found
            what = f"{analysis} at the {name} shape, over encoding alone"
            marks.append(Mark(7, what, MOST_TIME, "at most", found["ours_over_encoding"]))
    publish("persistence", settings=vars(chosen), results=results, marks=marks, save=chosen.save)


def _persistence(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    sae = _sae(shape, 0, device)
    dense, pruned = _activations(shape, shape.persistence_tokens, device)
    _check_persistence(sae, dense, pruned)
    times = take_turns(
        {
            "encoding": lambda: _encode([sae] * (1 + sum(DRAWS.values())), dense),
            "ours": lambda: _measured(sae, dense, pruned),
        },
        rounds=rounds,
        device=device,
    )
    ratio = round(times["ours"].median / times["encoding"].median, 3)
    return {**shape._asdict(), "milliseconds": times, "ours_over_encoding": ratio}


def _matching(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    saes = [_sae(shape, seed, device) for seed in (0, 1)]
    dense = _activations(shape, shape.matching_tokens, device)[0]
    tokens = torch.arange(len(dense))

    def series() -> list[Any]:
        return [latent_series(sae, Rows(dense), tokens) for sae in saes]

    a, b = series()
    turned = match_activations(b, a, lowest_tau=min(TAUS))
    _check_matching(saes, dense, match_activations(a, b, lowest_tau=min(TAUS)), turned)

    def ours() -> None:
        matches = match_activations(*series(), lowest_tau=min(TAUS))
        for tau in TAUS:
            match_rates(matches, tau)

    times = take_turns(
        {
            "encoding": lambda: _encode(saes, dense),
            "ours": ours,
            "of which products of all pairs": lambda: match_activations(a, b, lowest_tau=min(TAUS)),
        },
        rounds=rounds,
        device=device,
    )
    ratio = round(times["ours"].median / times["encoding"].median, 3)
    return {**shape._asdict(), "milliseconds": times, "ours_over_encoding": ratio}


def _encode(saes: Sequence[TopKSAE], x: Tensor) -> None:
    with torch.no_grad():
        for batch in x.split(BATCH_TOKENS):
            for sae in saes:
                sae.encode(batch)


def _sae(shape: Shape, seed: int, device: str) -> TopKSAE:
    sae = TopKSAE.initialise(shape.d_model, shape.num_latents, shape.k, init_seed=seed)
    return sae.requires_grad_(False).to(device)


def _activations(shape: Shape, num_tokens: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense, noise = torch.randn(2, num_tokens, shape.d_model, generator=generator)
    return dense.to(device), (0.8 * dense + 0.3 * noise).to(device)


def _measured(sae: TopKSAE, dense: Tensor, pruned: Tensor) -> pd.DataFrame:
    """Over all tokens, with as many groups of documents as a study has."""
    tokens, rows = torch.arange(len(dense)), (Rows(dense), Rows(pruned))
    change = fit_common_change(*rows, tokens)
    return persistence(sae, *rows, tokens, change=change, groups=tokens * 20 // len(tokens), seed=0)


def _check_persistence(sae: TopKSAE, dense: Tensor, pruned: Tensor) -> None:
    """Some latents' Pearson correlations over all tokens, zeros written out."""
    table = _measured(sae, dense, pruned)
    found = table.loc[table["source"] == "pruned", "correlation"].to_numpy()[:CHECKED]
    expected = _pearson(_zeros_written_out(sae, dense), _zeros_written_out(sae, pruned))
    known = ~np.isnan(found)
    assert known.any()
    assert np.allclose(found[known], expected.diagonal().numpy()[known], atol=1e-6)


def _check_matching(saes: Sequence[TopKSAE], x: Tensor, matches: Matches, turned: Matches) -> None:
    """Some latents' correlations with as many of the other SAE, and the same from B to A."""
    assert np.array_equal(matches.similarity_a, turned.similarity_b)
    assert np.array_equal(matches.best_in_b, turned.best_in_a)
    left, right = (_zeros_written_out(sae, x) for sae in saes)
    correlation = _pearson(left, right).numpy()
    similarity = matches.similarity_a[:CHECKED]
    inside = np.flatnonzero((matches.best_in_b[:CHECKED] < CHECKED) & (similarity > 0))
    pairs = correlation[inside, matches.best_in_b[inside]]
    assert np.allclose(pairs, similarity[inside], atol=1e-6)
    fires = (right > 0).sum(0).numpy() >= 10  # fewer and a latent can match nothing
    best = correlation[:, fires].max(1, initial=0.0)
    known = similarity > 0
    assert (similarity[known] >= best[known] - 1e-6).all()


def _zeros_written_out(sae: TopKSAE, x: Tensor) -> Tensor:
    """Activations of the first latents, float64 [tokens, CHECKED]."""
    parts = [sae.dense_latents(sae.encode(rows))[:, :CHECKED] for rows in x.split(BATCH_TOKENS)]
    return torch.cat(parts).cpu().double()


def _pearson(left: Tensor, right: Tensor) -> Tensor:
    """Correlations of all pairs of columns."""
    left, right = (z - z.mean(0) for z in (left, right))
    return (left / left.norm(dim=0)).T @ (right / right.norm(dim=0))


if __name__ == "__main__":
    main()
