"""Whole SAE trainings: what the trainer adds to a step, memory, shared reading, the FVU reached.

usage: python benchmarks/sae_training.py [--threads 2] [--rounds 7] [--steps 1000] [--save]

1. Overhead: `Training.advance` with reading and normalising of its batch from a store on disk,
   against `Descent.step` on the same batches in memory, at the paper's shape and at the demo's; to
   it comes what a training does now and then (restarts, log points, checkpoints), timed and shared
   out.
2. Shared reading: the time of reading one batch, against four SAEs that see the same order.
3. Memory: the most held while training for 50 steps and for 450, on one and on four times as many
   tokens, as bytes per further step and token. The store is mapped, so what the operating system
   caches of it is left out (anonymous memory is what is compared).
4. FVU on activations of the bundled model after `--steps` steps: dense autograd in float32 as the
   paper writes it, ours in float32 and in bfloat16, by torch's operators and by compiled loops,
   from the same start on the same batches.
"""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from prunelens.activations import Activations, capture, statistics
from prunelens.config import ActivationConfig, CorpusConfig, ModelConfig, SaeConfig
from prunelens.corpus import split_tokens, windows
from prunelens.model import load_model, load_tokenizer
from prunelens.sae import SaeRequest, TopKSAE, evaluate_sae, train_sae, train_saes
from prunelens.sae.order import TokenOrder
from prunelens.sae.state import Training
from prunelens.sae.steps import engine
from side_by_side import Mark, options, publish, take_turns

PAPER = {"expansion": 8, "k": 64, "batch_tokens": 2048}
DEMO = {"expansion": 8, "k": 16, "batch_tokens": 512, "learning_rate": 2e-3}
D_MODEL = {"paper": 1152, "demo": 128}
SETTINGS: dict[str, dict[str, Any]] = {"paper": PAPER, "demo": DEMO}


def main() -> None:
    """Measure and publish."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of the trainings compared by FVU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        overhead = {name: trainer_overhead(place, name, given.rounds) for name in SETTINGS}
        shared = shared_reading(place, given.rounds)
        memory = memory_growth(place)
        fvu = final_fvu(place, given.steps)
    dense = fvu["dense autograd float32"]
    publish(
        "sae_training",
        settings={"shapes": SETTINGS, "d_model": D_MODEL, "steps": given.steps},
        results={"overhead": overhead, "shared": shared, "memory_bytes": memory, "fvu": fvu},
        marks=[
            *(
                Mark(1, f"FVU of {name} / of dense float32", 1.01, "at most", found / dense)
                for name, found in fvu.items()
                if found is not dense
            ),
            *(
                Mark(2, f"trainer / its step, {name} shape", 1.05, "at most", found["ratio"])
                for name, found in overhead.items()
            ),
            Mark(2, "batches read / steps, 4 SAEs of one order", 1, "at most", shared["reads"]),
            Mark(2, "bytes held per further step", 1024, "at most", memory["per_step"]),
            Mark(2, "bytes held per further token", 16, "at most", memory["per_token"]),
        ],
        save=given.save,
    )


def trainer_overhead(place: pathlib.Path, name: str, rounds: int) -> dict[str, Any]:
    """Both ways in bfloat16, where a step is shortest."""
    data = random_store(place, 16, SETTINGS[name]["batch_tokens"], D_MODEL[name])
    config = SaeConfig.model_validate({**SETTINGS[name], "steps": 20_000, "dtype": "bfloat16"})
    whole, bare = (Training(data, config, init_seed=0, data_seed=0) for _ in range(2))
    # Both learn from the same batches: what fires, and so what a step costs, changes with that.
    batches = [data.rows(bare.order.batch(step)) for step in range(1, 17)]

    def step() -> None:
        bare.step += 1
        batch = batches[(bare.step - 1) % len(batches)]
        bare.descent.step(batch, rate=config.learning_rate, number=bare.step)

    calls: dict[str, Callable[[], object]] = {
        "trainer": lambda: whole.advance(whole.next_batch()),
        "step": step,
    }
    repeats = 200 if name == "demo" else 3
    times = take_turns(calls, rounds=rounds, repeats=repeats)
    dead = torch.arange(whole.sae.num_latents) % 10 == 0
    rare: dict[str, Callable[[], object]] = {
        "log": lambda: whole.advance(batches[0], log=True),
        "restart": lambda: whole._restart(dead),
        "checkpoint": lambda: whole.save(place / "checkpoint.safetensors"),
    }
    now_and_then = take_turns(rare, rounds=2)
    steps = config.steps
    restarts = range(config.resample_interval, round(0.75 * steps), config.resample_interval)
    checkpoints = range(config.checkpoint_every, steps, config.checkpoint_every)
    shared = (
        100 * (now_and_then["log"].median - times["trainer"].median)
        + len(restarts) * now_and_then["restart"].median
        + len(checkpoints) * now_and_then["checkpoint"].median
    ) / steps
    ratio = (times["trainer"].median + shared) / times["step"].median
    return {"milliseconds": {**times, **now_and_then}, "rare_per_step": shared, "ratio": ratio}


def shared_reading(place: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Four SAEs at once against one after the other, and how often a batch was read."""
    data = CountedReads(random_store(place, 16, PAPER["batch_tokens"], D_MODEL["paper"]))
    order = TokenOrder(data.num_tokens, PAPER["batch_tokens"], data_seed=0)
    read = take_turns({"read": lambda: data.rows(order.batch(1))}, rounds=rounds)["read"]
    config = SaeConfig.model_validate({**PAPER, "expansion": 1, "steps": 10})
    data.reads = 0
    train_saes(data, [SaeRequest(config, seed, 0) for seed in range(4)])
    return {"read_milliseconds": read.median, "reads": data.reads / config.steps}


class CountedReads:
    """Activations that count how many batches were read."""

    def __init__(self, data: Activations) -> None:
        self._data, self.reads = data, 0
        self.num_tokens, self.d_model, self.sigma = data.num_tokens, data.d_model, data.sigma
        self.batches = data.batches

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Tokens by index."""
        self.reads += len(index) > 1
        return self._data.rows(index)


def memory_growth(place: pathlib.Path) -> dict[str, float]:
    """The most anonymous memory while training; the first training is not counted."""
    config = SaeConfig.model_validate({**PAPER, "k": 32, "batch_tokens": 512, "steps": 450})
    width = 256
    held = {}
    for label, batches, steps in (
        ("warm", 16, 50),
        ("short", 16, 50),
        ("long", 16, 450),
        ("many tokens", 64, 50),
    ):
        data = random_store(place, batches, 2048, width)
        peak = 0.0

        def look(_step: int) -> None:
            nonlocal peak
            memory = psutil.Process().memory_info()
            peak = max(peak, memory.rss - memory.shared)

        shorter = config.model_copy(update={"steps": steps})
        train_sae(data, shorter, init_seed=0, data_seed=0, progress=look)
        held[label] = peak
    return {
        **held,
        "per_step": (held["long"] - held["short"]) / 400,
        "per_token": (held["many tokens"] - held["short"]) / (48 * 2048),
    }


def final_fvu(place: pathlib.Path, steps: int) -> dict[str, float]:
    """FVU on held-out activations of the bundled model, after block 2."""
    train, evaluation = bundled_activations(place)
    found = {}
    usual = engine.COMPILED_FROM
    for loops, compiled_from in (("", math.inf), (" in compiled loops", 0.0)):
        for dtype in ("float32", "bfloat16"):
            config = SaeConfig.model_validate(
                {**DEMO, "steps": steps, "resample_every": steps, "dtype": dtype}
            )
            engine.COMPILED_FROM = compiled_from
            trained = train_sae(train, config, init_seed=0, data_seed=0)
            found[dtype + loops] = evaluate_sae(trained.sae, evaluation, dense_variance=1.0).fvu
    engine.COMPILED_FROM = usual
    dense = train_densely(train, config)
    found["dense autograd float32"] = evaluate_sae(dense, evaluation, dense_variance=1.0).fvu
    return found


def train_densely(data: Activations, config: SaeConfig) -> TopKSAE:
    """Autograd through dense latents and torch.optim.Adam; no restarts."""
    sae = TopKSAE.initialise(data.d_model, config.expansion * data.d_model, config.k, init_seed=0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    order = TokenOrder(data.num_tokens, config.batch_tokens, data_seed=0)
    for step in range(1, config.steps + 1):
        rate = config.learning_rate * (1 + math.cos(math.pi * (step - 1) / config.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        x_hat = data.rows(order.batch(step))
        pre = torch.relu(x_hat @ sae.encoder_weight.T + sae.encoder_bias)
        values, indices = pre.topk(config.k)
        z = torch.zeros_like(pre).scatter(1, indices, values)
        loss = (z @ sae.decoder_weight + sae.decoder_bias - x_hat).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            rows = sae.decoder_weight
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return sae


def bundled_activations(place: pathlib.Path) -> tuple[Activations, Activations]:
    """100,000 tokens to train on and 30,000 to judge on, captured as a study does."""
    lm = load_model("bundled")
    corpus = CorpusConfig(train_tokens=100_000, eval_tokens=30_000, calibration_tokens=1_000)
    splits = split_tokens(corpus, load_tokenizer(ModelConfig(name="bundled", layers=(2,))))
    paths = {}
    for name, stream in (("train", splits.train), ("eval", splits.eval_first)):
        paths[name] = place / f"bundled-{name}.safetensors"
        batch = windows(stream, corpus.context_tokens, splits.bos_token)
        capture(lm, batch, paths[name], site="resid_post", layer=2, config=ActivationConfig())
    scale = statistics(Activations(paths["train"]), num_tokens=50_000)
    train, evaluation = (Activations(path, statistics=scale) for path in paths.values())
    return train, evaluation


def random_store(
    place: pathlib.Path, num_batches: int, batch_tokens: int, d_model: int
) -> Activations:
    """A store of Gaussian rows in bfloat16 on disk."""
    generator = torch.Generator().manual_seed(0)
    path = place / f"{num_batches}x{batch_tokens}x{d_model}.safetensors"
    rows = torch.randn(num_batches * batch_tokens, d_model, generator=generator)
    save_file({"activations": rows.bfloat16()}, path)
    return Activations(path, statistics=statistics(Activations(path), num_tokens=10_000))


if __name__ == "__main__":
    main()
