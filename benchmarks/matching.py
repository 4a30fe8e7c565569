"""Matching two dictionaries against the float32 product of their unit rows alone (row 6).

Both take turns in one process: at 9,216 latents the product is taken whole, at 18,432 in blocks,
into memory that is there already. Three kinds of B: random (hardly a pair above 0.5), a noisy
permuted copy (one partner each), and clusters (many pairs above 0.5, the worst case, without a mark
on its time).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prunelens.match import Matches, match_dictionaries, match_rates, unit_rows
from side_by_side import Mark, options, peak_memory, publish, take_turns

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9)
MOST_MEMORY = 512e6  # bytes beyond the inputs
MOST_TIME = 1.3  # of the product alone
CHECKED_ROWS = 512  # of A, looked at in a product of their own


class Size(NamedTuple):
    """Two dictionaries and the rows of the product that are held at a time."""

    num_latents: int
    d_model: int
    product_rows: int


SIZES = {"9216": Size(9216, 1152, 9216), "18432": Size(18432, 2304, 2048)}


def main() -> None:
    """Measure every kind at every size."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--clusters", type=int, default=48, help="of the hard kind")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results, marks = {}, []
    for name in chosen.sizes:
        size = SIZES[name]
        for kind in ("random", "noisy_copy", "clusters"):
            found = _measure(size, kind, chosen.clusters, chosen.rounds)
            results[f"{name} {kind}"] = found
            what = f"matching {size.num_latents:,}^2 at d {size.d_model}, {kind}"
            if kind != "clusters":
                ratio = found["ours_over_product"]
                marks.append(
                    Mark(6, f"{what}, over the product alone", MOST_TIME, "at most", ratio)
                )
            memory = found["extra_memory_mb"]
            marks.append(
                Mark(6, f"{what}: extra memory in MB", MOST_MEMORY / 1e6, "at most", memory)
            )
    publish("matching", settings=vars(chosen), results=results, marks=marks, save=chosen.save)


def _measure(size: Size, kind: str, clusters: int, rounds: int) -> dict[str, Any]:
    a, b = _dictionaries(size, kind, clusters)
    with peak_memory() as peak:
        matches = match_dictionaries(a, b, lowest_tau=min(TAUS))
        extra = peak()
    rates = [match_rates(matches, tau) for tau in TAUS]
    _check(a, b, matches)
    del matches
    left, right = unit_rows(a), unit_rows(b)
    buffer = torch.zeros(size.product_rows, size.num_latents)

    def product() -> None:
        for rows in left.split(size.product_rows):
            torch.mm(rows, right.T, out=buffer[: len(rows)])

    times = take_turns(
        {"product": product, "ours": lambda: _match(a, b)},
        rounds=rounds if kind != "clusters" else 1,
    )
    return {
        "milliseconds": times,
        "ours_over_product": round(times["ours"].median / times["product"].median, 3),
        "extra_memory_mb": round(extra / 1e6),
        "rates": [rate._asdict() for rate in rates],
    }


def _match(a: Tensor, b: Tensor) -> None:
    matches = match_dictionaries(a, b, lowest_tau=min(TAUS))
    for tau in TAUS:
        match_rates(matches, tau)


def _dictionaries(size: Size, kind: str, clusters: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(number: int) -> Tensor:
        return torch.randn(number, size.d_model, generator=generator)

    a = random(size.num_latents)
    if kind == "random":
        return a, random(size.num_latents)
    if kind == "noisy_copy":
        order = torch.randperm(size.num_latents, generator=generator)
        return a, a[order].add_(random(size.num_latents).mul_(0.6))
    centres = 1.5 * random(clusters)
    a, b = (
        rows.add_(centres[torch.randint(clusters, (len(rows),), generator=generator)])
        for rows in (a, random(size.num_latents))
    )
    return a, b


def _check(a: Tensor, b: Tensor, matches: Matches) -> None:
    """Both directions, and the order of the rates, against another product; greedy, a loop."""
    left, right = unit_rows(a), unit_rows(b)
    first = left[:CHECKED_ROWS] @ right.T
    back = right[:CHECKED_ROWS] @ left.T
    for product, best, similarity in (
        (first, matches.best_in_b, matches.similarity_a),
        (back, matches.best_in_a, matches.similarity_b),
    ):
        value, chosen = product.max(1).values, torch.from_numpy(best[:CHECKED_ROWS])
        found = torch.from_numpy(similarity[:CHECKED_ROWS])
        assert torch.allclose(found, value, atol=1e-5)
        assert torch.allclose(product.gather(1, chosen[:, None])[:, 0], value, atol=1e-5)
    for tau in TAUS:
        rates = match_rates(matches, tau)
        assert rates.mnn <= rates.greedy <= rates.one_way
    _check_greedy(a[:CHECKED_ROWS], b[:CHECKED_ROWS])


def _check_greedy(a: Tensor, b: Tensor) -> None:
    """Against picking the highest similarity left, again and again, on a corner of the same."""
    cosines = (unit_rows(a) @ unit_rows(b).T).numpy().copy()
    expected = []
    while cosines.max() >= np.float32(min(TAUS)):
        row, column = np.unravel_index(cosines.argmax(), cosines.shape)
        expected.append(cosines[row, column])
        cosines[row], cosines[:, column] = -1, -1
    found = match_dictionaries(a, b, lowest_tau=min(TAUS)).greedy_similarity_a
    assert np.allclose(np.sort(found[~np.isnan(found)])[::-1], expected, atol=1e-6)


if __name__ == "__main__":
    main()
