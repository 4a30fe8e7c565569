"""The paper's eleven claims, judged twice on a study's own tables (methods §7, Claims).

Each claim is a registered set of contrasts, by the paper's protocol and by the controlled one. A
contrast `holds` or `fails` if its 95 % interval lies wholly on one side of its limit, and is
`undecided` otherwise. A claim holds if all of its contrasts do, and fails if one does. What is
believed is the controlled judgement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import pandas as pd

from prunelens.analyses import contrasts
from prunelens.analyses.contrast import Contrast, NotMeasuredError, Tables

Verdict = Literal["holds", "fails", "undecided"]

COLUMNS = [
    "claim", "paper_protocol", "controlled", "verdict", "why", "statement", "paper_rule",
    "controlled_rule", "paper_contrasts", "controlled_contrasts",
]  # fmt: skip


class Claim(NamedTuple):
    """A sentence of the paper, and what would show it right or wrong."""

    statement: str
    paper_rule: str
    paper: Callable[[Tables], list[Contrast]]
    controlled_rule: str
    controlled: Callable[[Tables], list[Contrast]]


CLAIMS: dict[int, Claim] = {
    1: Claim(
        "Rare latents survive pruning better than frequent ones",
        "survival (shared_init, tau 0.7) of Q1 minus Q5 is above 0",
        lambda t: contrasts.rare_minus_frequent(t, "shared_init"),
        "persistence relative to shuffled noise of Q1 minus Q5 is above 0",
        lambda t: contrasts.rare_minus_frequent(t, "relative_shuffled"),
    ),
    2: Claim(
        "Wanda preserves more features than magnitude pruning at equal sparsity",
        "survival (shared_init, tau 0.7), Wanda minus magnitude, is above 0",
        contrasts.wanda_survival,
        "mean persistence, Wanda minus magnitude, is above 0",
        contrasts.wanda_persistence,
    ),
    3: Claim(
        "Wanda consistently has the lower perplexity at equal sparsity",
        "nats per token at the shortest window, Wanda minus magnitude, below 0 at every sparsity",
        lambda t: contrasts.wanda_nll(t, "shortest"),
        "the same at the longest window",
        lambda t: contrasts.wanda_nll(t, "longest"),
    ),
    4: Claim(
        "The dense SAE stays usable on activations pruned by Wanda to 50 %",
        "its FVU over all positions is below 0.025",
        contrasts.fvu_at_half,
        "norm-filtered, fvu_dense_var is below 1.25 x dense and CE recovered above dense - 0.02",
        contrasts.usable_at_half,
    ),
    5: Claim(
        "Geometric survival does not predict causal importance",
        "KL (paper), robust minus fragile, lies within 10 % of the mean isolated KL around 0",
        contrasts.robust_equals_fragile,
        "isolated KL where the latent fires, matched minus fragile (grouped by persistence), lies"
        " within 10 % of the mean isolated KL around 0",
        contrasts.matched_equals_fragile,
    ),
    6: Claim(
        "Seeds disagree in their features but agree in the pattern of survival",
        "MNN between dense seeds (tau 0.7) is below 0.5, and survival by quintile correlates"
        " above 0 between seeds",
        contrasts.seeds_as_published,
        "MNN of other starts beyond chance is below 0.5, and persistence relative to noise by"
        " quintile correlates above 0 between seeds",
        contrasts.seeds_controlled,
    ),
    7: Claim(
        "Firing rate and sparsity predict survival",
        "AUC in sample on survival (shared_init, tau 0.7) is above 0.5",
        lambda t: contrasts.predictive(t, "shared_init", "in_sample", "auc"),
        "ranked by the fit to the other conditions, AUC within each, on persistence above 0.7, is"
        " above 0.5",
        lambda t: contrasts.predictive(t, "persistence", "held_out_condition", "auc_within"),
    ),
    8: Claim(
        "Rare latents (Q1, Q2) are robust up to 40-50 % sparsity",
        "survival (shared_init, tau 0.7) of Q1 and of Q2 is above 0.5 in every such condition",
        lambda t: contrasts.rare_at_half(t, "shared_init", 0.5),
        "mean persistence of Q1 and of Q2 is above 0.7 in every such condition",
        lambda t: contrasts.rare_at_half(t, "persistence", 0.7),
    ),
    9: Claim(
        "Single ablations have less effect after pruning",
        "KL (paper), pruned minus dense, is below 0",
        lambda t: contrasts.ablation_after_pruning(t, "paper", "final"),
        "isolated KL where the latent fires, pruned minus dense, is below 0",
        lambda t: contrasts.ablation_after_pruning(t, "isolated", "firing"),
    ),
    10: Claim(
        "FVU falls after pruning because activations get simpler",
        "FVU of the pruned model's SAE minus that of the dense one is below 0",
        contrasts.fvu_falls,
        "fvu_dense_var, and the participation ratio of the activations' covariance, both fall",
        contrasts.activations_get_simpler,
    ),
    11: Claim(
        "Survival stands at least 18 times above the seed floor",
        "survival (shared_init, tau 0.7, sparsity at most 30 %) minus 18 times the stability of"
        " dense seeds is above 0",
        contrasts.above_seed_floor,
        "survival (shared_start) minus 18 times that of a space with nothing in common is above 0",
        contrasts.above_start_floor,
    ),
}


def judge_claims(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per claim, with COLUMNS; `tables` are a study's results by name.

    `verdict` is the controlled judgement. What the study did not measure is undecided, and `why`
    says so.
    """
    rows = []
    for number, claim in CLAIMS.items():
        paper, paper_why = _judged(claim.paper, tables)
        controlled, controlled_why = _judged(claim.controlled, tables)
        rows.append(
            {
                "claim": number,
                "paper_protocol": paper,
                "controlled": controlled,
                "verdict": controlled,
                "why": f"paper: {paper_why.decisive}; controlled: {controlled_why.decisive}",
                "statement": claim.statement,
                "paper_rule": claim.paper_rule,
                "controlled_rule": claim.controlled_rule,
                "paper_contrasts": paper_why.everything,
                "controlled_contrasts": controlled_why.everything,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict_of(contrast: Contrast) -> Verdict:
    """On which side of its limit the contrast's interval lies."""
    low, high, limit = contrast.low, contrast.high, contrast.limit
    if contrast.side == "within":
        inside, outside = -limit < low and high < limit, low > limit or high < -limit
    elif contrast.side == "above":
        inside, outside = low > limit, high < limit
    else:
        inside, outside = high < limit, low > limit
    return "holds" if inside else "fails" if outside else "undecided"  # NaN: neither


class _Why(NamedTuple):
    decisive: str
    """The contrast that decided."""
    everything: str
    """All contrasts, one after the other."""


def _judged(
    contrasts_of: Callable[[Tables], list[Contrast]], tables: Tables
) -> tuple[Verdict, _Why]:
    try:
        found = contrasts_of(tables)
    except NotMeasuredError as reason:
        return "undecided", _Why(f"not measured ({reason})", "")
    verdicts = [verdict_of(contrast) for contrast in found]
    everything = "; ".join(map(_in_words, found))
    for decisive in ("fails", "undecided", "holds"):
        if decisive in verdicts:
            return decisive, _Why(_decisive(found, verdicts, decisive), everything)
    raise AssertionError("a claim has at least one contrast")


def _decisive(found: Sequence[Contrast], verdicts: Sequence[Verdict], verdict: Verdict) -> str:
    """The first contrast with that verdict, and how many share it."""
    count = verdicts.count(verdict)
    text = _in_words(found[verdicts.index(verdict)])
    return text if len(found) == 1 else f"{text} ({count} of {len(found)} contrasts: {verdict})"


def _in_words(contrast: Contrast) -> str:
    value, low, high = contrast.value, contrast.low, contrast.high
    limit = f"+-{contrast.limit:.3g}" if contrast.side == "within" else f"{contrast.limit:.3g}"
    interval = "no interval" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
    return (
        f"{contrast.name} = {value:.4g} {interval}, wanted {contrast.side} {limit}"
        f" (resampled: {contrast.resampled})"
    )
