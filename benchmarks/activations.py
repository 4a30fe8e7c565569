"""Time the capture of activations against a whole forward pass with a hook, and its writing.

usage: python benchmarks/activations.py [--threads 2] [--rounds 7] [--device cpu] [--save]

A random Llama of 16 blocks. A user of hooks runs the whole model, head and all; prunelens stops at
the site, serves several layers with one pass and streams to disk. Memory is watched while some
text goes through, and then four times as much.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import prunelens.activations
from prunelens.activations import capture
from prunelens.config import ActivationConfig, Site
from prunelens.model import (
    LanguageModel,
    as_language_model,
    forward_tokens,
    run_to_site,
    run_to_sites,
    site_module,
)
from side_by_side import Mark, options, peak_memory, publish, take_turns

NUM_BLOCKS, D_MODEL, VOCABULARY, CONTEXT = 16, 512, 8192, 256
SITE: Site = "resid_post"
LAYER = 7  # counted from 0: half of the blocks
LAYERS = (3, 7, 11)
MEASURED_WINDOWS = 128  # for memory, where the pass itself does not matter: one thin block


def main() -> None:
    """Measure, check, publish."""
    chosen = options(__doc__).parse_args()
    torch.set_num_threads(chosen.threads)
    lm = random_llama(chosen.device)
    windows = torch.randint(VOCABULARY, (forward_tokens(lm.device.type) // CONTEXT, CONTEXT))
    check(lm, windows)
    states = run_to_site(lm, windows, SITE, LAYER)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "store.safetensors"
        times = take_turns(
            {
                "to the site": lambda: run_to_site(lm, windows, SITE, LAYER),
                "writing": lambda: written(lm, windows, path, states),
                "hook, whole model": lambda: hooked(lm, windows, LAYER, head=True),
                "hook, no head": lambda: hooked(lm, windows, LAYER, head=False),
                "three layers at once": lambda: run_to_sites(
                    lm, windows, [(SITE, layer) for layer in LAYERS]
                ),
                "three layers, a pass each": lambda: [
                    run_to_site(lm, windows, SITE, layer) for layer in LAYERS
                ],
            },
            rounds=chosen.rounds,
            device=chosen.device,
        )
        memory = peaks(random_llama(chosen.device, num_blocks=1, mlp_width=64), path)
    further = 3 * MEASURED_WINDOWS * CONTEXT * D_MODEL * 4 / 2**20  # MiB, in float32
    ratios = {
        "faster than the whole model": _ratio(times, "hook, whole model", "to the site"),
        "faster than all blocks": _ratio(times, "hook, no head", "to the site"),
        "three layers, faster": _ratio(times, "three layers, a pass each", "three layers at once"),
        "writing, of the pass": _ratio(times, "writing", "to the site"),
        "memory for further text, of what is written": (memory["4 N"] - memory["N"]) / further,
    }
    allowed = NUM_BLOCKS / (LAYER + 1)
    blocks = sum(layer + 1 for layer in LAYERS) / (max(LAYERS) + 1)
    publish(
        "activations",
        settings={
            "blocks": NUM_BLOCKS,
            "blocks_run": LAYER + 1,
            "layers_at_once": LAYERS,
            "d_model": D_MODEL,
            "vocabulary": VOCABULARY,
            "tokens_per_pass": windows.numel(),
            "tokens_for_memory": MEASURED_WINDOWS * CONTEXT,
            "device": chosen.device,
        },
        results={"milliseconds": times, "peak_mebibytes": memory, "ratios": ratios},
        marks=[
            _at_least(
                "activations up to the site, against the whole model with a hook,"
                " of blocks / blocks run",
                ratios["faster than the whole model"] / allowed,
            ),
            _at_least(
                "the same against all blocks without the head",
                ratios["faster than all blocks"] / allowed,
            ),
            _at_least(
                "three layers in one pass against a pass each, of the blocks saved",
                ratios["three layers, faster"] / blocks,
            ),
            Mark(
                3, "writing, as a share of the pass", 0.1, "at most", ratios["writing, of the pass"]
            ),
            Mark(
                3,
                "memory for further text, as a share of what is written",
                0.05,
                "at most",
                ratios["memory for further text, of what is written"],
            ),
        ],
        save=chosen.save,
    )


def random_llama(
    device: str, *, num_blocks: int = NUM_BLOCKS, mlp_width: int = 1408
) -> LanguageModel:
    """A model with random weights, the same every time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=mlp_width,
        num_hidden_layers=num_blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    return as_language_model(model, label="random-llama")


@torch.no_grad()
def hooked(lm: LanguageModel, windows: Tensor, layer: int, *, head: bool) -> Tensor:
    """The activations as a user of hooks gets them: from a pass through everything."""
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = site_module(lm, SITE, layer).register_forward_hook(keep)
    model = lm.model if head else lm.model.get_decoder()
    model(input_ids=windows.to(lm.device), use_cache=False)
    handle.remove()
    return found[0]


def store(lm: LanguageModel, windows: Tensor, path: pathlib.Path, layer: int) -> None:
    """As a study does it: up to the site, checked, on disk, flushed."""
    capture(lm, windows, path, site=SITE, layer=layer, config=ActivationConfig())


def written(lm: LanguageModel, windows: Tensor, path: pathlib.Path, states: Tensor) -> None:
    """What `store` does besides the pass, whose result is given."""
    with mock.patch.object(prunelens.activations, "run_to_sites", return_value=[states]):
        store(lm, windows, path, LAYER)


def check(lm: LanguageModel, windows: Tensor) -> None:
    """All ways give the same numbers, bit for bit."""
    together = run_to_sites(lm, windows, [(SITE, layer) for layer in LAYERS])
    for layer, states in zip(LAYERS, together, strict=True):
        assert torch.equal(states, hooked(lm, windows, layer, head=True)), layer
        assert torch.equal(states, hooked(lm, windows, layer, head=False)), layer
        assert torch.equal(states, run_to_site(lm, windows, SITE, layer)), layer


def peaks(lm: LanguageModel, path: pathlib.Path) -> dict[str, float]:
    """Mebibytes held beyond what a first pass leaves, for N and 4 N tokens, and on disk for 4 N."""
    windows = torch.randint(VOCABULARY, (4 * MEASURED_WINDOWS, CONTEXT))
    store(lm, windows[:MEASURED_WINDOWS], path, 0)  # what is kept for good is not counted
    found = {}
    for name, part in (("N", windows[:MEASURED_WINDOWS]), ("4 N", windows)):
        with peak_memory() as peak:
            store(lm, part, path, 0)
        found[name] = peak() / 2**20
    return found | {"store of 4 N": path.stat().st_size / 2**20}


def _ratio(times: Any, slower: str, faster: str) -> float:
    return times[slower].median / times[faster].median


def _at_least(what: str, measured: float) -> Mark:
    return Mark(3, what, 0.9, "at least", measured)


if __name__ == "__main__":
    main()
