"""Time ablations through the blocks above the site against one whole forward pass per latent.

usage: python benchmarks/ablation.py [--latents 200] [--prompts 64] [--timed 4] [--threads 2]
       [--rounds 3] [--device cpu] [--save]

A random Llama and a random SAE whose ablated latents fire on 1 to 5 % of the tokens. `paper` is the
KL at the prompt's end, `single position` the KL where the latent fires, one place per prompt. What
takes long is timed on a few latents and given per latent: `paper` on `--timed` of them, the whole
pass on one; `single position` on all.
"""

from __future__ import annotations

from collections.abc import Callable
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
from prunelens.model import LanguageModel, as_language_model, forward_tokens, site_module
from prunelens.sae import TopKSAE
from prunelens.upper_blocks import UpperBlocks
from side_by_side import Mark, Times, options, publish, take_turns

NUM_BLOCKS, LAYER, D_MODEL, VOCABULARY, CONTEXT = 16, 7, 512, 8192, 256
NUM_LATENTS, K = 2048, 64
SINGLE, PAPER, WHOLE = "single position", "paper", "whole pass"


class Setting(NamedTuple):
    """What both ways work on."""

    lm: LanguageModel
    tokens: Tensor
    scene: Scene


def main() -> None:
    """Measure, check, publish."""
    parser = options(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--latents", type=int, default=200, help="latents of `single position`")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--timed", type=int, default=4, help="latents of `paper`")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with torch.no_grad():
        setting = prepare(chosen.latents, chosen.prompts, chosen.device)
        compare(setting, timed=chosen.timed, rounds=chosen.rounds, save=chosen.save)


def prepare(num_latents: int, num_prompts: int, device: str) -> Setting:
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
    tokens = torch.randint(VOCABULARY, (num_prompts, CONTEXT))
    upper = UpperBlocks(lm, tokens, site="resid_post", layer=LAYER)
    rows = upper.states.flatten(0, 1).float()
    sae = TopKSAE.initialise(D_MODEL, NUM_LATENTS, K, init_seed=0).to(device)
    scale = Statistics(rows.mean(0), rows.std(0))
    counts = torch.zeros(NUM_LATENTS, device=device)
    for part in rows.split(forward_tokens(lm.device.type)):
        found = sae.encode((part - scale.mean) / scale.sigma)
        counts += torch.bincount(found.indices[found.values > 0], minlength=NUM_LATENTS)
    rate = counts / len(rows)
    chosen = ((rate > 0.01) & (rate < 0.05)).nonzero().flatten()[:num_latents]
    columns = [("latent", int(latent)) for latent in chosen]
    return Setting(lm, tokens, make_scene(upper, sae, scale, columns, skip_first=0, seed=0))


def compare(setting: Setting, *, timed: int, rounds: int, save: bool) -> None:
    """Time all ways in turn and publish."""
    scene = setting.scene
    num_latents = scene.z.shape[2]
    single = one_place_per_prompt(scene)
    paper = where_it_matters(scene.z[:, :, :timed])
    check(setting, paper)
    ways: dict[str, Callable[[], object]] = {
        SINGLE: lambda: ablated(scene, single),
        PAPER: lambda: ablated(scene, paper),
        WHOLE: lambda: whole_pass(setting, 0),
    }
    times = take_turns(ways, rounds=rounds, device=str(setting.lm.device))
    per_latent = {
        SINGLE: _divided(times[SINGLE], num_latents),
        PAPER: _divided(times[PAPER], timed),
        WHOLE: times[WHOLE],
    }
    ours = (NUM_BLOCKS - LAYER - 1) * paper.num_positions / timed
    allowed = NUM_BLOCKS * setting.tokens.numel() / ours
    faster = {name: times[WHOLE].median / per_latent[name].median for name in (SINGLE, PAPER)}
    firing = (scene.z > 0).double().mean((0, 1))
    publish(
        "ablation",
        settings={
            "prompts": len(setting.tokens),
            "context": CONTEXT,
            "blocks": NUM_BLOCKS,
            "blocks_above": NUM_BLOCKS - LAYER - 1,
            "d_model": D_MODEL,
            "tokens_per_pass": forward_tokens(setting.lm.device.type),
            "latents": {SINGLE: num_latents, PAPER: timed, WHOLE: 1},
            "firing_rates": [float(firing.min()), float(firing.max())],
            "device": str(setting.lm.device),
        },
        results={
            "milliseconds_per_latent": per_latent,
            "faster": faster,
            "paper_allowed_by_its_count": allowed,
        },
        marks=[
            Mark(
                8,
                "ablations read at one position, against a whole pass per latent",
                20.0,
                "at least",
                faster[SINGLE],
            ),
            Mark(
                8,
                "ablations read at the prompt's end, of what blocks x positions allow",
                0.6,
                "at least",
                faster[PAPER] / allowed,
            ),
        ],
        save=save,
    )


def ablated(scene: Scene, items: Items) -> Tensor:
    """KL from the SAE's reconstruction, of every item."""
    done = Progress(items.num_positions, None)
    return measure(scene, items, scene.replaced, [scene.replaced], done)[0]


def whole_pass(setting: Setting, column: int) -> Tensor:
    """One latent by whole passes over all prompts, as a first version would be; KL at the end."""
    scene, lm = setting.scene, setting.lm
    without = scene.replaced.states - scene.z[:, :, column, None] * scene.directions[column]
    num_prompts = len(setting.tokens)
    last = torch.full((num_prompts,), CONTEXT - 1)
    own = scene.upper.logits_at(scene.replaced.kept, torch.arange(num_prompts), last)
    scores = []
    for rows in torch.arange(num_prompts).split(forward_tokens(lm.device.type) // CONTEXT):
        hook = site_module(lm, "resid_post", LAYER).register_forward_hook(
            lambda *_, rows=rows: without[rows.to(without.device)]
        )
        tokens = setting.tokens[rows].to(lm.device)
        scores.append(lm.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1])
        hook.remove()
    return divergence(own, torch.cat(scores))


def check(setting: Setting, items: Items) -> None:
    """Both ways give the same divergences of the first latent."""
    first = Items(*(field[items.columns == 0] for field in items))
    ours, whole = ablated(setting.scene, first), whole_pass(setting, 0)[first.prompts]
    torch.testing.assert_close(ours, whole, rtol=1e-2, atol=float(whole.mean()) * 1e-3)


def one_place_per_prompt(scene: Scene) -> Items:
    """For every latent and prompt the middle one of the places where it fires."""
    places = []
    for prompt, column in (scene.z > 0).any(1).nonzero().tolist():
        positions = (scene.z[prompt, :, column] > 0).nonzero().flatten()
        places.append((column, prompt, int(positions[len(positions) // 2])))
    columns, prompts, positions = torch.tensor(places).unbind(1)
    return Items(columns, prompts, positions, positions)


def _divided(times: Times, number: int) -> Times:
    return Times(round(times.median / number, 3), round(times.least / number, 3), times.rounds)


if __name__ == "__main__":
    main()
