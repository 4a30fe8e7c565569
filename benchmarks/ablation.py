"""Time ablations through the blocks above the site against one whole forward pass per latent.

usage: python benchmarks/ablation.py [--threads 2] [--rounds 3] [--latents 32] [--device cpu]

A random Llama and a random SAE whose ablated latents fire on 1 to 5 % of the tokens. Both ways are
timed in turn in one process, per latent, so that a busy machine slows both alike. Read the ratios:
`single position` should be at least 20, `of what its count allows` (how much of the saving in
blocks x positions arrives as saving in time) at least 0.6.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.analyses.ablation import (
    Items,
    Progress,
    Scene,
    divergence,
    make_scene,
    measure,
    where_it_matters,
)
from prunelens.model import LanguageModel, as_language_model, site_module
from prunelens.sae import TopKSAE
from prunelens.upper_blocks import UpperBlocks

NUM_BLOCKS, LAYER, D_MODEL, VOCABULARY = 16, 7, 512, 8192
PROMPTS, CONTEXT = 8, 256
NUM_LATENTS, K = 2048, 64


class Setting(NamedTuple):
    """What both ways work on."""

    lm: LanguageModel
    tokens: Tensor
    scene: Scene


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        started = time.perf_counter()
        setting = prepare(options.latents, options.device)
        print(f"prepared (both baselines) in {time.perf_counter() - started:.1f} s")
        fires = (setting.scene.z > 0).double().mean((0, 1))
        print(
            f"{options.latents} latents on {100 * fires.min():.1f} to {100 * fires.max():.1f} % of"
            f" {PROMPTS} x {CONTEXT} tokens; {NUM_BLOCKS - LAYER - 1} of {NUM_BLOCKS} blocks above"
        )
        compare(setting, options.rounds)


def prepare(num_latents: int, device: str) -> Setting:
    """A random model and SAE; of the SAE the first latents that fire on 1 to 5 % of the tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=1408,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    lm = as_language_model(model, label="random-llama")
    tokens = torch.randint(VOCABULARY, (PROMPTS, CONTEXT))
    upper = UpperBlocks(lm, tokens, site="resid_post", layer=LAYER)
    rows = upper.states.flatten(0, 1).float()
    sae = TopKSAE.initialise(D_MODEL, NUM_LATENTS, K, init_seed=0).to(device)
    scale = Statistics(rows.mean(0), rows.std(0))
    found = sae.encode((rows - scale.mean) / scale.sigma)
    rate = torch.bincount(found.indices[found.values > 0], minlength=NUM_LATENTS) / len(rows)
    chosen = ((rate > 0.01) & (rate < 0.05)).nonzero().flatten()[:num_latents]
    columns = [("latent", int(latent)) for latent in chosen]
    return Setting(lm, tokens, make_scene(upper, sae, scale, columns, skip_first=0, seed=0))


def compare(setting: Setting, rounds: int) -> None:
    """Rounds of each way in turn; prints milliseconds per latent and their ratios."""
    scene = setting.scene
    num_latents = scene.z.shape[2]
    final = where_it_matters(scene.z)
    single = one_place_per_prompt(scene)
    times: dict[str, list[float]] = {"paper": [], "single position": [], "whole pass": []}
    for turn in range(rounds):
        for name, items in (("paper", final), ("single position", single)):
            references = [scene.original, scene.replaced] if name == "paper" else [scene.replaced]
            started = clock(setting)
            measure(scene, items, scene.replaced, references, Progress(items.num_positions, None))
            times[name].append((clock(setting) - started) / num_latents)
        started = clock(setting)
        whole_passes(setting, turn)
        times["whole pass"].append((clock(setting) - started) / 2)
    milliseconds = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    for name, value in milliseconds.items():
        print(f"{name:16} {value:10.2f} ms per latent")
    whole = NUM_BLOCKS * CONTEXT * PROMPTS
    ours = (NUM_BLOCKS - LAYER - 1) * final.num_positions / num_latents
    allowed = whole / ours
    faster = milliseconds["whole pass"] / milliseconds["paper"]
    print(f"blocks x positions: whole pass {whole}, ours {ours:.0f}, allowed {allowed:.2f} x")
    print(f"paper           {faster:.2f} x, {faster / allowed:.2f} of what its count allows")
    print(f"single position {milliseconds['whole pass'] / milliseconds['single position']:.1f} x")


def whole_passes(setting: Setting, turn: int) -> None:
    """Two latents, each by a whole pass over all prompts at once, as a first version would be."""
    scene = setting.scene
    module = site_module(setting.lm, "resid_post", LAYER)
    tokens = setting.tokens.to(setting.lm.device)
    own = scene.upper.logits_at(
        scene.original.kept, torch.arange(PROMPTS), torch.full((PROMPTS,), CONTEXT - 1)
    )
    for column in (2 * turn, 2 * turn + 1):
        without = scene.replaced.states - scene.z[:, :, column, None] * scene.directions[column]
        hook = module.register_forward_hook(lambda *_, new=without: new)
        scores = setting.lm.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        hook.remove()
        divergence(own, scores)


def one_place_per_prompt(scene: Scene) -> Items:
    """For every latent and prompt the middle one of the places where it fires."""
    places = []
    for prompt, column in (scene.z > 0).any(1).nonzero().tolist():
        positions = (scene.z[prompt, :, column] > 0).nonzero().flatten()
        places.append((column, prompt, int(positions[len(positions) // 2])))
    columns, prompts, positions = torch.tensor(places).unbind(1)
    return Items(columns, prompts, positions, positions)


def clock(setting: Setting) -> float:
    """Seconds, once everything asked of the device is done."""
    if setting.lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
