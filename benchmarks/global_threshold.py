"""One threshold over all matrices: counting bit patterns against joining and sorting.

`python benchmarks/global_threshold.py [millions of weights]` prints seconds and the peak of extra
memory, and checks that both drop the same weights.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from prunelens.prune.masks import keep_masks

SPARSITY = Fraction(3, 10)


def main() -> None:
    """Both ways on random weights of one size."""
    num_millions = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(2048, 2048), (8192, 2048), (2048, 8192), (512, 2048)]
    scores: dict[str, Tensor] = {}
    while sum(matrix.numel() for matrix in scores.values()) < num_millions * 1_000_000:
        shape = shapes[len(scores) % len(shapes)]
        weight = torch.randn(shape, generator=generator).abs_()
        scores[f"matrix{len(scores)}"] = weight.bfloat16().float()  # many ties, as in real models
    num_weights = sum(matrix.numel() for matrix in scores.values())
    print(f"{num_weights / 1e6:.0f} M weights, {torch.get_num_threads()} threads")
    ours = _measure("counting", lambda: keep_masks(scores, scope="global", sparsity=SPARSITY))
    theirs = _measure("sorting", lambda: _by_sorting(scores))
    assert all(torch.equal(ours[name], theirs[name]) for name in scores)


def _by_sorting(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same masks from one stable sort of everything."""
    joined = torch.cat([matrix.flatten() for matrix in scores.values()])
    order = joined.sort(stable=True).indices
    keep = torch.ones_like(joined, dtype=torch.bool)
    keep[order[: math.floor(SPARSITY * len(joined))]] = False
    parts = keep.split([matrix.numel() for matrix in scores.values()])
    return {
        name: part.reshape(matrix.shape)
        for (name, matrix), part in zip(scores.items(), parts, strict=True)
    }


def _measure(label: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    before = _resident_mebibytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _resident_mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(f"{label:10} {seconds:8.2f} s   {peak - before:6.0f} MiB more")
    return result


def _resident_mebibytes() -> float:
    """Linux only."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (called often)
        return int(file.read().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    main()
