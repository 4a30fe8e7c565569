"""Can the fate of a latent be told before pruning? Asked of all runs at once."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.predictor import fit_predictor
from prunelens.study.kind import StageKind, Table
from prunelens.study.work import Work, write_json


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


PREDICTOR = StageKind(
    "predictor",
    2,
    _predictor,
    tables=(
        Table(
            "predictor",
            "target, source, tau, evaluation, features",
            "can survival be told before pruning",
            "predictor.parquet",
            "tau evaluation features auc accuracy coef_log_rate coef_sparsity num_rows target "
            "auc_low auc_high auc_within auc_within_low auc_within_high base_rate "
            "coef_log_rate_low coef_log_rate_high coef_sparsity_low coef_sparsity_high "
            "standardised_log_rate standardised_sparsity num_conditions reason source gain "
            "gain_low gain_high",
            leading=("run",),
        ),
        Table(
            "predictor_calibration",
            "the same, bin",
            "does a predicted 30 % mean 30 %",
            "calibration.parquet",
            "target tau evaluation features bin predicted observed num_rows",
            leading=("run",),
        ),
    ),
)
