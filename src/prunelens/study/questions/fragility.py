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
            "measure tau quintile firing_rate survival_rate num_latents source num_dropped",
        ),
        Table(
            "fragility_by_seed",
            "pruned run, seed, measure, source, tau, quintile",
            "the same of every seed",
            "by_seed.parquet",
            "seed measure tau quintile firing_rate survival_rate num_latents source num_dropped",
        ),
        Table(
            "fragility_contrasts",
            "pruned run, measure, source, group",
            "fifths, all latents and rarest minus most frequent, with intervals",
            "contrasts.parquet",
            "measure source group value low high error df num_latents num_dropped resampled",
        ),
        Table(
            "fragility_tests",
            "pruned run, measure, source, tau",
            "the same as rank correlations, with intervals and p-values",
            "tests.parquet",
            "measure tau rho p_exact p_holm latent_rho ci_low ci_high partial_rho partial_low "
            "partial_high p_smallest p_holm_smallest num_latents resampled reason source",
        ),
    ),
)
