"""The registered contrasts behind the claims: a study's tables in, numbers with intervals out.

What the tables do not hold raises NotMeasuredError. For the intervals see `contrast`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import numpy as np
import pandas as pd

from prunelens.analyses.contrast import (
    SITE,
    Contrast,
    NotMeasuredError,
    Tables,
    above_floor,
    arm_rows,
    as_published,
    estimate_of,
    minus_dense,
    not_empty,
    over_conditions,
    over_seeds,
    quintile_rows,
    rows_of,
    wanda_minus_magnitude,
    with_null,
)
from prunelens.analyses.predictor import STATED
from prunelens.analyses.statistics import (
    Estimate,
    Scale,
    exact_spearman,
    interval_over_windows,
    jackknifed,
    no_estimate,
)
from prunelens.analyses.verdict import CE_MARGIN, FVU_FACTOR
from prunelens.match import TAU

CONTROLLED = "relative_shuffled"
QUINTILES = ("Q1", "Q2", "Q3", "Q4", "Q5")
HALF = 0.5
NEAR_HALF = (0.4, 0.5)  # "up to 40-50 %"
USABLE = 0.025  # the paper's "remarkable" FVU of a transferred SAE
WINDOWS = "windows drawn over documents"
REUSE_LIMITS = {
    "fvu_dense_var_ratio": FVU_FACTOR,
    "fvu_raw_ratio": FVU_FACTOR,
    "ce_drop": CE_MARGIN,
}
EQUIVALENCE = 0.1  # of the mean isolated KL


# --- survival and persistence ---------------------------------------------------------------------


def rare_minus_frequent_as_published(tables: Tables) -> list[Contrast]:
    """Claim 1 as published: the rarest quintile minus the most frequent one."""
    rates = quintile_rows(tables, "shared_init").pivot_table(
        index=["run", "seed"], columns="quintile", values="survival_rate"
    )
    rates = rates.reindex(columns=range(1, 6))  # a quintile may have no latent with a value
    difference = (rates[1] - rates[5]).rename("value").reset_index()
    return [over_seeds("Q1 - Q5 of shared_init", difference, "above", 0.0)]


def rare_minus_frequent(tables: Tables) -> list[Contrast]:
    """Claim 1, of every condition: beyond what noise of equal size does."""
    rows = rows_of(tables, "fragility_contrasts", measure=CONTROLLED, group="Q1 - Q5")
    return [
        Contrast(
            f"Q1 - Q5 of {CONTROLLED}, {row.run}",
            *(estimate_of(row), "above", 0.0, null and estimate_of(null)),
        )
        for row, null in with_null(rows, ["run"])
    ]


def wanda_survival(tables: Tables) -> list[Contrast]:
    """Claim 2 as published."""
    rates = arm_rows(tables, "shared_init").rename(columns={"mnn": "value", "init_a": "seed"})
    return [over_seeds("survival, Wanda - magnitude", wanda_minus_magnitude(rates), "above", 0.0)]


def wanda_persistence(tables: Tables) -> list[Contrast]:
    """Claim 2, at every equal sparsity, without a second dictionary.

    Noise of the two sizes differs as well, and then this decides nothing.
    """
    rows = rows_of(tables, "fragility_contrasts", measure="persistence", group="all")
    found = []
    for name, part in as_published(rows).groupby([*SITE, "sparsity"], sort=False):
        by_method = {(row.method, row.source): row for row in part.itertuples()}
        if not {("wanda", "pruned"), ("magnitude", "pruned")} <= set(by_method):
            continue
        pruned, null = (
            _difference(by_method["wanda", source], by_method["magnitude", source])
            for source in ("pruned", "null")
        )
        title = f"persistence, Wanda - magnitude, {' '.join(map(str, name))}"
        found.append(Contrast(title, pruned, "above", 0.0, null))
    return not_empty(found, "no sparsity with both Wanda and magnitude")


def _difference(first: Any, second: Any) -> Estimate:
    """Of two conditions measured on the same documents; what latents add is taken as if the two had
    none in common, which is on the safe side."""
    return jackknifed(
        first.value - second.value,
        np.asarray(first.without) - np.asarray(second.without),
        "documents and latents",
        added=first.beyond + second.beyond,
    )


def rare_at_half_as_published(tables: Tables) -> list[Contrast]:
    """Claim 8 as published: Q1 and Q2 of every condition at 40 to 50 %."""
    rates = quintile_rows(tables, "shared_init")
    rates = rates[rates["sparsity"].between(*NEAR_HALF) & (rates["quintile"] <= 2)]
    found = [
        over_seeds(
            f"Q{quintile} of shared_init, {run}",
            part.rename(columns={"survival_rate": "value"}),
            "above",
            0.5,
        )
        for (run, quintile), part in rates.groupby(["run", "quintile"], sort=False)
    ]
    return not_empty(found, "no condition at 40 to 50 % sparsity")


def rare_at_half(tables: Tables) -> list[Contrast]:
    """Claim 8: they persist, and no less than noise of equal size would have them."""
    found = []
    for measure, limit, nothing in (("persistence", 0.7, None), (CONTROLLED, 1.0, 1.0)):
        rows = rows_of(tables, "fragility_contrasts", measure=measure)
        rows = rows[rows["sparsity"].between(*NEAR_HALF) & rows["group"].isin(["Q1", "Q2"])]
        found += [
            Contrast(
                f"{row.group} of {measure}, {row.run}",
                *(estimate_of(row), "above", limit, null and estimate_of(null), nothing),
            )
            for row, null in with_null(rows, ["run", "group"])
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
            name = f"nats/token, Wanda - magnitude, {model} {sparsity:g}"
            found.append(Contrast(name, interval_over_windows(difference), "below", 0.0))
    return not_empty(found, "no sparsity with both Wanda and magnitude")


# --- transfer -------------------------------------------------------------------------------------


def fvu_at_half(tables: Tables) -> list[Contrast]:
    """Claim 4 as published: the paper's FVU is taken to be of raw activations."""
    rows = _saes_at_half(tables, "all", "pruned")
    ours = rows["sae"].str.fullmatch(r"seed \d+")
    rows = rows.assign(seed=rows["sae"], group=rows["sae"].where(~ours, "our SAEs"))
    return [
        over_seeds(
            f"raw FVU of {group}, {run}", part.assign(value=part["fvu_raw"]), "below", USABLE
        )
        for (run, group), part in rows.groupby(["run", "group"])
    ]


def usable_at_half(tables: Tables) -> list[Contrast]:
    """Claim 4 by the rule of RQ3, of every SAE as it is."""
    return [
        Contrast(f"{name} of {row.sae}, {row.run}", _named(row, name, WINDOWS), "below", limit)
        for row in _saes_at_half(tables, "norm_filtered", "pruned").itertuples()
        for name, limit in REUSE_LIMITS.items()
    ]


def _saes_at_half(tables: Tables, positions: str, source: str) -> pd.DataFrame:
    """Plain rows at Wanda 50 %, ours (one per seed) and each pretrained SAE."""
    rows = rows_of(tables, "transfer", positions=positions, refit="none", source=source)
    rows = rows[(rows["method"] == "wanda") & (rows["sparsity"] == HALF)]
    if rows.empty:
        raise NotMeasuredError("no condition Wanda at 50 %")
    return rows


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
            *(estimate_of(row, value="kl_mean"), "below", 0.0),
        )
        for row in rows.itertuples()
    ]


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
        found.append(Contrast(name, estimate_of(row, value="kl_mean"), "within", margin))
    return not_empty(found, "no ablations")


# --- seeds, predictor, quality --------------------------------------------------------------------


def seeds_as_published(tables: Tables) -> list[Contrast]:
    """Claim 6 as published."""
    rates = rows_of(tables, "stability", method="dense", tau=TAU)
    stability = over_seeds(
        "MNN between dense seeds", rates.assign(value=rates["mnn"]), "below", 0.5
    )
    rows = []
    for _run, part in quintile_rows(tables, "shared_init").groupby("run"):
        profiles = part.pivot_table(index="quintile", columns="seed", values="survival_rate")
        profiles = profiles.reindex(range(1, 6))
        for a, b in itertools.combinations(profiles.columns, 2):
            rows.append(exact_spearman(profiles[a].to_numpy(), profiles[b].to_numpy()).rho)
    defined = [rho for rho in not_empty(rows, "fewer than two seeds") if not math.isnan(rho)]
    mean = float(np.mean(not_empty(defined, "every quintile survives alike")))
    # Fisher's formula for five groups: seeds that all agree have no spread of their own.
    error = 1 / math.sqrt(len(QUINTILES) - 3)
    found = Estimate(mean, error, math.inf, "five groups, by Fisher's z", scale="fisher")
    name = "correlation of shared_init by quintile between seeds"
    return [stability, Contrast(name, found, "above", 0.0)]


def seeds_controlled(tables: Tables) -> list[Contrast]:
    """Claim 6: beyond chance, and in what survives beyond noise, on documents of their own."""
    rates = arm_rows(tables, "ceiling_cross")
    chance = arm_rows(tables, "chance").groupby(SITE)["mnn"].mean().rename("chance")
    rates = rates.join(chance, on=SITE)
    rates = rates.rename(columns={"init_a": "seed_a", "init_b": "seed_b"})
    rates = rates.assign(value=rates["mnn"] - rates["chance"])
    agreement = over_seeds("MNN of other starts - chance", rates, "below", 0.5)
    rows = rows_of(tables, "fragility_contrasts", measure=CONTROLLED)
    rows = rows[rows["group"].isin(QUINTILES)]
    found = {key: _pattern(part) for key, part in rows.groupby(["run", "source"], sort=False)}
    patterns = [
        Contrast(
            f"correlation of {CONTROLLED} by quintile between seeds, {run}",
            *(estimate, "above", 0.0, found.get((run, "null"))),
        )
        for (run, source), estimate in found.items()
        if source == "pruned"
    ]
    return [agreement, *patterns]


def _pattern(rows: pd.DataFrame) -> Estimate:
    """Correlation over quintiles between two seeds that are measured on different documents.

    On the same documents two seeds share what chance does there, and agree where nothing is. The
    mean over one half of the groups of documents is that of their pseudo-values.
    """
    rows = rows.set_index("group").loc[list(QUINTILES)]
    groups = len(rows["without"].iloc[0])
    by_seed = np.stack([np.reshape(list(part), (-1, groups)) for part in rows["by_seed"]], axis=1)
    num_seeds = len(by_seed)
    if num_seeds < 2:
        return no_estimate(math.nan, "fewer than two seeds")
    whole = by_seed.mean(2, keepdims=True)  # within rounding of what leaves nothing out
    pseudo = whole - (groups - 1) * (by_seed - whole)  # [seeds, quintiles, groups]
    odd = np.arange(groups) % 2 == 1

    def correlation(kept: np.ndarray) -> float:
        halves = [pseudo[..., kept & half].mean(2) for half in (odd, ~odd)]
        pairs = itertools.permutations(range(num_seeds), 2)
        found = [np.corrcoef(halves[0][a], halves[1][b])[0, 1] for a, b in pairs]
        return float(np.mean(found))

    every = np.ones(groups, dtype=bool)
    without = np.array([correlation(every & (np.arange(groups) != g)) for g in range(groups)])
    return jackknifed(correlation(every), without, "documents", scale="fisher")


def predictive(tables: Tables) -> list[Contrast]:
    """Claim 7 as published: the AUC of firing rate and sparsity in sample."""
    row = _predictor_row(tables, "shared_init", "in_sample", "pruned")
    return [Contrast("AUC (in sample, shared_init)", _named(row, "auc"), "above", 0.5)]


def predictive_beyond_start(tables: Tables) -> list[Contrast]:
    """Claim 7: of who persists better than under noise, by the stated sign, and better than by the
    distance from the start alone; latents of one condition are compared."""
    found = []
    for column, name, limit in (
        ("auc_within", "AUC within conditions, the rarer the better", 0.5),
        ("gain", "that AUC - that of the distance from the start", 0.0),
    ):
        pruned, null = (
            _named(_predictor_row(tables, "beyond_noise", STATED, source), column)
            for source in ("pruned", "null")
        )
        found.append(Contrast(f"{name} (beyond_noise)", pruned, "above", limit, null, limit))
    return found


def _predictor_row(tables: Tables, target: str, evaluation: str, source: str) -> Any:
    rows = rows_of(
        tables, "predictor", target=target, evaluation=evaluation, features="rate_sparsity"
    )
    rows = rows[(rows["tau"].isna() | (rows["tau"] == TAU)) & (rows["source"] == source)]
    (row,) = not_empty(list(rows.itertuples()), f"no predictor of {target} ({source})")
    return row


def _named(row: Any, column: str, resampled: str = "conditions") -> Estimate:
    """An estimate of a table with several."""
    if math.isnan(getattr(row, column)):
        raise NotMeasuredError(str(row.reason))
    numbers = (getattr(row, f"{column}{tail}") for tail in ("", "_error", "_df"))
    ends = (getattr(row, f"{column}{tail}") for tail in ("_least", "_most"))
    value, error, df = numbers
    least, most = ends
    scale: Scale = "logit" if column.startswith("auc") else "plain"
    return Estimate(value, error, df, resampled, least, most, scale)


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
