"""RQ3: can SAEs of the dense model still be used?"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.null_states import NullSource
from prunelens.analyses.sinks import NORM_MULTIPLE
from prunelens.analyses.transfer import DenseReference, transfer, transfer_verdicts
from prunelens.sae.exchange.formats import GivenSae
from prunelens.sae.exchange.own_folder import own_sae
from prunelens.sae.exchange.pretrained import load_given_sae
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
from prunelens.study.questions.paired import load_common_change
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

log = logging.getLogger(__name__)

GIVEN = "given"  # an SAE of others inside its artifact, whose identity has no names
SEED = 0  # of windows for refitting


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


def _transfer_cost(costed: Costed) -> Cost:
    """Activations for FVU and refit, then cross-entropies on four sets, the null's one of them.

    As many windows as there may be are counted: a pruned model's may be enough before.
    """
    num_saes = max(1, len(costed.saes("sae")))  # one of others is no parent
    below = costed.eval_tokens + costed.config["refit_tokens"]
    whole = costed.config["ce_tokens"] * (5 + 8 * num_saes)
    flops = costed.forward(below, blocks=costed.config["layer"] + 1)
    flops += costed.forward(whole, head=True)
    encoded = num_saes * (4 * below + 8 * costed.config["ce_tokens"])
    return Cost(flops + costed.encoding(encoded), below + whole)


def _plan(run: LayerPlan) -> Mapping[str, Stage]:
    """One stage for our own dense SAEs, one for each SAE of others."""
    shared = {"prune": run.prune, "statistics": run.dense.statistics}
    if run.pruning:
        shared["common_change"] = run.answer("common_change")
        shared["dense_activations"] = run.dense.activations
        shared["pruned_activations"] = run.activations
    stages = {}
    for given in (None, *run.model.pretrained(run.layer)):
        role = f"transfer {given.label}" if given else "transfer"
        dense = run.dense.answers[role] if run.pruning else None
        config = {
            **run.place(),
            **run.largest_norm(),
            **run.study.transfer.model_dump(mode="json"),
            "pretrained": run.model.content(given),
        }
        own = {} if given else run.dense.readers()
        stages[role] = run.with_model("transfer", config, {**shared, "dense": dense, **own}, given)
    return stages


TRANSFER = Question(
    "transfer",
    3,
    _transfer,
    cost=_transfer_cost,
    work_kind="language model",
    has_logits=True,
    asked=("transfer",),
    tables=(
        Table(
            "transfer",
            "run, SAE, positions, refit",
            "RQ3: may a dense SAE still be used after pruning",
            "transfer.parquet",
            """
            sae: `seed N` is our own dense SAE of that seed; others are named as in the study.
            positions: Which tokens count: `all`, `without_first` or `norm_filtered`.
            refit: What is fitted anew: `none`, `b_dec` or `threshold`.
            fvu: As in `sae_quality.csv`, with errors and variance divided by the dense deviations.
            fvu_raw fvu_dense_var l0
            ce_recovered: (`ce_mean_ablated` - `ce_sae`) / (`ce_mean_ablated` - `ce_model`).
            verdict: `keep`, `refit`, `retrain` or `undecided`; empty on the dense run, the
                reference.
            ce_model: Cross-entropy of the model as it is, in nats per prediction made at a
                position of the set.
            ce_mean_ablated: `ce_model` where these positions alone are replaced by the mean.
            ce_sae: `ce_model` where these positions alone are replaced by the reconstruction.
            reason: Why a number or an interval is empty, and what the verdict lacks.
            source: `pruned`, the model's own activations (of the dense run, too), or `null`.
            fvu_dense_var_ratio: `fvu_dense_var` over that of the same SAE, as it is, on the dense
                model.
            fvu_dense_var_ratio_low fvu_dense_var_ratio_high
            fvu_raw_ratio: `fvu_raw` over that of the same SAE, as it is, on the dense model.
            fvu_raw_ratio_low fvu_raw_ratio_high
            ce_drop: `ce_recovered` of the same SAE, as it is, on the dense model, minus the row's.
            ce_drop_low ce_drop_high
            num_windows: Windows that cross-entropies are measured on.
            num_documents: Documents of these windows.""",
        ),
    ),
    plan=_plan,
)
