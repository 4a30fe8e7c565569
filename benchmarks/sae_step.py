"""Time one TopK SAE training step against its floor and against other libraries; JSON to stdout.

usage: python benchmarks/sae_step.py [--threads 2] [--rounds 7] [--shapes demo paper] [--save]

The floor is one encoder product in the faster of float32 and bfloat16, as a user would write it
(the batch converted, the result in fresh memory; the product alone, into memory that is held, is
reported beside it). A step is everything
between two batches' reading: selection of the batch, encoding, gradients, Adam, unit norm. Beside
ours stand dense autograd as the paper writes it and, where they are installed (the `dev` extra),
EleutherAI's sparsify (with its Triton kernels switched off: they need a GPU) and SAELens, both in
float32, the only precision that they offer here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from prunelens.config import SaeConfig
from prunelens.sae import TopKSAE
from prunelens.sae.state import Training
from prunelens.sae.steps.rounding import has_bfloat16_units
from side_by_side import Mark, Times, options, publish, take_turns


class Shape(NamedTuple):
    """One training."""

    d_model: int
    num_latents: int
    k: int
    batch_tokens: int


SHAPES = {
    "demo": Shape(128, 1024, 16, 512),
    "paper": Shape(1152, 9216, 64, 2048),
}
LEARNING_RATE = 5e-5


class RandomActivations:
    """Gaussian rows in memory."""

    def __init__(self, num_tokens: int, d_model: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.values = torch.randn(num_tokens, d_model, generator=generator, device=device)
        self.sigma = torch.ones(d_model, device=device)
        self.num_tokens, self.d_model = num_tokens, d_model

    def rows(self, index: torch.Tensor, /) -> torch.Tensor:
        """Tokens by index."""
        return self.values[index.to(self.values.device)]

    def batches(self, batch_tokens: int, /) -> Iterator[torch.Tensor]:
        """All tokens in order."""
        yield from self.values.split(batch_tokens)


def main() -> None:
    """Measure and publish."""
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    given = parser.parse_args()
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    warnings.filterwarnings("ignore")  # of other libraries
    torch.set_num_threads(given.threads)
    times = {name: measure(SHAPES[name], given.rounds) for name in given.shapes}
    publish(
        "sae_step",
        settings={name: SHAPES[name]._asdict() for name in given.shapes},
        results={name: {"milliseconds": times[name]} for name in given.shapes},
        marks=marks(times["paper"]) if "paper" in times else [],
        save=given.save,
    )


def marks(times: dict[str, Times]) -> list[Mark]:
    """What was asked at the paper's shape."""
    precisions = [dtype for dtype in ("bfloat16", "float32") if f"ours {dtype}" in times]
    floor = min(times[f"product {dtype}"].median for dtype in precisions)
    ours = min(times[f"ours {dtype}"].median for dtype in precisions)
    found = [
        Mark(1, "SAE step / encoder product in the faster precision", 2.8, "at most", ours / floor)
    ]
    for name, asked in (("sparsify", 2.7), ("SAELens", 6.0)):
        for dtype in precisions if name in times else ():
            ratio = times[name].median / times[f"ours {dtype}"].median
            found.append(Mark(1, f"{name}'s step / ours in {dtype}", asked, "at least", ratio))
    return found


def measure(shape: Shape, rounds: int) -> dict[str, Times]:
    """Milliseconds of every contender, in turns."""
    data = RandomActivations(4 * shape.batch_tokens, shape.d_model)
    batch = data.values[: shape.batch_tokens]
    contenders: dict[str, Callable[[], object]] = {
        "product float32": encoder_product(shape, batch, torch.float32),
        "ours float32": our_step(shape, data, "float32"),
        "dense autograd": dense_step(shape, batch),
    }
    if has_bfloat16_units():
        contenders |= {
            "product bfloat16": encoder_product(shape, batch, torch.bfloat16),
            "product bfloat16, held": held_product(shape, batch),
            "ours bfloat16": our_step(shape, data, "bfloat16"),
        }
    else:
        print("no bfloat16 units here: bfloat16 is left out, it would take hours", file=sys.stderr)
    if importlib.util.find_spec("sparsify"):
        contenders["sparsify"] = sparsify_step(shape, batch)
    if importlib.util.find_spec("sae_lens"):
        contenders["SAELens"] = saelens_step(shape, batch)
    repeats = max(3, 20_000_000 // (shape.batch_tokens * shape.num_latents))
    return take_turns(contenders, rounds=rounds, repeats=repeats)


def encoder_product(shape: Shape, batch: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """One x @ W_enc^T."""
    weight = torch.randn(shape.d_model, shape.num_latents).to(dtype)
    return lambda: batch.to(dtype) @ weight


def held_product(shape: Shape, batch: torch.Tensor) -> Callable[[], object]:
    """The bfloat16 product and nothing else."""
    x_hat, weight = batch.bfloat16(), torch.randn(shape.d_model, shape.num_latents).bfloat16()
    out = torch.empty(shape.batch_tokens, shape.num_latents, dtype=torch.bfloat16)
    return lambda: torch.mm(x_hat, weight, out=out)


def our_step(shape: Shape, data: RandomActivations, dtype: str) -> Callable[[], object]:
    """One step of train_sae."""
    config = SaeConfig.model_validate(
        {
            "expansion": shape.num_latents // shape.d_model,
            "k": shape.k,
            "batch_tokens": shape.batch_tokens,
            "learning_rate": LEARNING_RATE,
            "dtype": dtype,
        }
    )
    training = Training(data, config, init_seed=0, data_seed=0)
    return lambda: training.advance(training.next_batch())


def dense_step(shape: Shape, batch: torch.Tensor) -> Callable[[], object]:
    """A dense step by autograd and torch.optim.Adam, decoder rows kept at unit norm."""
    sae = TopKSAE.initialise(shape.d_model, shape.num_latents, shape.k, init_seed=0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        pre = torch.relu(batch @ sae.encoder_weight.T + sae.encoder_bias)
        values, indices = pre.topk(shape.k, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values)
        x_rec = z @ sae.decoder_weight + sae.decoder_bias
        loss = (x_rec - batch).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            norms = torch.linalg.vector_norm(sae.decoder_weight, dim=1, keepdim=True)
            sae.decoder_weight.div_(norms)

    return step


def sparsify_step(shape: Shape, batch: torch.Tensor) -> Callable[[], object]:
    """A step of EleutherAI's sparsify: its coder, its decoder normalisation, torch's Adam."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    expansion = shape.num_latents // shape.d_model
    config = SparseCoderConfig(expansion_factor=expansion, k=shape.k)
    return sparsify_training(SparseCoder(shape.d_model, config), batch)


def sparsify_training(coder: Any, batch: torch.Tensor) -> Callable[[], object]:
    """Steps of one of its coders."""
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        optimizer.zero_grad()
        coder(batch).fvu.backward()
        optimizer.step()

    return step


def saelens_step(shape: Shape, batch: torch.Tensor) -> Callable[[], object]:
    """A step of SAELens' TopK SAE, torch's Adam.

    Dense activations: with sparse ones its backward pass does not run on a CPU (6.54.12).
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(
        d_in=shape.d_model, d_sae=shape.num_latents, k=shape.k, use_sparse_activations=False
    )
    sae: Any = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    given = TrainStepInput(
        sae_in=batch,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=1,
        is_logging_step=False,
    )

    def step() -> None:
        loss = sae.training_forward_pass(given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
