"""The predictor on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.paper import published
from prunelens.report.panels.overall import calibration
from prunelens.report.panels.panel import PRIMARY_TAU, Tables, at_tau
from prunelens.report.questions.section import Section


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    return {"predictor at 0.7": _predictor(tables)} if len(tables.get("predictor", ())) else {}


def _predictor(tables: Tables) -> pd.DataFrame:
    """The paper's numbers stand beside a study of one of its models; they pool all three."""
    rows = at_tau(tables["predictor"])
    columns = ["target", "source", "evaluation", "features", "tau", "auc", "auc_low", "auc_high"]
    columns += ["auc_within", "gain", "gain_low", "gain_high", "accuracy", "base_rate"]
    columns += ["coef_log_rate", "coef_sparsity", "num_rows", "reason"]
    rows = rows[columns].reset_index(drop=True)
    models = {str(m) for t in tables.values() if "model" in t for m in t["model"].unique()}
    if models & set(published("matrix")["model"]):
        theirs = published("predictor")
        found = theirs[theirs["tau"] == PRIMARY_TAU].iloc[0]
        same = (
            (rows["target"] == "quintile")
            & (rows["evaluation"] == "in_sample")
            & (rows["features"] == "rate_sparsity")
        )
        for name in ("auc", "accuracy"):
            rows[f"paper_{name}"] = pd.Series(found[name], index=rows.index).where(same)
    return rows


PREDICTOR = Section(
    "predictor",
    "Predictor: can the fate of a latent be told before pruning?",
    "A logistic model of the logarithm of the firing rate and of the sparsity.",
    "Judged on the data that it was fitted to, with survival under a shared start as the truth."
    " The paper pools its three models.",
    "Judged on conditions and models that it has not seen; the truth is who persists better"
    " than under noise, even odds for every latent where nothing is there (source: null)."
    " Beside it what the distance from the start alone predicts; gain is what is left beyond.",
    tables={"predictor at 0.7": "Predictor by evaluation; tau 0.7, or none for persistence"},
    more={"predictor": "Every predictor", "predictor_calibration": "Calibration"},
    assumed={
        "predictor at 0.7": (
            "The paper's accuracies are 66, 73 and 79 of 95 = 19 conditions x 5"
            " quintiles, so its numbers are set beside target quintile, a row per condition and"
            " quintile."
        )
    },
    needs=("predictor",),
    made=_made,
    further=lambda tables: {"Calibration": calibration(tables)},
)
