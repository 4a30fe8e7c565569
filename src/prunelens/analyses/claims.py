"""The paper's eleven claims, judged twice on a study's own tables (methods §7, Claims).

Each claim is a registered set of contrasts, by the paper's protocol and by the controlled one. A
contrast `holds` or `fails` if its 95 % interval, adjusted over the contrasts of its claim, lies
wholly on one side of its limit, and is `undecided` otherwise, or where it finds something on the
null. A claim holds if all of its contrasts do, and fails if one does. What is believed is the
controlled judgement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from prunelens.analyses import claim_numbers
from prunelens.analyses.contrast import Contrast, NotMeasuredError, Tables
from prunelens.analyses.statistics import Estimate, holm_adjusted
from prunelens.columns import meanings_of

Verdict = Literal["holds", "fails", "undecided"]
LEVEL = 0.025  # in either direction, so that an interval of 95 % and a verdict agree

COLUMNS = """
claim: Number of the paper's claim, 1 to 11.
paper_protocol: `holds`, `fails` or `undecided`, by `paper_rule`.
controlled: `holds`, `fails` or `undecided`, by `controlled_rule`.
verdict: The controlled one.
why: The numbers that decided; or that nothing was measured.
statement: What the paper says.
paper_rule: When the claim holds by the paper's protocol.
controlled_rule: When it holds by the controlled one.
paper_contrasts controlled_contrasts: All numbers of that protocol, not only those that decided.
"""


class Claim(NamedTuple):
    """A sentence of the paper, and what would show it right or wrong."""

    statement: str
    paper_rule: str
    paper: Callable[[Tables], list[Contrast]]
    controlled_rule: str
    controlled: Callable[[Tables], list[Contrast]]
    compares_dictionaries: bool = False
    """Whether the controlled contrasts rest on SAEs of two trainings: then these must be trained
    enough."""


CLAIMS: dict[int, Claim] = {
    1: Claim(
        "Rare latents survive pruning better than frequent ones",
        "survival (shared_init, tau 0.7) of Q1 minus Q5 is above 0",
        claim_numbers.rare_minus_frequent_as_published,
        "persistence relative to shuffled noise (a ratio of group means), Q1 minus Q5, is above 0"
        " in every condition",
        claim_numbers.rare_minus_frequent,
    ),
    2: Claim(
        "Wanda preserves more features than magnitude pruning at equal sparsity",
        "survival (shared_init, tau 0.7), Wanda minus magnitude, is above 0",
        claim_numbers.wanda_survival,
        "mean persistence, Wanda minus magnitude, is above 0 at every sparsity, but not on the"
        " null",
        claim_numbers.wanda_persistence,
    ),
    3: Claim(
        "Wanda consistently has the lower perplexity at equal sparsity",
        "nats per token at the shortest window, Wanda minus magnitude, below 0 at every sparsity",
        lambda t: claim_numbers.wanda_nll(t, "shortest"),
        "the same at the longest window",
        lambda t: claim_numbers.wanda_nll(t, "longest"),
    ),
    4: Claim(
        "The dense SAE stays usable on activations pruned by Wanda to 50 %",
        "its raw FVU over all positions is below 0.025",
        claim_numbers.fvu_at_half,
        "norm-filtered, fvu_dense_var and fvu_raw are below 1.25 x dense and CE recovered above"
        " dense - 0.02, of every SAE",
        claim_numbers.usable_at_half,
    ),
    5: Claim(
        "Geometric survival does not predict causal importance",
        "KL (paper), robust minus fragile, lies within 10 % of the mean isolated KL around 0",
        claim_numbers.robust_equals_fragile,
        "isolated KL where the latent fires, matched minus fragile (grouped by persistence), lies"
        " within 10 % of the mean isolated KL around 0",
        claim_numbers.matched_equals_fragile,
    ),
    6: Claim(
        "Seeds disagree in their features but agree in the pattern of survival",
        "MNN between dense seeds (tau 0.7) is below 0.5, and survival by quintile correlates"
        " above 0 between seeds",
        claim_numbers.seeds_as_published,
        "MNN of other starts beyond chance is below 0.5, and persistence relative to noise by"
        " quintile correlates above 0 between seeds on different documents, in every condition",
        claim_numbers.seeds_controlled,
        True,
    ),
    7: Claim(
        "Firing rate and sparsity predict survival",
        "AUC in sample on survival (shared_init, tau 0.7) is above 0.5",
        claim_numbers.predictive,
        "of who persists better than under noise: the AUC of the rarer within conditions is above"
        " 0.5, and above that of the distance from the start",
        claim_numbers.predictive_beyond_start,
    ),
    8: Claim(
        "Rare latents (Q1, Q2) are robust up to 40-50 % sparsity",
        "survival (shared_init, tau 0.7) of Q1 and of Q2 is above 0.5 in every such condition",
        claim_numbers.rare_at_half_as_published,
        "mean persistence of Q1 and of Q2 is above 0.7 and above what noise of equal size leaves,"
        " in every such condition",
        claim_numbers.rare_at_half,
    ),
    9: Claim(
        "Single ablations have less effect after pruning",
        "KL (paper), pruned minus dense, is below 0",
        lambda t: claim_numbers.ablation_after_pruning(t, "paper", "final"),
        "isolated KL where the latent fires, pruned minus dense, is below 0",
        lambda t: claim_numbers.ablation_after_pruning(t, "isolated", "firing"),
        True,
    ),
    10: Claim(
        "FVU falls after pruning because activations get simpler",
        "FVU of the pruned model's SAE minus that of the dense one is below 0",
        claim_numbers.fvu_falls,
        "fvu_dense_var, and the participation ratio of the activations' covariance, both fall",
        claim_numbers.activations_get_simpler,
        True,
    ),
    11: Claim(
        "Survival stands at least 18 times above the seed floor",
        "survival (shared_init, tau 0.7, sparsity at most 30 %) minus 18 times the stability of"
        " dense seeds is above 0",
        claim_numbers.above_seed_floor,
        "survival (shared_start) minus 18 times that of a space with nothing in common is above 0",
        claim_numbers.above_start_floor,
        True,
    ),
}


def judge_claims(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per claim, with COLUMNS; `tables` are a study's results by name.

    `verdict` is the controlled judgement. What the study did not measure is undecided, and `why`
    says so; so is a controlled claim whose contrasts compare dictionaries that are not known to be
    trained enough, and a contrast that finds something on the null.
    """
    rows = []
    untrained = _not_trained_enough(tables)
    for number, claim in CLAIMS.items():
        paper, paper_why = _judged(claim.paper, tables)
        controlled, controlled_why = _judged(claim.controlled, tables)
        if claim.compares_dictionaries and untrained and controlled != "undecided":
            told = f"{untrained}; {controlled_why.decisive}"
            controlled, controlled_why = "undecided", controlled_why._replace(decisive=told)
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
    return pd.DataFrame(rows, columns=[*meanings_of(COLUMNS)])


def verdicts_of(contrasts: Sequence[Contrast]) -> list[Verdict]:
    """On which side of its limit each contrast of one claim lies.

    `holds` and `fails` are shown at 2.5 % each, by one-sided p-values that are adjusted (Holm) over
    the contrasts, in either direction for itself. A contrast that would fall otherwise without one
    of the units that its interval leaves out, or that speaks on the null, is undecided; so is one
    that misses a level which the null misses too.
    """
    found: list[Verdict] = ["undecided"] * len(contrasts)
    verdicts: tuple[Verdict, Verdict] = ("holds", "fails")
    for verdict, p in zip(verdicts, zip(*map(_p_values, contrasts), strict=True), strict=True):
        for number, adjusted in enumerate(holm_adjusted(np.array(p))):
            contrast = contrasts[number]
            if adjusted <= LEVEL and not contrast.speaks_on_null and _is_steady(contrast, verdict):
                found[number] = verdict
    return [
        "undecided" if verdict == "fails" and _null_fails_too(contrast) else verdict
        for verdict, contrast in zip(found, contrasts, strict=True)
    ]


def _null_fails_too(contrast: Contrast) -> bool:
    """Whether noise of that size misses the level as well."""
    if contrast.null is None or contrast.nothing is not None:
        return False
    return _p_values(contrast._replace(estimate=contrast.null))[1] <= LEVEL


def _p_values(contrast: Contrast) -> tuple[float, float]:
    """Of `it does not hold` and of `it does not fail`; NaN without an interval."""
    estimate, limit = contrast.estimate, contrast.limit
    if contrast.side == "within":
        inside = max(estimate.p_above(-limit), estimate.p_below(limit))
        return inside, min(estimate.p_above(limit), estimate.p_below(-limit))
    above, below = estimate.p_above(limit), estimate.p_below(limit)
    return (above, below) if contrast.side == "above" else (below, above)


def _is_steady(contrast: Contrast, verdict: Verdict) -> bool:
    """Whether the verdict is the same without any one of the units left out in turn."""
    ends = (contrast.estimate.least, contrast.estimate.most)
    moved = [contrast.estimate._replace(value=end) for end in ends if not math.isnan(end)]
    which = 0 if verdict == "holds" else 1
    return all(_p_values(contrast._replace(estimate=each))[which] <= LEVEL for each in moved)


def _not_trained_enough(tables: Tables) -> str:
    """Why comparisons of dictionaries decide nothing; empty where they may."""
    rows = tables.get("sufficiency")
    if rows is None or not (judged := rows["trained_enough"].dropna()).size:
        return "it is not known whether the SAEs are trained enough to be compared"
    if not judged.astype(bool).all():
        return "the SAEs are not trained enough to be compared"
    return ""


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
    verdicts = verdicts_of(found)
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
    estimate, null = contrast.estimate, contrast.null
    limit = f"+-{contrast.limit:.3g}" if contrast.side == "within" else f"{contrast.limit:.3g}"
    told = f"{contrast.name} = {_numbers(estimate)}, wanted {contrast.side} {limit}"
    if null is not None:
        said = (
            "speaks on the null and decides nothing" if contrast.speaks_on_null else "on the null"
        )
        told += f", {said}: {_numbers(null)}"
    return f"{told} (resampled: {estimate.resampled})"


def _numbers(estimate: Estimate) -> str:
    low, high = estimate.bounds()
    interval = "no interval" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
    return f"{estimate.value:.4g} {interval}"
