"""Results of a study -> the CSV tables and `latents.parquet` (the output contract).

Columns are stable; docs/tables.md says what each means.
"""

from __future__ import annotations

import pathlib

import pandas as pd

from prunelens.analyses.claims import COLUMNS as CLAIM_COLUMNS
from prunelens.analyses.coverage import COLUMNS as COVERAGE_COLUMNS
from prunelens.analyses.grades import COLUMNS as GRADE_COLUMNS
from prunelens.analyses.grades import NULL_COLUMNS
from prunelens.analyses.noise import COLUMNS as CHANGE_COLUMNS
from prunelens.analyses.sinks import MOVED
from prunelens.analyses.verdict import LIMITS
from prunelens.csv_table import as_csv
from prunelens.temporary import replacing

_CONDITION = ["run", "model", "layer", "method", "sparsity"]
COLUMNS = {
    "perplexity": [
        "run", "model", "corpus", "method", "scope", "pattern", "sparsity", "achieved_sparsity",
        "context_tokens", "bos", "num_tokens", "nll", "perplexity",
    ],
    "sae_quality": [
        *_CONDITION, "seed", "fvu", "fvu_raw", "fvu_dense_var", "l0", "alive", "num_latents",
        "steps", "participation_ratio",
    ],
    "sae_training": [
        *_CONDITION, "init_seed", "data_seed", "rotated", "steps", "mean_init_retention",
        "fvu", "folder", "training", "fvu_raw",
    ],
    "stability": [*_CONDITION, "seed_a", "seed_b", "tau", "one_way", "mnn", "greedy"],
    "survival": [
        *_CONDITION, "arm", "coordinates", "init_a", "order_a", "init_b", "order_b", "tau",
        "one_way", "mnn", "greedy", "one_way_reverse",
    ],
    "survival_corrected": [
        *_CONDITION, "arm", "tau", "corrected", "low", "high", "interval", "reason",
    ],
    "sinks": [
        *_CONDITION, "split", "num_tokens", "num_left_out", "num_sinks", "largest_norm",
        *(f"{name}{tail}" for name in MOVED for tail in ("", "_without")),
    ],
    "common_change": [*_CONDITION, *CHANGE_COLUMNS],
    "persistence": [
        *_CONDITION, "seed", "source", "mean_correlation", "mean_jaccard", "share_above_0.7",
        "num_silenced", "num_undefined", "excess_z", "relative_shuffled", "relative_shuffled_low",
        "relative_shuffled_high", "relative_isotropic", "relative_isotropic_low",
        "relative_isotropic_high",
    ],
    "activation_matching": [
        *_CONDITION, "arm", "init_a", "order_a", "init_b", "order_b", "tau", "one_way", "mnn",
        "greedy", "one_way_reverse", "source",
    ],
    "scaling": [
        *_CONDITION, "seed", "source", "mean_scaling", "median_scaling", "share_above_half_median",
        "num_undefined",
    ],
    "subspace": [*_CONDITION, "arm", "init_a", "order_a", "init_b", "order_b", "overlap"],
    "sufficiency": [
        *_CONDITION, "trained_enough", "mean_init_retention", "fvu_fall", "fvu_fall_schedule",
        "fvu_fall_beyond_schedule", "reason",
    ],
    "training_curves": [*_CONDITION, "seed", "total_steps", "step", "fvu", "mean_init_retention"],
    "survival_by_step": [
        *_CONDITION, "step", "arm", "init_a", "init_b", "tau", "mnn", "one_way", "greedy",
    ],
    "transfer": [
        *_CONDITION, "sae", "positions", "refit", "fvu", "fvu_raw", "fvu_dense_var", "l0",
        "ce_recovered", "verdict", "ce_model", "ce_mean_ablated", "ce_sae", "reason", "source",
        *(f"{name}{tail}" for name in LIMITS for tail in ("", "_low", "_high")),
        "num_windows", "num_documents",
    ],
    "fragility": [
        *_CONDITION, "measure", "tau", "quintile", "firing_rate", "survival_rate", "num_latents",
        "source", "num_dropped",
    ],
    "fragility_contrasts": [
        *_CONDITION, "measure", "source", "group", "value", "low", "high", "error", "df",
        "num_latents", "num_dropped", "resampled",
    ],
    "fragility_by_seed": [
        *_CONDITION, "seed", "measure", "tau", "quintile", "firing_rate", "survival_rate",
        "num_latents", "source", "num_dropped",
    ],
    "fragility_tests": [
        *_CONDITION, "measure", "tau", "rho", "p_exact", "p_holm", "latent_rho", "ci_low",
        "ci_high", "partial_rho", "partial_low", "partial_high", "p_smallest", "p_holm_smallest",
        "num_latents", "resampled", "reason", "source",
    ],
    "predictor": [
        "run", "tau", "evaluation", "features", "auc", "accuracy", "coef_log_rate",
        "coef_sparsity", "num_rows", "target", "auc_low", "auc_high", "auc_within",
        "auc_within_low", "auc_within_high", "base_rate",
        "coef_log_rate_low", "coef_log_rate_high", "coef_sparsity_low", "coef_sparsity_high",
        "standardised_log_rate", "standardised_sparsity", "num_conditions", "reason",
        "source", "gain", "gain_low", "gain_high",
    ],
    "predictor_calibration": [
        "run", "target", "tau", "evaluation", "features", "bin", "predicted", "observed",
        "num_rows",
    ],
    "causal": [
        *_CONDITION, "grouping", "group", "protocol", "contexts", "kl_mean", "ci_low", "ci_high",
        "num_latents", "num_prompts", "firing_share", "ablated_in", "reconstruction_share",
        "num_seeds", "num_documents", "largest_share", "resampled", "error", "df", "least", "most",
        "skew", "reason",
    ],
    "selftest": [*_CONDITION, *GRADE_COLUMNS],
    "selftest_null": [*_CONDITION, *NULL_COLUMNS],
    "coverage": ["run", *COVERAGE_COLUMNS],
    "claims": ["run", *CLAIM_COLUMNS],
}  # fmt: skip


def write_tables(results: dict[str, pd.DataFrame], out: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Write `tables/*.csv` and `latents.parquet`; returns the tables as written, by name.

    A table without results is not written, and one from an earlier run is removed.
    """
    (out / "tables").mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, columns in COLUMNS.items():
        path = out / "tables" / f"{name}.csv"
        if name in results:
            tables[name] = results[name].reindex(columns=columns)
            write_if_changed(path, as_csv(tables[name]).encode())
        else:
            path.unlink(missing_ok=True)
    if "latents" in results:
        leading = [*_CONDITION, "scope", "pattern"]
        rest = [name for name in results["latents"] if name not in leading]
        with replacing(out / "latents.parquet") as file:
            results["latents"][[*leading, *rest]].to_parquet(file, index=False)
    return tables


def write_if_changed(path: pathlib.Path, content: bytes) -> None:
    """Replace a file whole; one that has that content is not touched, so its time is its age."""
    if path.is_file() and path.read_bytes() == content:
        return
    with replacing(path) as file:
        file.write_bytes(content)
