"""Stages that need the model's output again: SAEs in its place (RQ3), latents ablated (RQ5)."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.causal import Ablations, ablate, nothing_ablated
from prunelens.analyses.causal_groups import SeedAblations, causal_summary, latent_groups
from prunelens.analyses.null_states import NullSource
from prunelens.analyses.sinks import NORM_MULTIPLE
from prunelens.analyses.transfer import DenseReference, transfer, transfer_verdicts
from prunelens.corpus import spread_over_documents
from prunelens.sae.formats import GivenSae
from prunelens.sae.own_folder import own_sae
from prunelens.sae.pretrained import load_given_sae
from prunelens.sae.topk import TopKSAE
from prunelens.study.cost import Asked, Cost
from prunelens.study.kind import StageKind
from prunelens.study.model_stages import (
    EVAL,
    load_stage_model,
    load_window_documents,
    load_windows,
)
from prunelens.study.parents import Sae
from prunelens.study.question_stages import load_common_change
from prunelens.study.work import Work
from prunelens.upper_blocks import UpperBlocks

log = logging.getLogger(__name__)

GIVEN = "given"  # an SAE of others inside its artifact, whose identity has no names
GROUPINGS: tuple[Literal["cosine", "persistence"], ...] = ("cosine", "persistence")
ABLATION_GROUPS = 10  # of latents: five for each of two groupings
ABLATED_SHARE = 0.25  # of all (prompt, position) pairs: a latent fires in some prompts, from some
# position on. An assumption; the true share is known once the SAE is there.
SEED = 0  # of prompts, windows for refitting, groups, contexts and directions


def _transfer(work: Work) -> None:
    """RQ3 of one condition; a pruned one is judged against the dense artifact."""
    config = work.config
    dense_folder = work.parents.get("dense")
    reference = (
        DenseReference.load(dense_folder / "reference.safetensors") if dense_folder else None
    )
    evaluation = load_windows(work, *EVAL)
    context = evaluation.shape[1]
    order = spread_over_documents(load_window_documents(work, "train"), seed=SEED)
    refit = order[: max(1, config["refit_tokens"] // context)].sort().values
    statistics = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    saes = _given_saes(work)
    if reference and work.config["pretrained"]:
        saes = [dataclasses.replace(sae, name=GIVEN) for sae in saes]
    found = transfer(
        load_stage_model(work),
        saes,
        evaluation,
        load_windows(work, "train")[refit],
        load_window_documents(work, *EVAL),
        site=config["site"],
        layer=config["layer"],
        dense=reference,
        ce_windows=max(1, config["ce_tokens"] // context),
        max_norm_multiple=config["max_norm_multiple"] or NORM_MULTIPLE,
        sigma=statistics.sigma,
        null=_null_source(work, statistics, refit, context) if reference else None,
        progress=work.progress,
    )
    for note in found.notes:
        log.warning("%s", note)
    reference, rows = found.reference, found.rows
    if work.config["pretrained"]:
        reference, rows = reference._replace(saes=(GIVEN,)), rows.assign(sae=GIVEN)
    reference.save(work.out / "reference.safetensors")
    (transfer_verdicts(rows) if dense_folder else rows).to_parquet(work.out / "transfer.parquet")


def _null_source(
    work: Work, statistics: Statistics, refit: Tensor, context_tokens: int
) -> NullSource:
    """The stores of both models, whose windows are those of the corpus; of train the chosen."""
    skip_first = work.stage.parents["pruned_activations"].config["skip_first"]
    per_window = context_tokens - skip_first
    refit_rows = (refit[:, None] * per_window + torch.arange(per_window)).flatten()

    def stores(split: str, rows: Tensor | None = None) -> tuple[Activations, Activations]:
        dense, pruned = (
            Activations(
                work.parents[role] / f"{split}.safetensors",
                statistics=statistics,
                kept=rows,
                device=work.device,
            )
            for role in ("dense_activations", "pruned_activations")
        )
        return dense, pruned

    change = load_common_change(work)
    return NullSource(change, stores("eval"), stores("train", refit_rows), skip_first)


def _given_saes(work: Work) -> list[GivenSae]:
    """Our dense SAEs by seed, or the one of others that the stage is for."""
    if work.config["pretrained"] is None:
        return [
            own_sae(folder, name=f"seed {sae.init_seed}", device=work.device)
            for sae, folder in work.saes("sae").items()
        ]
    assert work.stage.source and work.stage.source.pretrained
    return [load_given_sae(work.stage.source.pretrained, device=work.device)]


def _causal(work: Work) -> None:
    """RQ5: the same latents in the dense model, and their matches in the pruned one; all seeds."""
    fates = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    groups = {int(seed): _groups(work, table, int(seed)) for seed, table in fates.groupby("seed")}
    prompts, documents = _prompts(work)
    dense = _ablations(work, groups, prompts, "dense", "latent")
    pruned = _ablations(work, groups, prompts, "pruned", "match")
    seeds = [SeedAblations(groups[seed], dense[seed], pruned[seed]) for seed in groups]
    causal_summary(seeds, documents.numpy()).to_parquet(work.out / "causal.parquet")


def _prompts(work: Work) -> tuple[Tensor, Tensor]:
    """Windows as even over the documents of eval as can be, and their documents; both are kept."""
    documents = load_window_documents(work, *EVAL)
    drawn = spread_over_documents(documents, seed=SEED)[: work.config["prompts"]]
    table = pd.DataFrame({"window": drawn, "document": documents[drawn]})
    table.rename_axis("prompt").reset_index().to_parquet(work.out / "prompts.parquet")
    return load_windows(work, *EVAL)[drawn], documents[drawn]


def _groups(work: Work, fates: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """Groups of one seed's alive dense latents, by cosine and by persistence."""
    folder = work.saes("pruned")[Sae(seed, seed)]
    alive = pd.read_parquet(folder / "latents.parquet")["firing_rate"] > 0
    known = fates[fates["alive"]]
    match = known["match_shared_init"].astype(int)
    table = known[["latent", "persistence", "firing_rate", "mean_activation"]].assign(
        match=match, match_alive=alive.to_numpy()[match], cosine=known["cosine_shared_init"]
    )
    size = work.config["group_size"]
    found: dict[str, pd.DataFrame] = {
        grouping: latent_groups(table, grouping=grouping, group_size=size, seed=SEED)
        for grouping in GROUPINGS
    }
    for grouping, groups in found.items():
        groups.to_parquet(work.out / f"groups_{grouping}_{seed}.parquet")
    return found


def _ablations(
    work: Work,
    groups: dict[int, dict[str, pd.DataFrame]],
    prompts: Tensor,
    condition: Literal["dense", "pruned"],
    column: str,
) -> dict[int, Ablations]:
    """Every latent of any group of each seed, ablated in one of the two models.

    The raw values are kept.
    """
    wanted = {seed: pd.concat(tables.values()) for seed, tables in groups.items()}
    if condition == "pruned":
        wanted = {seed: rows[rows["match_alive"]] for seed, rows in wanted.items()}
    found = {seed: nothing_ablated(len(prompts)) for seed in wanted}
    asked = {seed: rows for seed, rows in wanted.items() if len(rows)}
    if not asked:  # too few latents are alive or defined; the table says NaN
        return found
    lm = load_stage_model(work, pruned=condition == "pruned")
    upper = UpperBlocks(lm, prompts, site=work.config["site"], layer=work.config["layer"])
    before = len(asked) if condition == "pruned" else 0
    for number, (seed, rows) in enumerate(asked.items(), start=before):
        folder = work.saes(condition)[Sae(seed, seed)]
        random = rows["group"] == "random_direction"
        found[seed] = ablate(
            upper,
            TopKSAE.load(folder).to(work.device),
            Statistics.load(folder / "normalisation.safetensors"),
            latents=sorted(set(rows.loc[~random, column])),
            random_direction_latents=sorted(set(rows.loc[random, column])),
            contexts_per_latent=work.config["contexts_per_latent"],
            skip_first=work.config["skip_first"],
            seed=SEED,
            progress=work.share(2 * len(asked), before=number),
        )
        found[seed].kl.to_parquet(work.out / f"kl_{condition}_{seed}.parquet")
    return found


# --- what they cost -----------------------------------------------------------------------------


def _transfer_cost(asked: Asked) -> Cost:
    """Activations for FVU and refit, then cross-entropies on four sets, the null's one of them.

    As many windows as there may be are counted: a pruned model's may be enough before.
    """
    num_saes = max(1, len(asked.saes("sae")))  # one of others is no parent
    below = asked.eval_tokens + asked.config["refit_tokens"]
    whole = asked.config["ce_tokens"] * (5 + 8 * num_saes)
    flops = asked.forward(below, blocks=asked.config["layer"] + 1)
    flops += asked.forward(whole, head=True)
    encoded = num_saes * (4 * below + 8 * asked.config["ce_tokens"])
    return Cost(flops + asked.encoding(encoded), below + whole)


def _causal_cost(asked: Asked) -> Cost:
    """Two protocols with every SAE, every latent of every group, through the blocks above."""
    config, context = asked.config, asked.study.corpus.context_tokens
    saes = asked.saes("dense") + asked.saes("pruned")
    ablations = 2 * len(saes) * ABLATION_GROUPS * config["group_size"]
    tokens = round(ABLATED_SHARE * config["prompts"] * context) * ablations
    return Cost(asked.forward(tokens, blocks=asked.shape.num_blocks - config["layer"] - 1), tokens)


OUTPUT_STAGES = (
    StageKind(
        "transfer", 3, _transfer, cost=_transfer_cost, rate="language model", has_logits=True
    ),
    StageKind("causal", 2, _causal, cost=_causal_cost, rate="language model", has_logits=True),
)
