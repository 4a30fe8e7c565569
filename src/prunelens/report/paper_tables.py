"""The answer, and the paper's tables for this study: its numbers, and the published ones where
they agree.

Rows are those of the paper's tables for the study's own models and conditions; columns `paper_*`
hold what the paper printed for the same model, method and sparsity, and `paper_layer` the layer
that it was measured at. Nothing is computed but means, ratios and differences.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pandas as pd

from prunelens.analyses.verdict import LIMITS
from prunelens.config import StudyConfig
from prunelens.paper import published
from prunelens.report.answer import ANSWERS, answers
from prunelens.report.panels.causal import published_pairs
from prunelens.report.panels.panel import Tables, at_tau, of_first_seed
from prunelens.report.panels.transfer import OWN
from prunelens.report.published import beside_published, condition_of
from prunelens.report.tables import write_csvs
from prunelens.study.kind import CONDITION

SITE = list(CONDITION)
PAIR = [*SITE, "ablated_in"]


def write_paper_tables(
    tables: Tables, study: StudyConfig, out: pathlib.Path
) -> dict[str, pd.DataFrame]:
    """Write `tables/answers.csv`, `table1_perplexity.csv` … `tableB1_quality.csv` and `depth.csv`.

    Returns them by name. One without rows is not written, and one from an earlier run is removed.
    """
    made = paper_tables(tables, study)
    write_csvs(made, (ANSWERS, *_BUILDERS, MATRIX, DEPTH), out)
    return made


def paper_tables(tables: Tables, study: StudyConfig) -> dict[str, pd.DataFrame]:
    """Those tables by name; one whose results are not there is missing."""
    made = {ANSWERS: answers(tables)}
    for name, (needs, build) in _BUILDERS.items():
        if len(tables.get(needs, ())):
            made[name] = build(tables)
    made[MATRIX] = _matrix(study)
    depth = depth_table(tables)
    if len(depth):
        made[DEPTH] = depth
    return {name: table for name, table in made.items() if len(table)}


def depth_table(tables: Tables) -> pd.DataFrame:
    """One row per model, condition and layer: what the questions found there, as means.

    Columns fvu, stability (MNN between seeds), survival (shared_init), emerging (share of the
    pruned SAE's features that no dense one matches), corrected_shared, persistence,
    firing_rate_rho (per latent, shared_init); all at tau 0.7 where there is one.
    """
    frames = [t[SITE] for t in tables.values() if set(SITE) <= set(t)]
    if not frames:
        return pd.DataFrame()
    rows = pd.concat(frames).drop_duplicates("run").reset_index(drop=True)
    survival = _where(tables, "survival", arm="shared_init", coordinates="normalised")
    columns = {
        "fvu": _mean(_where(tables, "sae_quality"), "fvu"),
        "stability": _mean(_where(tables, "stability"), "mnn"),
        "survival": _mean(survival, "mnn"),
        "emerging": 1 - _mean(survival, "one_way_reverse"),
        "corrected_shared": _mean(_where(tables, "survival_corrected", arm="shared"), "corrected"),
        "persistence": _mean(_where(tables, "persistence", source="pruned"), "mean_correlation"),
        "firing_rate_rho": _mean(
            _where(tables, "fragility_tests", measure="shared_init"), "latent_rho"
        ),
    }
    for name, values in columns.items():
        rows[name] = rows["run"].map(values).astype(float)
    names = ["run", "model", "method", "sparsity", "layer", *columns]
    family = rows["run"].str.rsplit("/", n=1).str[-1]
    order = rows.assign(family=family).sort_values(["model", "family", "layer"], kind="stable")
    return order[names].reset_index(drop=True)


def _perplexity(tables: Tables) -> pd.DataFrame:
    """Table 1; the published number stands beside the shortest window, as the paper's is 256."""
    columns = ["run", "model", "method", "scope", "pattern", "sparsity", "context_tokens"]
    rows = tables["perplexity"].assign(condition=condition_of(tables["perplexity"]["run"]))
    rows = rows.drop_duplicates(["model", "condition", "context_tokens", "corpus"])  # not by layer
    rows = rows[[*columns, "perplexity"]]
    rows = beside_published(rows.reset_index(drop=True), "perplexity")
    shortest = rows["context_tokens"] == rows.groupby("model")["context_tokens"].transform("min")
    for name in ("paper_perplexity", "paper_note"):
        rows[name] = rows[name].where(shortest)
    return rows


def _transfer(tables: Tables) -> pd.DataFrame:
    """Table 2; the paper's FVU is read as fvu_raw, the space that official SAEs are made for.

    Its numbers are those of the official SAEs, so they do not stand beside our own.
    """
    rows = tables["transfer"]
    keys = [*SITE, "sae"]
    plain = rows[(rows["refit"] == "none") | rows["refit"].isna()]
    null = plain[plain["source"] == "null"].set_index(["run", "sae"])
    plain = plain[plain["source"] != "null"]
    every = plain[(plain["positions"] == "all") | plain["positions"].isna()]
    made = every[[*keys, "fvu_raw", "fvu", "l0", "ce_recovered", "reason"]].reset_index(drop=True)
    kept = plain[plain["positions"] == "norm_filtered"].set_index(["run", "sae"])
    wanted = ["fvu_dense_var", "l0", "ce_recovered"]
    made = made.join(kept[wanted].add_suffix("_filtered"), on=["run", "sae"])
    judged = kept[[*LIMITS, "verdict", "reason"]].rename(columns={"reason": "because"})
    made = made.join(judged, on=["run", "sae"])
    made = made.join(null["verdict"].rename("null_verdict"), on=["run", "sae"])
    made = beside_published(made, "transfer")
    ours = made["sae"].astype(str).str.fullmatch(OWN)
    for name in ("paper_fvu", "paper_l0", "paper_layer"):
        made[name] = made[name].where(~ours)
    return made


def _fragility(tables: Tables) -> pd.DataFrame:
    """Table 3: the two ends as published, by the first seed; means, persistence, beside noise."""
    rows = at_tau(tables["fragility"])
    rows = rows[rows["source"] != "null"]
    first = of_first_seed(at_tau(tables.get("fragility_by_seed", pd.DataFrame())))
    made = rows[SITE].drop_duplicates("run").reset_index(drop=True)
    for measure, prefix, part in (
        ("shared_init", "", first),
        ("shared_init", "mean_", rows),
        ("persistence", "persistence_", rows),
        ("relative_shuffled", "relative_", rows),
    ):
        of_measure = part[part["measure"] == measure] if len(part) else part
        for quintile, end in ((1, "q1_rare"), (5, "q5_frequent")):
            ends = of_measure[of_measure["quintile"] == quintile] if len(part) else part
            made[f"{prefix}{end}"] = made["run"].map(_mean(ends, "survival_rate"))
        if measure == "shared_init":
            made[f"{prefix}ratio"] = _ratio(made[f"{prefix}q1_rare"], made[f"{prefix}q5_frequent"])
    tests = _where(tables, "fragility_tests", measure="shared_init")
    for column in ("rho", "p_exact", "p_holm"):
        made[column] = made["run"].map(_mean(tests, column))
    made = beside_published(made, "fragility")
    made["paper_ratio"] = _ratio(made["paper_q1_rare"], made["paper_q5_frequent"])
    return made


def _causal(tables: Tables) -> pd.DataFrame:
    """Table 4: two rows per pair of models, ablated in the dense and in the pruned one."""
    rows = tables["causal"]
    rows = rows[rows["ablated_in"].isin(["dense", "pruned"])]
    made = rows[PAIR].drop_duplicates(["run", "ablated_in"]).reset_index(drop=True)

    def add(name: str, column: str = "kl_mean", **where: str) -> None:
        part = rows
        for key, value in where.items():
            part = part[part[key] == value]
        values = part.groupby(["run", "ablated_in"])[column].mean()
        made[name] = made[["run", "ablated_in"]].merge(
            values.rename(name), on=["run", "ablated_in"], how="left"
        )[name]

    published_view = {"grouping": "cosine", "protocol": "paper", "contexts": "final"}
    add("robust_kl", **published_view, group="robust")
    add("fragile_kl", **published_view, group="fragile")
    difference = (made["robust_kl"] - made["fragile_kl"]).abs()
    made["delta_percent"] = 100 * _ratio(difference, made["robust_kl"])
    add("reconstruction_share", "reconstruction_share", **published_view, group="robust")
    firing = {"grouping": "persistence", "protocol": "isolated", "contexts": "firing"}
    for group in ("robust", "matched", "fragile", "random", "random_direction"):
        add(f"isolated_{group}_kl", **firing, group=group)
    made = published_pairs(made)
    gap = (made["paper_robust_kl"] - made["paper_fragile_kl"]).abs()
    made["paper_delta_percent"] = 100 * _ratio(gap, made["paper_robust_kl"])
    return made


def _quality(tables: Tables) -> pd.DataFrame:
    """Table B.1: means over seeds."""
    rows = tables["sae_quality"].groupby(SITE, sort=False)
    made = (
        rows[["fvu", "fvu_raw", "fvu_dense_var", "l0", "alive", "num_latents"]].mean().reset_index()
    )
    made["seeds"] = rows["seed"].nunique().to_numpy()
    return beside_published(made, "sae_quality")


def _matrix(study: StudyConfig) -> pd.DataFrame:
    """Table A.1, one row per run; the paper's tier where model and layer agree."""
    theirs = {
        (row.model, int(layer)): row
        for row in published("matrix").itertuples()
        for layer in str(row.layers).split()
    }
    rows = []
    for model in study.models:
        for layer in model.layers:
            tier = theirs.get((model.label, layer))
            for pruning in (None, *study.conditions()):
                condition = pruning.label if pruning else "dense"
                row = {
                    "run": f"{model.label}/L{layer}/{condition}",
                    "model": model.label,
                    "layer": layer,
                    "method": pruning.criterion if pruning else "dense",
                    "scope": pruning.scope if pruning else "",
                    "sparsity": pruning.sparsity if pruning else 0.0,
                    "seeds": len(study.seeds_of(pruning)),
                    "steps": study.sae.steps,
                }
                names = ("tier", "purpose", "runs", "seeds", "steps")
                row |= {f"paper_{name}": getattr(tier, name, None) for name in names}
                rows.append(row)
    return pd.DataFrame(rows)


MATRIX, DEPTH = "tableA1_matrix", "depth"
_BUILDERS: dict[str, tuple[str, Callable[[Tables], pd.DataFrame]]] = {
    "table1_perplexity": ("perplexity", _perplexity),
    "table2_transfer": ("transfer", _transfer),
    "table3_fragility": ("fragility", _fragility),
    "table4_causal": ("causal", _causal),
    "tableB1_quality": ("sae_quality", _quality),
}


def _where(tables: Tables, name: str, **where: str) -> pd.DataFrame:
    """The rows of a table at the primary threshold whose columns have those values."""
    rows = tables.get(name, pd.DataFrame())
    for column, value in where.items():
        rows = rows[rows[column] == value] if len(rows) else rows
    return at_tau(rows) if "tau" in rows else rows


def _mean(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.groupby("run")[column].mean() if len(rows) else pd.Series(dtype=float)


def _ratio(above: pd.Series, below: pd.Series) -> pd.Series:
    """NaN where the denominator is 0."""
    return above / below.where(below > 0)
