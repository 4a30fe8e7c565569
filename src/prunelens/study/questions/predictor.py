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
            """
            tau: The least cosine of a match, of targets that match.
            evaluation: `in_sample`, `held_out_condition`, `held_out_model` or `stated_sign`.
            features: What is known of a latent: `rate_sparsity`, or a baseline.
            auc: AUC of the predictions over all rows.
            accuracy: Share of rows told right; to be read beside `base_rate`.
            coef_log_rate coef_sparsity: Coefficient of natural log firing rate and of sparsity.
            num_rows: Rows of condition, seed and alive dense latent.
            target: What counts as surviving.
            auc_low auc_high
            auc_within: AUC that compares latents of the same condition only.
            auc_within_low auc_within_high
            base_rate: Share of the larger class, which accuracy has to beat.
            coef_log_rate_low coef_log_rate_high coef_sparsity_low coef_sparsity_high
            standardised_log_rate standardised_sparsity: The coefficient per standard deviation.
            num_conditions: Conditions that have a row.
            reason
            source: `pruned` or `null`.
            gain: `auc_within` less that of "the nearer to its start the better".
            gain_low gain_high""",
            leading=("run",),
        ),
        Table(
            "predictor_calibration",
            "the same, bin",
            "does a predicted 30 % mean 30 %",
            "calibration.parquet",
            """
            target tau evaluation features: As in `predictor.csv`.
            bin: Tenth of the rows, from the least likely, 1, to the likeliest, 10.
            predicted observed: Mean prediction, and share of the rows where it came true.
            num_rows: Rows of the bin.""",
            leading=("run",),
        ),
    ),
)
