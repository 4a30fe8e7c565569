"""The planted world's stages: its activations in the place of a model's."""

from __future__ import annotations

import pathlib

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from prunelens import planted
from prunelens.concepts import Labels
from prunelens.study.kind import StageKind
from prunelens.study.work import Work, write_json

TOKEN_SEEDS = {"train": 1, "eval": 2}  # the same for every condition: its tokens are paired
NUM_CONCEPTS = 64
CONCEPT = "direction"  # and its number: what a concept is called
PRUNED_NOISE = 1000  # added to a noise seed under pruning: the noise is each condition's own


def _world(work: Work) -> None:
    world, truth = planted.pruned_world(planted.dense_world(), work.config["choice"])
    save_file(
        {name: part.contiguous() for name, part in world._asdict().items()},
        work.out / "world.safetensors",
    )
    known = {"fate": truth.fates, "angle": truth.angles.numpy(), "share": truth.shares.numpy()}
    pd.DataFrame(known).to_parquet(work.out / "truth.parquet")
    write_json(work.out / "choice.json", work.config["choice"])


def _activations(work: Work) -> None:
    world, noise = planted.dense_world(), 0
    if "prune" in work.parents:
        world, noise = load_world(work.parents["prune"]), PRUNED_NOISE
    for split, seed in TOKEN_SEEDS.items():
        rows = planted.world_activations(
            world, work.config[f"{split}_tokens"], tokens_seed=seed, noise_seed=noise + seed
        )
        save_file({"activations": rows}, work.out / f"{split}.safetensors")
        norms = torch.linalg.vector_norm(rows, dim=1)
        save_file({"norms": norms}, work.out / f"{split}_norms.safetensors")
        work.progress(0.5)
    documents = planted.document_of(work.config["eval_tokens"])
    first_half = int((documents < (int(documents[-1]) + 1) // 2).sum())
    write_json(work.out / "rows.json", {"eval_first_rows": first_half})
    save_file({"documents": documents.int()}, work.out / "eval_documents.safetensors")


def _labels(work: Work) -> None:
    """A concept is a direction: some of them, from rare to frequent."""
    world = planted.dense_world()
    by_rate = world.firing_rates.argsort()
    chosen = by_rate[torch.linspace(0, len(by_rate) - 1, NUM_CONCEPTS).round().long()].sort().values
    fires = planted.firings(world, work.config["eval_tokens"], tokens_seed=TOKEN_SEEDS["eval"])[
        :, chosen
    ]
    names = [f"{CONCEPT} {number}" for number in chosen.tolist()]
    Labels(names, fires.T.numpy(), np.ones(len(fires), dtype=bool)).save(work.out)


def load_world(folder: pathlib.Path) -> planted.World:
    """The world that a stage `planted_world` has made."""
    return planted.World(**load_file(folder / "world.safetensors"))


PLANTED_STAGES = (
    StageKind("planted_world", 2, _world),
    StageKind("planted_activations", 3, _activations),
    StageKind("planted_labels", 1, _labels),
)
