"""RQ5: does the model rely on what survives? Latents are ablated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import pandas as pd
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.analyses.causal import Ablations, ablate, nothing_ablated
from prunelens.analyses.causal_groups import SeedAblations, causal_summary, latent_groups
from prunelens.sae.architectures import load_sae
from prunelens.spread import spread_over_documents
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.model_stages import (
    EVAL,
    load_stage_model,
    load_window_documents,
    load_windows,
)
from prunelens.study.parents import Sae, sae_role
from prunelens.study.work import Work
from prunelens.upper_blocks import UpperBlocks

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

GROUPINGS: tuple[Literal["cosine", "persistence"], ...] = ("cosine", "persistence")
ABLATION_GROUPS = 10  # of latents: five for each of two groupings
ABLATED_SHARE = 0.25  # of all (prompt, position) pairs: a latent fires in some prompts, from some
# position on. An assumption; the true share is known once the SAE is there.
SEED = 0  # of prompts, groups, contexts and directions


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
            load_sae(folder).to(work.device),
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


def _causal_cost(costed: Costed) -> Cost:
    """Two protocols with every SAE, every latent of every group, through the blocks above."""
    config, context = costed.config, costed.study.corpus.context_tokens
    saes = costed.saes("dense") + costed.saes("pruned")
    ablations = 2 * len(saes) * ABLATION_GROUPS * config["group_size"]
    tokens = round(ABLATED_SHARE * config["prompts"] * context) * ablations
    return Cost(
        costed.forward(tokens, blocks=costed.shape.num_blocks - config["layer"] - 1), tokens
    )


def _plan(run: LayerPlan) -> Mapping[str, Stage]:
    """With the SAEs of every seed of the condition, each beside the dense one of that seed."""
    wanted, pruning = run.study.causal.conditions, run.pruning
    if pruning is None or (wanted is not None and pruning.label not in wanted):
        return {}
    config = {
        **run.place(),
        "skip_first": run.study.activations.skip_first,
        **run.study.causal.model_dump(mode="json", exclude={"conditions"}),
    }
    pruned = {sae_role("pruned", sae): run.saes[sae] for sae in run.seeds()}
    parents = {"prune": run.prune, "fates": run.answers["fates"]} | run.dense_saes("dense") | pruned
    return {"causal": run.with_model("causal", config, parents)}


CAUSAL = Question(
    "causal",
    2,
    _causal,
    cost=_causal_cost,
    work_kind="language model",
    has_logits=True,
    asked=("causal",),
    of="pruned",
    plan=_plan,
    tables=(
        Table(
            "causal",
            "pruned run, model, grouping, group, protocol, contexts",
            "RQ5: do surviving latents matter more",
            "causal.parquet",
            """
            grouping: By what latents are sorted: `cosine` (paper) or `persistence`.
            group: Which latents are ablated, or between which the difference is.
            protocol: `paper`, `isolated` or `error_preserving`.
            contexts: Where: `final` or `firing`.
            kl_mean: Mean KL divergence over latents and seeds, in nats.
            ci_low ci_high: Ends of the 95 % interval, over what `resampled` says.
            num_latents: Latents of all seeds (or pairs) that have a context.
            num_prompts: Prompts that have a context.
            firing_share: How often a latent fires where it is read; empty for differences.
            ablated_in: `dense`, `pruned` or the difference `pruned_minus_dense`.
            reconstruction_share: Share of the paper's KL with nothing ablated; of `paper` alone.
            num_seeds: Seeds in which the group was measured.
            num_documents: Documents of these prompts.
            largest_share: Share of the mean that the largest latent of each seed holds.
            resampled error df
            least most: The mean without one group of documents, at the least and at the most.
            skew: Third standardised moment: the interval reaches further there.
            reason: Why there is no number or interval, or that one latent holds much.""",
        ),
    ),
)
