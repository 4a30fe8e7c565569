"""Time one TopK SAE training step on a CUDA device against its floor and sparsify; JSON to stdout.

usage: python benchmarks/sae_step_gpu.py [--rounds 20] [--shapes gemma-3-1b] [--save]

The floor is one encoder product in bfloat16 and the optimizer's traffic: of both weight matrices it
must read weights, gradients and two moments and write all but the gradients, in float32. It is
timed as a copy of that many bytes. Beside the step as a training takes it stand the step by our
kernels alone, its dense reference and, where it is installed, EleutherAI's sparsify with its Triton
decoder and torch's Adam. All see the same batch, at equal settings.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelens.config import SaeConfig
from prunelens.sae import TopKSAE
from prunelens.sae.kernels import Weights
from prunelens.sae.state import Training
from prunelens.sae.steps.descent import Descent
from sae_step import LEARNING_RATE, RandomActivations, Shape, sparsify_training
from side_by_side import Mark, Times, options, publish, take_turns

SHAPES = {
    "gemma-3-1b": Shape(1152, 9216, 64, 4096),
    "gemma-2-2b": Shape(2304, 18432, 64, 4096),
    "llama-3.2-1b": Shape(2048, 16384, 64, 4096),
}
REPEATS = 20  # steps of a turn
PASSES = 7  # of the optimizer over a matrix: four read, three write


def main() -> None:
    """Measure and publish; exit code 2 where there is no CUDA device."""
    parser = options(__doc__)
    parser.set_defaults(device="cuda", rounds=20)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    given = parser.parse_args()
    if not given.device.startswith("cuda") or not torch.cuda.is_available():
        print("sae_step_gpu: no CUDA device here; run it where there is one", file=sys.stderr)
        raise SystemExit(2)
    results, marks = {}, []
    for name in given.shapes:
        shape = SHAPES[name]
        differences = check(shape, given.device)
        times = measure(shape, given.rounds, given.device)
        seconds = 1e-3 * times["optimizer traffic"].median
        results[name] = {
            "milliseconds": times,
            "floor": floor(times),
            "gigabytes per second of the copy": round(1e-9 * traffic(shape) / seconds),
            "differences": differences,
        }
        marks += marks_of(name, times)
    settings = {name: SHAPES[name]._asdict() for name in given.shapes}
    publish("sae_step_gpu", settings=settings, results=results, marks=marks, save=given.save)


def marks_of(name: str, times: dict[str, Times]) -> list[Mark]:
    """What was asked at one shape."""
    ours = times["training"].median
    what = f"{name}: SAE step / (encoder product in bfloat16 + optimizer traffic)"
    found = [Mark(9, what, 2.0, "at most", ours / floor(times))]
    if "sparsify" in times:
        ratio = times["sparsify"].median / ours
        found.append(Mark(9, f"{name}: sparsify's step / ours", 1.0, "at least", ratio))
    return found


def floor(times: dict[str, Times]) -> float:
    """Milliseconds that no step can go below."""
    return times["product"].median + times["optimizer traffic"].median


def traffic(shape: Shape) -> int:
    """Bytes that the optimizer moves."""
    return PASSES * 4 * 2 * shape.num_latents * shape.d_model


def measure(shape: Shape, rounds: int, device: str) -> dict[str, Times]:
    """Milliseconds of every contender, in turns."""
    data = RandomActivations(4 * shape.batch_tokens, shape.d_model, device)
    batch = data.values[: shape.batch_tokens]
    weights = torch.randn(shape.num_latents, shape.d_model, device=device).bfloat16()
    inputs = batch.bfloat16()
    source = torch.zeros(traffic(shape) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        "product": lambda: inputs @ weights.T,
        "optimizer traffic": lambda: target.copy_(source),
        "training": training_step(shape, data),
        "kernels": kernel_step(shape, batch),
        "dense reference": reference_step(shape, batch),
    }
    if importlib.util.find_spec("sparsify"):
        contenders["sparsify"] = sparsify_step(shape, batch)
    return take_turns(contenders, rounds=rounds, repeats=REPEATS, device=device)


def training_step(shape: Shape, data: RandomActivations) -> Callable[[], object]:
    """One step of train_sae in bfloat16, with the choice of its batch."""
    config = SaeConfig.model_validate(
        {
            "expansion": shape.num_latents // shape.d_model,
            "k": shape.k,
            "batch_tokens": shape.batch_tokens,
            "learning_rate": LEARNING_RATE,
            "dtype": "bfloat16",
        }
    )
    training = Training(data, config, init_seed=0, data_seed=0)
    return lambda: training.advance(training.next_batch())


def kernel_step(shape: Shape, batch: Tensor) -> Callable[[], object]:
    """One captured step, and nothing around it."""
    from prunelens.sae.steps.cuda_descent import CudaDescent

    return stepping(
        CudaDescent(starting_weights(shape, batch), shape.k, dtype=torch.bfloat16), batch
    )


def reference_step(shape: Shape, batch: Tensor) -> Callable[[], object]:
    """The same from PyTorch's operators, gradients dense and in float32."""
    return stepping(Descent(starting_weights(shape, batch), shape.k, dtype=torch.float32), batch)


def stepping(descent: Descent, batch: Tensor) -> Callable[[], object]:
    """Steps of a descent, one after another."""
    number = 0

    def step() -> object:
        nonlocal number
        number += 1
        return descent.step(batch, rate=LEARNING_RATE, number=number)

    return step


def starting_weights(shape: Shape, batch: Tensor) -> Weights:
    """Those of an untrained SAE, on the batch's device."""
    sae = TopKSAE.initialise(shape.d_model, shape.num_latents, shape.k, init_seed=0)
    return Weights(*(weight.detach() for weight in sae.to(batch.device).weights))


def sparsify_coder(shape: Shape, batch: Tensor) -> Any:
    """Sparsify's coder with our starting weights."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    expansion = shape.num_latents // shape.d_model
    config = SparseCoderConfig(expansion_factor=expansion, k=shape.k)
    coder: Any = SparseCoder(shape.d_model, config, device=batch.device)
    start = starting_weights(shape, batch)
    coder.encoder.weight.data.copy_(start.encoder_weight)
    coder.W_dec.data.copy_(start.decoder_weight)
    return coder


def sparsify_step(shape: Shape, batch: Tensor) -> Callable[[], object]:
    """A step of EleutherAI's sparsify: its coder, its decoder normalisation, torch's Adam."""
    return sparsify_training(sparsify_coder(shape, batch), batch)


def check(shape: Shape, device: str) -> dict[str, float]:
    """Relative differences after four steps; refuses a contender that does something else.

    Loose for the weights (see below): the kernels themselves are held tightly in the tests.
    """
    from prunelens.sae.steps.cuda_descent import CudaDescent

    batch = RandomActivations(shape.batch_tokens, shape.d_model, device).values
    start, ours, theirs = (starting_weights(shape, batch) for _ in range(3))
    steps = [
        stepping(CudaDescent(ours, shape.k, dtype=torch.bfloat16), batch),
        stepping(Descent(theirs, shape.k, dtype=torch.float32), batch),
    ]
    for _ in range(4):
        one, other = (step() for step in steps)
    found = {"loss": relative(one.loss, other.loss)}  # type: ignore[attr-defined]
    # Adam's first steps go by the gradients' signs, so what is nearly 0 may go either way.
    limits = {"loss": 0.01, "encoder_weight": 0.4, "decoder_weight": 0.4, "reconstruction": 0.03}
    for name in ("encoder_weight", "decoder_weight"):
        moved, should = (getattr(w, name) - getattr(start, name) for w in (ours, theirs))
        found[name] = relative(moved, should)
    if importlib.util.find_spec("sparsify"):
        with torch.no_grad():
            made = sparsify_coder(shape, batch)(batch).sae_out
            found["reconstruction"] = relative(made, reconstruction(shape, batch))
    wrong = {name: value for name, value in found.items() if not value < limits[name]}
    assert not wrong, f"{shape}: contenders do not compute the same: {wrong}"
    return {name: round(value, 5) for name, value in found.items()}


def reconstruction(shape: Shape, batch: Tensor) -> Tensor:
    """Of an untrained SAE, by the float32 reference."""
    sae = TopKSAE.initialise(shape.d_model, shape.num_latents, shape.k, init_seed=0)
    sae = sae.to(batch.device)
    return sae.dense_latents(sae.encode(batch)) @ sae.decoder_weight


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
