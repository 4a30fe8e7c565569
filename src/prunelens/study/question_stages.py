"""Stages that answer questions from SAEs and activations that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.fates import latent_fates
from prunelens.analyses.fragility import (
    fragility_contrasts,
    fragility_tests,
    quintiles,
    quintiles_by_seed,
)
from prunelens.analyses.noise import (
    KINDS,
    CommonChange,
    common_change_table,
    fit_common_change,
)
from prunelens.analyses.persistence import DRAWS, persistence, persistence_summary
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.scaling import SOURCES, latent_scaling, scaling_summary
from prunelens.analyses.sinks import MOVED, NORM_MULTIPLE, only_compressed, quality_on
from prunelens.analyses.stability import seed_stability
from prunelens.analyses.sufficiency import sufficiency, survival_by_step
from prunelens.corpus import document_groups
from prunelens.sae.topk import TopKSAE
from prunelens.study.cost import Asked, Cost
from prunelens.study.kind import StageKind
from prunelens.study.parents import Of
from prunelens.study.sae_stages import decoders_by_step
from prunelens.study.work import Work, read_json, write_json

FIT_STEPS = 10  # of the joint regression; three to five were seen


def _stability(work: Work) -> None:
    decoders = {
        sae.init_seed: TopKSAE.load(folder).decoder_weight.detach()
        for sae, folder in work.saes("sae").items()
    }
    seed_stability(decoders, work.config["taus"]).to_parquet(work.out / "stability.parquet")


class Paired(NamedTuple):
    """Dense and pruned activations of the same tokens, normalised with the same statistics."""

    dense: Activations
    pruned: Activations
    first: Tensor
    """Rows of the first half of the eval documents."""
    second: Tensor
    """Rows of the second half, on which everything is measured."""
    groups: Tensor
    """Of every row of `second` its group of documents."""


def paired_activations(
    work: Work, dense: str = "dense", pruned: str = "pruned", *, raw: bool = False
) -> Paired:
    """The activations of eval of two parents, with the dense statistics or raw."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    known = None if raw else work.parents["statistics"] / "statistics.safetensors"
    statistics = Statistics.load(known) if known else None
    x, y = _eval_of(work, (dense, pruned), kept, statistics)
    second = second_half(work, kept, store=dense)
    documents = load_file(work.parents[dense] / "eval_documents.safetensors")["documents"]
    first = torch.arange(len(kept) - len(second))
    return Paired(x, y, first, second, document_groups(documents[kept[second]]))


def _eval_of(
    work: Work, roles: Sequence[str], kept: Tensor, statistics: Statistics | None
) -> list[Activations]:
    """The same rows of eval of several parents."""
    paths = [work.parents[role] / "eval.safetensors" for role in roles]
    return [Activations(p, kept=kept, statistics=statistics, device=work.device) for p in paths]


def _sinks(work: Work) -> None:
    """Tokens whose norm passes the limit after compression alone, and what they do to an SAE."""
    screening = read_json(work.parents["screening"] / "screening.json")
    median = screening["dense_median_norm"]
    limit = median * (work.config["max_norm_multiple"] or NORM_MULTIPLE)
    rows = []
    for split in ("train", "eval"):
        norms, dense = (
            load_file(work.parents[role] / f"{split}_norms.safetensors")["norms"]
            for role in ("activations", "dense")
        )
        kept = load_file(work.parents["screening"] / "kept.safetensors")[split]
        sinks = only_compressed(dense, norms, limit)[kept]
        row = {
            "split": split,
            "num_tokens": len(norms),
            "num_left_out": screening[f"{split}_left_out"],
            "num_sinks": int(sinks.sum()),
            "largest_norm": float(norms[kept].max()) / median,
        }
        rows.append(row if split == "train" else row | _with_and_without(work, kept[~sinks]))
    pd.DataFrame(rows).to_parquet(work.out / "sinks.parquet")


def _with_and_without(work: Work, others: Tensor) -> dict[str, float]:
    """MOVED on eval, and `…_without`: on its rows `others` alone."""
    folders = work.saes("sae").values()
    known = pd.DataFrame([read_json(folder / "quality.json") for folder in folders])
    spread = read_json(work.parents["statistics"] / "variance.json")
    found = {name: spread.get(name, known.get(name, pd.Series()).mean()) for name in MOVED}
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    if len(others) < len(kept):
        normal = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
        dense, condition = _eval_of(work, ("dense", "activations"), others, normal)
        saes = [TopKSAE.load(folder).to(work.device) for folder in folders]
        without = quality_on(saes, dense, condition)
    else:
        without = found
    return {**found, **{f"{name}_without": value for name, value in without.items()}}


def _common_change(work: Work) -> None:
    """Fitted on the first half of eval, measured on the second, where all else is measured."""
    dense, pruned, first, second, _ = paired_activations(work)
    seed = work.config["seed"]
    changes = {
        kind: fit_common_change(dense, pruned, first, kind=kind, seed=seed) for kind in KINDS
    }
    table = common_change_table(dense, pruned, changes, second)
    table.to_parquet(work.out / "common_change.parquet")
    changes[work.config["kind"]].save(work.out / "change.safetensors")


def load_common_change(work: Work) -> CommonChange:
    """What the parents say is common to all tokens."""
    return CommonChange.load(work.parents["common_change"] / "change.safetensors")


def _persistence(work: Work) -> None:
    _by_dense_sae(work, persistence, persistence_summary, "persistence.parquet")


def _scaling(work: Work) -> None:
    _by_dense_sae(work, latent_scaling, scaling_summary, "scaling.parquet")


def _by_dense_sae(
    work: Work,
    measure: Callable[..., pd.DataFrame],
    summarise: Callable[[pd.DataFrame], pd.DataFrame],
    file: str,
) -> None:
    """What each dense SAE reads in dense and pruned activations of the second half of eval."""
    dense, pruned, _, tokens, groups = paired_activations(work)
    change = load_common_change(work)
    folders = {sae.init_seed: folder for sae, folder in work.saes("sae").items()}
    total = len(tokens) * len(folders)
    latents, summaries = [], []
    for number, (seed, folder) in enumerate(folders.items()):
        sae = TopKSAE.load(folder).to(work.device)
        progress = work.share(total, before=number * len(tokens))
        table = measure(
            sae, dense, pruned, tokens, change=change, groups=groups, seed=seed, progress=progress
        )
        latents.append(table.assign(seed=seed))
        summaries.append(summarise(table).assign(seed=seed))
    pd.concat(latents, ignore_index=True).to_parquet(work.out / "latents.parquet")
    pd.concat(summaries, ignore_index=True).to_parquet(work.out / file)


def second_half(work: Work, kept: Tensor, *, store: str = "dense") -> Tensor:
    """Which of the rows that count are of the second half of the eval documents."""
    first_half = read_json(work.parents[store] / "rows.json")["eval_first_rows"]
    return (kept >= first_half).nonzero().squeeze(1)


def _sufficiency(work: Work) -> None:
    """The verdict on the run's SAEs, their curves, and survival by step where two are followed."""
    curves = {
        sae: pd.read_parquet(folder / "curve.parquet").assign(seed=sae.init_seed)
        for sae, folder in work.saes("own").items()
    }
    own = pd.concat([curve for sae, curve in curves.items() if sae.is_plain])
    doubled = next((curve for sae, curve in curves.items() if not sae.is_plain), None)
    found = sufficiency(own, doubled)
    pd.DataFrame([found]).to_parquet(work.out / "verdict.parquet")
    every = [own.assign(total_steps=own["step"].max())]
    if doubled is not None:
        every.append(doubled.assign(total_steps=doubled["step"].max()))
    pd.concat(every, ignore_index=True).to_parquet(work.out / "curves.parquet")
    dense, run = (_decoders_by_step(work, of) for of in ("dense", "own"))
    if dense:
        by_step = survival_by_step(dense, run, work.config["taus"])
        by_step.to_parquet(work.out / "survival_by_step.parquet")


def _decoders_by_step(work: Work, of: Of) -> dict[int, dict[int, Tensor]]:
    """Of the plain SAEs: seed -> step -> decoder."""
    plain = {sae: folder for sae, folder in work.saes(of).items() if sae.is_plain}
    return {sae.init_seed: decoders_by_step(folder) for sae, folder in plain.items()}


def _fates(work: Work) -> None:
    dense = {
        sae.init_seed: pd.read_parquet(folder / "latents.parquet")
        for sae, folder in work.saes("sae").items()
    }
    matches = pd.read_parquet(work.parents["survival"] / "latents.parquet")
    others = {
        role: pd.read_parquet(work.parents[role] / "latents.parquet")
        for role in ("persistence", "activation_matching", "scaling", "subspace")
        if role in work.parents
    }
    found = latent_fates(dense, matches, work.config["seeds"], **others)
    found.to_parquet(work.out / "fates.parquet")


def _fragility(work: Work) -> None:
    found = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    taus = work.config["taus"]
    quintiles(found, taus).to_parquet(work.out / "quintiles.parquet")
    quintiles_by_seed(found, taus).to_parquet(work.out / "by_seed.parquet")
    fragility_contrasts(found).to_parquet(work.out / "contrasts.parquet")
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


# --- what they cost -----------------------------------------------------------------------------


def _stability_cost(asked: Asked) -> Cost:
    seeds = len(asked.parents)
    return Cost(asked.matching(seeds * (seeds - 1) // 2))


def _common_change_cost(asked: Asked) -> Cost:
    """Two products of every token's activations with each other, on half the eval split."""
    return Cost(4.0 * (asked.eval_tokens // 2) * asked.shape.d_model**2)


def _persistence_cost(asked: Asked) -> Cost:
    """Per SAE: dense and every draw of what is disturbed, on half the eval split."""
    encodings = (1 + sum(DRAWS.values())) * len(asked.saes("sae"))
    return Cost(asked.encoding(asked.eval_tokens // 2 * encodings))


def _scaling_cost(asked: Asked) -> Cost:
    """Per SAE, on half the eval split: one encoding, and per step of the joint regression k sparse
    rows of every target, read twice.
    """
    tokens = asked.eval_tokens // 2 * len(asked.saes("sae"))
    each = 4.0 * asked.shape.d_model * asked.study.sae.k * len(SOURCES) * FIT_STEPS
    return Cost(asked.encoding(tokens) + tokens * each)


def _sufficiency_cost(asked: Asked) -> Cost:
    """Every dense SAE against every pruned one at every checkpoint, where both are followed."""
    steps = len(asked.study.sufficiency.checkpoints) + 1
    return Cost(asked.matching(len(asked.saes("dense")) ** 2 * steps))


QUESTION_STAGES = (
    StageKind("stability", 2, _stability, cost=_stability_cost, rate="matching"),
    StageKind("sinks", 1, _sinks),
    StageKind("common_change", 1, _common_change, cost=_common_change_cost, rate="SAE encoding"),
    StageKind("persistence", 3, _persistence, cost=_persistence_cost, rate="SAE encoding"),
    StageKind("scaling", 2, _scaling, cost=_scaling_cost, rate="SAE encoding"),
    StageKind("sufficiency", 1, _sufficiency, cost=_sufficiency_cost, rate="matching"),
    StageKind("fates", 3, _fates),
    StageKind("fragility", 3, _fragility),
    StageKind("predictor", 2, _predictor),
)
