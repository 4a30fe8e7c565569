"""The planted world's stages: its activations in the place of a model's, and the grades."""

from __future__ import annotations

import pathlib

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens import planted
from prunelens.activations import Statistics
from prunelens.analyses.coverage import coverage
from prunelens.analyses.grades import (
    grades,
    latent_truth,
    null_grades,
    undertrained_grades,
)
from prunelens.match import match_dictionaries
from prunelens.sae.topk import TopKSAE
from prunelens.study.arm_stages import CONDITIONS
from prunelens.study.kind import StageKind
from prunelens.study.sae_stages import decoders_by_step
from prunelens.study.work import Work, read_json, write_json

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
        world, noise = _load_world(work.parents["prune"]), PRUNED_NOISE
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


def _grades(work: Work) -> None:
    """Every measure of the run, and what a shared start feigns while SAEs are hardly trained."""
    truth = _Truth(work.parents["world"])
    saes = _plain_saes(work)
    known = [truth.of(saes["dense", seed]).assign(seed=seed) for seed in work.config["seeds"]]
    fates = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    fates = fates.merge(pd.concat(known), on=["seed", "latent"], validate="one_to_one")
    found = grades(fates, choice=truth.choice)
    if early := [_early_matches(saes, truth, seed) for seed in work.config["seeds"]]:
        found = pd.concat([found, undertrained_grades(pd.concat(early))], ignore_index=True)
    fates.to_parquet(work.out / "fates.parquet")
    found.to_parquet(work.out / "grades.parquet")
    null_grades(fates, choice=truth.choice).to_parquet(work.out / "null.parquet")


def _coverage(work: Work) -> None:
    """What intervals and verdicts are worth."""
    sets = work.config["sets"]
    coverage(work.config["world"], sets, progress=work.share(sets)).to_parquet(
        work.out / "coverage.parquet"
    )


def _early_matches(
    saes: dict[tuple[str, int], pathlib.Path], truth: _Truth, seed: int
) -> pd.DataFrame:
    """Matches of the shared-init arm at every step that both SAEs were looked at."""
    dense, pruned = (decoders_by_step(saes[condition, seed]) for condition in CONDITIONS)
    tables = [pd.DataFrame(columns=["step", "cosine", "mutual", "fate"])]
    for step in sorted(dense.keys() & pruned.keys()):
        matches = match_dictionaries(dense[step], pruned[step])
        known = truth.of(saes["dense", seed], decoder=dense[step])
        found = {"cosine": matches.similarity_a, "mutual": matches.mutual, "fate": known["fate"]}
        tables.append(pd.DataFrame({"step": step, **found}))
    return pd.concat(tables[1:] or tables)


class _Truth:
    """What is known of a pruned world."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._before, self._after = planted.dense_world(), _load_world(folder)
        known = pd.read_parquet(folder / "truth.parquet")
        angles, shares = (torch.tensor(known[name].to_numpy()) for name in ("angle", "share"))
        self._truth = planted.Truth(list(known["fate"]), angles, shares)
        self.choice: planted.Choice = read_json(folder / "choice.json")

    def of(self, sae: pathlib.Path, *, decoder: Tensor | None = None) -> pd.DataFrame:
        """The fate of every latent of a dense SAE, or of a decoder from earlier in its training."""
        if decoder is None:
            decoder = TopKSAE.load(sae).decoder_weight.detach()
        sigma = Statistics.load(sae / "normalisation.safetensors").sigma
        return latent_truth(decoder, sigma, self._before, self._after, self._truth)


def _plain_saes(work: Work) -> dict[tuple[str, int], pathlib.Path]:
    """(condition, seed) -> folder."""
    return {
        (condition, sae.init_seed): folder
        for condition in CONDITIONS
        for sae, folder in work.saes(condition).items()
    }


def _load_world(folder: pathlib.Path) -> planted.World:
    return planted.World(**load_file(folder / "world.safetensors"))


PLANTED_STAGES = (
    StageKind("planted_world", 2, _world),
    StageKind("planted_activations", 3, _activations),
    StageKind("grades", 2, _grades),
    StageKind("coverage", 1, _coverage),
)
