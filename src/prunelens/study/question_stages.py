"""Stages that answer questions from SAEs and activations that are already there."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pandas as pd
from safetensors.torch import load_file

from prunelens.activations import Activations, Statistics
from prunelens.analyses.fates import latent_fates
from prunelens.analyses.fragility import fragility_tests, quintiles, quintiles_by_seed
from prunelens.analyses.persistence import persistence, persistence_summary
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.stability import seed_stability
from prunelens.analyses.survival import (
    Dictionary,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)
from prunelens.sae.topk import TopKSAE
from prunelens.study.work import Work, read_json, write_json


def _stability(work: Work) -> None:
    decoders = {
        int(role.removeprefix("sae-")): TopKSAE.load(folder).decoder_weight.detach()
        for role, folder in work.parents.items()
    }
    seed_stability(decoders, work.config["taus"]).to_parquet(work.out / "stability.parquet")


def _survival(work: Work) -> None:
    by_kind: dict[str, list[Dictionary]] = {}
    for role, folder in work.parents.items():
        condition, init_seed, data_seed, *rotated = role.split("-")
        kind = rotated[0] if rotated else "same" if init_seed == data_seed else "reordered"
        by_kind.setdefault(f"{condition}-{kind}", []).append(
            _dictionary(folder, int(init_seed), int(data_seed))
        )
    dense = by_kind["dense-same"]
    if "pruned-same" in by_kind:
        comparisons = pruned_arms(dense, by_kind["pruned-same"], by_kind["pruned-reordered"])
    else:
        comparisons = control_arms(
            dense,
            by_kind["dense-reordered"],
            by_kind["dense-rotated"],
            [_untrained(dictionary) for dictionary in dense],
        )
    result = survival(comparisons, work.config["taus"])
    result.rates.to_parquet(work.out / "survival.parquet")
    result.latents.to_parquet(work.out / "latents.parquet")


def _corrected(work: Work) -> None:
    tables = [
        pd.read_parquet(work.parents[role] / "survival.parquet")
        for role in ("survival", "controls")
    ]
    corrected_survival(*tables).to_parquet(work.out / "corrected.parquet")


def _persistence(work: Work) -> None:
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    dense_statistics = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    dense, pruned = (
        Activations(
            work.parents[role] / "eval.safetensors",
            kept=kept,
            statistics=dense_statistics,
            device=work.device,
        )
        for role in ("dense", "pruned")
    )
    first_half = read_json(work.parents["dense"] / "rows.json")["eval_first_rows"]
    tokens = (kept >= first_half).nonzero().squeeze(1)
    seeds = {
        role: int(role.removeprefix("sae-")) for role in work.parents if role.startswith("sae-")
    }
    total = len(tokens) * len(seeds)
    latents, summaries = [], []
    for number, (role, seed) in enumerate(seeds.items()):
        sae = TopKSAE.load(work.parents[role]).to(work.device)
        progress = work.share(total, before=number * len(tokens))
        table = persistence(sae, dense, pruned, tokens, seed=seed, progress=progress)
        latents.append(table.assign(seed=seed))
        summaries.append(persistence_summary(table).assign(seed=seed))
    pd.concat(latents, ignore_index=True).to_parquet(work.out / "latents.parquet")
    pd.concat(summaries, ignore_index=True).to_parquet(work.out / "persistence.parquet")


def _fates(work: Work) -> None:
    dense = {
        int(role.split("-")[1]): pd.read_parquet(folder / "latents.parquet")
        for role, folder in work.parents.items()
        if role.startswith("sae-")
    }
    matches = pd.read_parquet(work.parents["survival"] / "latents.parquet")
    kept = None
    if "persistence" in work.parents:
        kept = pd.read_parquet(work.parents["persistence"] / "latents.parquet")
    found = latent_fates(dense, matches, kept, work.config["seeds"])
    found.to_parquet(work.out / "fates.parquet")


def _fragility(work: Work) -> None:
    found = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    taus = work.config["taus"]
    quintiles(found, taus).to_parquet(work.out / "quintiles.parquet")
    quintiles_by_seed(found, taus).to_parquet(work.out / "by_seed.parquet")
    fragility_tests(found, taus).to_parquet(work.out / "tests.parquet")


def _predictor(work: Work) -> None:
    parts = []
    for name, folder in work.parents.items():
        facts = work.config["runs"][name]
        rows = pd.read_parquet(folder / "fates.parquet")
        rows = rows[rows["alive"]]
        parts.append(rows.assign(**facts, condition=name))
    found = fit_predictor(pd.concat(parts, ignore_index=True), work.config["taus"])
    found.table.to_parquet(work.out / "predictor.parquet")
    found.calibration.to_parquet(work.out / "calibration.parquet")
    write_json(work.out / "models.json", found.models)


QUESTION_STAGES: dict[str, Callable[[Work], None]] = {
    "stability": _stability,
    "survival": _survival,
    "corrected": _corrected,
    "persistence": _persistence,
    "fates": _fates,
    "fragility": _fragility,
    "predictor": _predictor,
}


def _dictionary(folder: pathlib.Path, init_seed: int, data_seed: int) -> Dictionary:
    decoder = TopKSAE.load(folder).decoder_weight.detach()
    sigma = Statistics.load(folder / "normalisation.safetensors").sigma
    return Dictionary(decoder, sigma, init_seed, data_seed)


def _untrained(trained: Dictionary) -> Dictionary:
    """The dictionary that this one was at step 0."""
    num_latents, d_model = trained.decoder.shape
    sae = TopKSAE.initialise(d_model, num_latents, 1, init_seed=trained.init_seed)
    return trained._replace(decoder=sae.decoder_weight.detach())
