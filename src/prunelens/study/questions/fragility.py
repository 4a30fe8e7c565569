"""RQ4: are rare latents harmed less than frequent ones?"""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.fragility import (
    fragility_contrasts,
    fragility_tests,
    quintiles,
    quintiles_by_seed,
)
from prunelens.study.kind import Question, Table
from prunelens.study.work import Work


def _fragility(work: Work) -> None:
    found = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    taus = work.config["taus"]
    quintiles(found, taus).to_parquet(work.out / "quintiles.parquet")
    quintiles_by_seed(found, taus).to_parquet(work.out / "by_seed.parquet")
    fragility_contrasts(found).to_parquet(work.out / "contrasts.parquet")
    fragility_tests(found, taus).to_parquet(work.out / "tests.parquet")


FRAGILITY = Question(
    "fragility",
    3,
    _fragility,
    asked=("fragility",),
    config=lambda run: run.taus(),
    parents=lambda run: {"fates": run.answers["fates"]},
    tables=(
        Table(
            "fragility",
            "pruned run, measure, source, tau, quintile",
            "RQ4: do rare latents survive better",
            "quintiles.parquet",
            """
            measure tau
            quintile: Fifth of the alive latents by firing rate, 1 rare to 5 frequent.
            firing_rate survival_rate: Mean over seeds of the mean over its latents with a value.
            num_latents source num_dropped""",
        ),
        Table(
            "fragility_by_seed",
            "pruned run, seed, measure, source, tau, quintile",
            "the same of every seed",
            "by_seed.parquet",
            """
            seed measure tau
            quintile: Fifth of the alive latents by firing rate, 1 rare to 5 frequent.
            firing_rate survival_rate: Mean over the latents that have a value.
            num_latents source num_dropped""",
        ),
        Table(
            "fragility_contrasts",
            "pruned run, measure, source, group",
            "fifths, all latents and rarest minus most frequent, with intervals",
            "contrasts.parquet",
            """
            measure source
            group: `Q1` (rare) to `Q5`, `all`, or the difference `Q1 - Q5`.
            value: Mean over seeds of the measure's value of the group.
            low high error df num_latents num_dropped resampled""",
        ),
        Table(
            "fragility_tests",
            "pruned run, measure, source, tau",
            "the same as rank correlations, with intervals and p-values",
            "tests.parquet",
            """
            measure tau
            rho: Spearman correlation of firing rate and survival over the quintiles.
            p_exact: Exact two-sided permutation p of `rho`; never below `p_smallest`.
            p_holm: `p_exact` adjusted over conditions; never below `p_holm_smallest`.
            latent_rho: Rank correlation over latents of firing rate and survival; mean over seeds.
            ci_low ci_high: Ends of the 95 % interval of `latent_rho`, made on Fisher's scale.
            partial_rho: `latent_rho` with `init_retention` held fixed.
            partial_low partial_high: Ends of that of `partial_rho`, made on Fisher's scale.
            p_smallest: The smallest p that five quintiles allow, 2/120.
            p_holm_smallest: The smallest adjusted p that so many conditions allow.
            num_latents resampled reason source""",
        ),
    ),
)
