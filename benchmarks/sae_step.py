"""Time one TopK SAE training step against its floor and against dense autograd; JSON to stdout.

usage: python benchmarks/sae_step.py [--threads 2] [--rounds 7] [--shapes demo paper]

Per shape, interleaved in one process so that a busy machine slows all alike: one encoder product in
float32 and in bfloat16 (the floor), our whole step with either encoder (batch selection, gradients,
Adam, unit norm), and dense autograd with torch's Adam as the paper writes it. Read the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from prunelens.config import SaeConfig
from prunelens.sae import TopKSAE
from prunelens.sae.train import Training


class Shape(NamedTuple):
    """One training."""

    d_model: int
    num_latents: int
    k: int
    batch_tokens: int


SHAPES = {
    "demo": Shape(128, 1024, 16, 1024),
    "demo-2048": Shape(128, 1024, 16, 2048),
    "paper": Shape(1152, 9216, 64, 2048),
}


class RandomActivations:
    """Gaussian rows in memory."""

    def __init__(self, num_tokens: int, d_model: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(num_tokens, d_model, generator=generator)
        self.sigma = torch.ones(d_model)
        self.num_tokens, self.d_model = num_tokens, d_model

    def rows(self, index: torch.Tensor, /) -> torch.Tensor:
        """Tokens by index."""
        return self.values[index]

    def batches(self, batch_tokens: int, /) -> Iterator[torch.Tensor]:
        """All tokens in order."""
        yield from self.values.split(batch_tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "torch": torch.__version__,
        "shapes": {name: measure(SHAPES[name], options.rounds) for name in options.shapes},
    }
    print(json.dumps(report, indent=2))


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Milliseconds of every contender: median and least over the rounds."""
    data = RandomActivations(4 * shape.batch_tokens, shape.d_model)
    contenders = {
        "encoder_product_float32": encoder_product(shape, data, torch.float32),
        "encoder_product_bfloat16": encoder_product(shape, data, torch.bfloat16),
        "ours_float32": our_step(shape, data, "float32"),
        "ours_bfloat16": our_step(shape, data, "bfloat16"),
        "dense_autograd": dense_step(shape, data),
    }
    repeats = max(1, 20_000_000 // (shape.batch_tokens * shape.num_latents))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, step in contenders.items():
            started = time.perf_counter()
            for _ in range(repeats):
                step()
            if round_ > 0:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - started) / repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    floor = min(median["encoder_product_float32"], median["encoder_product_bfloat16"])
    best = min(median["ours_float32"], median["ours_bfloat16"])
    return {
        **shape._asdict(),
        "median_ms": {name: round(value, 3) for name, value in median.items()},
        "least_ms": {name: round(min(values), 3) for name, values in times.items()},
        "ours_over_floor": round(best / floor, 2),
        "dense_over_ours": round(median["dense_autograd"] / best, 2),
    }


def encoder_product(
    shape: Shape, data: RandomActivations, dtype: torch.dtype
) -> Callable[[], object]:
    """One x @ W_enc^T."""
    weight = torch.randn(shape.d_model, shape.num_latents).to(dtype)
    x_hat = data.values[: shape.batch_tokens]
    return lambda: x_hat.to(dtype) @ weight


def our_step(shape: Shape, data: RandomActivations, encoder_dtype: str) -> Callable[[], object]:
    """One step of train_sae."""
    config = SaeConfig.model_validate(
        {
            "expansion": shape.num_latents // shape.d_model,
            "k": shape.k,
            "batch_tokens": shape.batch_tokens,
            "encoder_dtype": encoder_dtype,
        }
    )
    return Training(data, config, init_seed=0, data_seed=0).advance


def dense_step(shape: Shape, data: RandomActivations) -> Callable[[], object]:
    """A dense step by autograd and torch.optim.Adam, decoder rows kept at unit norm."""
    sae = TopKSAE.initialise(shape.d_model, shape.num_latents, shape.k, init_seed=0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-5)
    x_hat = data.values[: shape.batch_tokens]

    def step() -> None:
        pre = torch.relu(x_hat @ sae.encoder_weight.T + sae.encoder_bias)
        values, indices = pre.topk(shape.k, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values)
        x_rec = z @ sae.decoder_weight + sae.decoder_bias
        loss = (x_rec - x_hat).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            norms = torch.linalg.vector_norm(sae.decoder_weight, dim=1, keepdim=True)
            sae.decoder_weight.div_(norms)

    return step


if __name__ == "__main__":
    main()
