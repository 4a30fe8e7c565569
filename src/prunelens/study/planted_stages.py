"""The planted world's stages: its activations in the place of a model's."""

from __future__ import annotations

import pathlib

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from prunelens import planted
from prunelens.study.kind import StageKind
from prunelens.study.work import Work, write_json

TOKEN_SEEDS = {"train": 1, "eval": 2}  # the same for every condition: its tokens are paired
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


def load_world(folder: pathlib.Path) -> planted.World:
    """The world that a stage `planted_world` has made."""
    return planted.World(**load_file(folder / "world.safetensors"))


PLANTED_STAGES = (
    StageKind("planted_world", 2, _world),
    StageKind("planted_activations", 3, _activations),
)
