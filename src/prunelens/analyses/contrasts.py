"""The registered contrasts behind the claims: a study's tables in, numbers with intervals out.

What the tables do not hold raises NotMeasuredError. For the intervals see `contrast`.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pandas as pd

from prunelens.analyses.contrast import (
    SITE,
    TAU,
    Contrast,
    NotMeasuredError,
    Tables,
    above_floor,
    arm_rows,
    as_published,
    minus_dense,
    not_empty,
    over_conditions,
    over_seeds,
    quintile_rows,
    rows_of,
    wanda_minus_magnitude,
)
from prunelens.analyses.statistics import exact_spearman, interval_over_windows
from prunelens.analyses.verdict import CE_MARGIN, FVU_FACTOR

HALF = 0.5
NEAR_HALF = (0.4, 0.5)  # "up to 40-50 %"
USABLE_FVU = 0.025  # the paper's "remarkable" FVU of a transferred SAE
EQUIVALENCE = 0.1  # of the mean isolated KL


# --- survival and persistence ---------------------------------------------------------------------


def rare_minus_frequent(tables: Tables, measure: str) -> list[Contrast]:
    """Claim 1: the rarest quintile minus the most frequent one."""
    rates = quintile_rows(tables, measure).pivot_table(
        index=["run", "seed"], columns="quintile", values="survival_rate"
    )
    rates = rates.reindex(columns=range(1, 6))  # a quintile may have no latent with a value
    difference = (rates[1] - rates[5]).rename("value").reset_index()
    return [over_seeds(f"Q1 - Q5 of {measure}", difference, "above", 0.0)]


def wanda_survival(tables: Tables) -> list[Contrast]:
    """Claim 2 as published."""
    rates = arm_rows(tables, "shared_init").rename(columns={"mnn": "value", "init_a": "seed"})
    return [over_seeds("survival, Wanda - magnitude", wanda_minus_magnitude(rates), "above", 0.0)]


def wanda_persistence(tables: Tables) -> list[Contrast]:
    """Claim 2, without a second dictionary."""
    rows = rows_of(tables, "persistence", source="pruned")
    rows = rows.rename(columns={"mean_correlation": "value"})
    return [over_seeds("persistence, Wanda - magnitude", wanda_minus_magnitude(rows), "above", 0.0)]


def rare_at_half(tables: Tables, measure: str, limit: float) -> list[Contrast]:
    """Claim 8: Q1 and Q2 of every condition at 40 to 50 %."""
    rates = quintile_rows(tables, measure)
    rates = rates[rates["sparsity"].between(*NEAR_HALF) & (rates["quintile"] <= 2)]
    found = [
        over_seeds(
            f"Q{quintile} of {measure}, {run}",
            part.rename(columns={"survival_rate": "value"}),
            "above",
            limit,
        )
        for (run, quintile), part in rates.groupby(["run", "quintile"], sort=False)
    ]
    return not_empty(found, "no condition at 40 to 50 % sparsity")


def above_seed_floor(tables: Tables) -> list[Contrast]:
    """Claim 11 as published: survival against the agreement of dense seeds."""
    pairs = rows_of(tables, "stability", method="dense", tau=TAU)
    both = [pairs.assign(seed=pairs[side]) for side in ("seed_a", "seed_b")]
    floor = pd.concat(both).groupby([*SITE, "seed"])["mnn"].mean()
    rates = arm_rows(tables, "shared_init").rename(columns={"init_a": "seed"})
    return [above_floor("survival - 18 x stability of dense seeds", rates, floor)]


def above_start_floor(tables: Tables) -> list[Contrast]:
    """Claim 11 against what the same start shows with no feature in common."""
    floor = arm_rows(tables, "floor_shared").rename(columns={"init_a": "seed"})
    floor = floor.groupby([*SITE, "seed"])["mnn"].mean()
    rates = arm_rows(tables, "shared_start").rename(columns={"init_a": "seed"})
    return [above_floor("survival - 18 x floor of a shared start", rates, floor)]


# --- perplexity -----------------------------------------------------------------------------------


def wanda_nll(tables: Tables, window: Literal["shortest", "longest"]) -> list[Contrast]:
    """Claim 3: at every equal sparsity, the same windows read by both models."""
    rows = as_published(rows_of(tables, "perplexity_windows"))
    lengths = rows.groupby("model")["context_tokens"]
    wanted = lengths.transform("min" if window == "shortest" else "max")
    rows = rows[rows["context_tokens"] == wanted]
    found = []
    for (model, sparsity), part in rows.groupby(["model", "sparsity"], sort=False):
        by_method = part.pivot_table(index="window", columns="method", values="nll")  # layers agree
        if {"wanda", "magnitude"} <= set(by_method):
            difference = (by_method["wanda"] - by_method["magnitude"]).to_numpy()
            low, high = interval_over_windows(difference)
            name = f"nats/token, Wanda - magnitude, {model} {sparsity:g}"
            value = float(difference.mean())
            found.append(Contrast(name, value, low, high, "below", 0.0, "windows of text"))
    return not_empty(found, "no sparsity with both Wanda and magnitude")


# --- transfer -------------------------------------------------------------------------------------


def fvu_at_half(tables: Tables) -> list[Contrast]:
    """Claim 4 as published."""
    return [
        over_seeds(f"FVU of {name}", part.assign(value=part["fvu"]), "below", USABLE_FVU)
        for name, part in _saes_at_half(tables, "all")
    ]


def usable_at_half(tables: Tables) -> list[Contrast]:
    """Claim 4 by the rule of RQ3."""
    found = []
    for name, part in _saes_at_half(tables, "norm_filtered"):
        ratio = part.assign(value=part["fvu_dense_var"] / part["fvu_dense_var_dense"])
        drop = part.assign(value=part["ce_recovered"] - part["ce_recovered_dense"])
        found += [
            over_seeds(f"fvu_dense_var of {name} over dense", ratio, "below", FVU_FACTOR),
            over_seeds(f"CE recovered of {name} - dense", drop, "above", -CE_MARGIN),
        ]
    return found


def _saes_at_half(tables: Tables, positions: str) -> list[tuple[str, pd.DataFrame]]:
    """Plain rows at Wanda 50 %, ours (one per seed) and each pretrained SAE, beside dense ones."""
    rows = rows_of(tables, "transfer", positions=positions, refit="none")
    dense = rows[rows["method"] == "dense"].set_index([*SITE, "sae"])
    rows = rows[(rows["method"] == "wanda") & (rows["sparsity"] == HALF)]
    reference = dense[["fvu_dense_var", "ce_recovered"]].add_suffix("_dense")
    rows = rows.join(reference, on=[*SITE, "sae"])
    ours = rows["sae"].str.fullmatch(r"seed \d+")
    rows = rows.assign(seed=rows["sae"], group=rows["sae"].where(~ours, "our SAEs"))
    found = [(f"{group}, {run}", part) for (run, group), part in rows.groupby(["run", "group"])]
    return not_empty(found, "no condition Wanda at 50 %")


# --- ablations ------------------------------------------------------------------------------------


def robust_equals_fragile(tables: Tables) -> list[Contrast]:
    """Claim 5 as published: both models of every pair."""
    return _equivalence(tables, "cosine", "robust_minus_fragile", "paper", "final")


def matched_equals_fragile(tables: Tables) -> list[Contrast]:
    """Claim 5 where the latent fires, against robust latents of the same firing rate."""
    return _equivalence(tables, "persistence", "matched_minus_fragile", "isolated", "firing")


def ablation_after_pruning(tables: Tables, protocol: str, contexts: str) -> list[Contrast]:
    """Claim 9: the same prompts, matched latents."""
    rows = rows_of(
        tables,
        "causal",
        ablated_in="pruned_minus_dense",
        grouping="cosine",
        group="robust_and_fragile",
        protocol=protocol,
        contexts=contexts,
    )
    return [
        Contrast(
            f"{protocol} KL, pruned - dense, {row.run}",
            row.kl_mean, row.ci_low, row.ci_high, "below", 0.0, "prompts",
        )
        for row in rows.itertuples()
    ]  # fmt: skip


def _equivalence(
    tables: Tables, grouping: str, group: str, protocol: str, contexts: str
) -> list[Contrast]:
    rows = rows_of(tables, "causal", grouping=grouping, contexts=contexts)
    rows = rows[rows["ablated_in"] != "pruned_minus_dense"]
    scale = rows[(rows["group"] == "robust_and_fragile") & (rows["protocol"] == "isolated")]
    margins = EQUIVALENCE * scale.set_index(["run", "ablated_in"])["kl_mean"]
    rows = rows[(rows["group"] == group) & (rows["protocol"] == protocol)]
    found = []
    for row in rows.itertuples():
        name = f"{group.replace('_', ' ')}, {row.run} ({row.ablated_in})"
        margin = float(margins.get((row.run, row.ablated_in), math.nan))
        found.append(
            Contrast(name, row.kl_mean, row.ci_low, row.ci_high, "within", margin, "prompts")
        )
    return not_empty(found, "no ablations")


# --- seeds, predictor, quality --------------------------------------------------------------------


def seeds_as_published(tables: Tables) -> list[Contrast]:
    """Claim 6 as published."""
    rates = rows_of(tables, "stability", method="dense", tau=TAU)
    return [
        over_seeds("MNN between dense seeds", rates.assign(value=rates["mnn"]), "below", 0.5),
        _pattern(tables, "shared_init"),
    ]


def seeds_controlled(tables: Tables) -> list[Contrast]:
    """Claim 6: beyond chance, and in what survives beyond noise."""
    rates = arm_rows(tables, "ceiling_cross")
    chance = arm_rows(tables, "chance").groupby(SITE)["mnn"].mean().rename("chance")
    rates = rates.join(chance, on=SITE)
    rates = rates.rename(columns={"init_a": "seed_a", "init_b": "seed_b"})
    rates = rates.assign(value=rates["mnn"] - rates["chance"])
    return [
        over_seeds("MNN of other starts - chance", rates, "below", 0.5),
        _pattern(tables, "relative_shuffled"),
    ]


def predictive(
    tables: Tables, target: str, evaluation: str, auc: Literal["auc", "auc_within"]
) -> list[Contrast]:
    """Claim 7: the AUC of firing rate and sparsity.

    Pooled over conditions that were held out, an AUC is biased downwards (`clustered_auc`);
    `auc_within` compares latents of one condition, where only the sign of the fit on firing rate
    enters: whether the other conditions tell which way round it goes.
    """
    rows = rows_of(
        tables, "predictor", target=target, evaluation=evaluation, features="rate_sparsity"
    )
    rows = rows[rows["tau"].isna() | (rows["tau"] == TAU)]
    found = []
    for row in not_empty(list(rows.itertuples()), f"no predictor of {target}"):
        value = getattr(row, auc)
        if math.isnan(value):
            raise NotMeasuredError(str(row.reason))
        found.append(
            Contrast(
                f"{auc} ({evaluation.replace('_', ' ')}, {target})",
                value, getattr(row, f"{auc}_low"), getattr(row, f"{auc}_high"),
                "above", 0.5, "conditions",
            )
        )  # fmt: skip
    return found


def fvu_falls(tables: Tables) -> list[Contrast]:
    """Claim 10 as published."""
    return [over_seeds("FVU, pruned - dense", minus_dense(tables, "fvu"), "below", 0.0)]


def activations_get_simpler(tables: Tables) -> list[Contrast]:
    """Claim 10 with a denominator that pruning cannot shrink, and with the reason it gives."""
    ratio = minus_dense(tables, "participation_ratio").drop_duplicates("run")
    error = minus_dense(tables, "fvu_dense_var")
    return [
        over_seeds("fvu_dense_var, pruned - dense", error, "below", 0.0),
        over_conditions("participation ratio, pruned - dense", ratio, "below", 0.0),
    ]


def _pattern(tables: Tables, measure: str) -> Contrast:
    """Spearman correlation over quintiles between any two seeds, per condition."""
    rates = quintile_rows(tables, measure)
    rows = []
    for run, part in rates.groupby("run"):
        profiles = part.pivot_table(index="quintile", columns="seed", values="survival_rate")
        profiles = profiles.reindex(range(1, 6))
        for a, b in itertools.combinations(profiles.columns, 2):
            value = exact_spearman(profiles[a].to_numpy(), profiles[b].to_numpy()).rho
            rows.append({"run": run, "seed_a": a, "seed_b": b, "value": value})
    found = pd.DataFrame(not_empty(rows, "fewer than two seeds"))
    return over_seeds(f"correlation of {measure} by quintile between seeds", found, "above", 0.0)
