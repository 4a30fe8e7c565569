"""One row per run: the means that the page shows first."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from prunelens.paper import published
from prunelens.report.panels.panel import PRIMARY_TAU, Tables, at_tau
from prunelens.report.published import beside_published

KEYS = ["run", "model", "method", "sparsity"]

ENOUGH_RETENTION = 0.9  # mean cosine to the start above which dictionaries are not trained enough
ENOUGH_FALL = 0.02  # relative fall of FVU over the last quarter above which training was cut short


class Training(NamedTuple):
    """Whether the dense SAEs can be compared at all."""

    init_retention: float
    """Mean cosine of the latents to their start."""
    fall: float
    """Share by which FVU still fell over the last quarter of the steps."""

    @property
    def enough(self) -> bool:
        """They left their start and had settled."""
        return self.init_retention < ENOUGH_RETENTION and self.fall < ENOUGH_FALL


def overviews(tables: Tables) -> dict[str, pd.DataFrame]:
    """Those tables by name (the keys of `questions.CAPTIONS` that are no CSV)."""
    made = {}
    if len(tables.get("stability", ())):
        made["stability by run"] = _stability(tables["stability"])
    if len(tables.get("survival", ())):
        made["survival by run"] = _survival(tables)
    if len(tables.get("predictor", ())):
        made["predictor at 0.7"] = _predictor(tables)
    quality = training(tables)
    if quality is not None:
        wanted = [f"below {ENOUGH_RETENTION}", f"below {ENOUGH_FALL}"]
        measured = ["mean cosine to the start", "fall of FVU over the last quarter"]
        rows = {"measure": measured, "value": list(quality), "wanted": wanted}
        made["training by run"] = pd.DataFrame(rows)
    return made


def training(tables: Tables) -> Training | None:
    """How far the dense SAEs came; None where no training is recorded."""
    rows = tables.get("sae_training", pd.DataFrame())
    if not len(rows):
        return None
    dense = rows[(rows["method"] == "dense") & ~rows["rotated"].astype(bool)]
    fall = (1 - dense["fvu"] / dense["fvu_at_three_quarters"]).mean()
    return Training(float(dense["mean_init_retention"].mean()), float(fall))


def _stability(table: pd.DataFrame) -> pd.DataFrame:
    groups = at_tau(table).groupby(KEYS, sort=False)
    made = groups[["mnn", "one_way", "greedy"]].mean().reset_index()
    made["pairs"] = groups.size().to_numpy()
    return beside_published(made, "stability")


def _survival(tables: Tables) -> pd.DataFrame:
    rows = at_tau(tables["survival"])
    rows = rows[rows["coordinates"] == "normalised"]
    pruned = rows[rows["method"] != "dense"]
    made = pruned[KEYS].drop_duplicates("run").reset_index(drop=True)

    def add(name: str, part: pd.DataFrame, column: str) -> None:
        made[name] = made["run"].map(part.groupby("run")[column].mean())

    shared = pruned[pruned["arm"] == "shared_init"]
    add("mnn", shared, "mnn")
    made = beside_published(made, "survival").rename(columns={"mnn": "survival (mnn)"})
    add("emerging", shared.assign(emerging=1 - shared["one_way_reverse"]), "emerging")
    for arm in ("shared_start", "cross_init"):
        add(arm, pruned[pruned["arm"] == arm], "mnn")
    corrected = tables.get("survival_corrected", pd.DataFrame())
    if len(corrected):
        corrected = at_tau(corrected)
        for arm in ("shared", "cross"):
            add(f"corrected_{arm}", corrected[corrected["arm"] == arm], "corrected")
        unknown = corrected[corrected["corrected"].isna()].drop_duplicates("run")
        made["reason"] = made["run"].map(unknown.set_index("run")["reason"])
    persistence = tables.get("persistence", pd.DataFrame())
    for source in ("pruned", "noise_isotropic", "noise_shuffled") if len(persistence) else ():
        name = "persistence" if source == "pruned" else source
        add(name, persistence[persistence["source"] == source], "mean_correlation")
    return made


def _predictor(tables: Tables) -> pd.DataFrame:
    """The paper's numbers stand beside a study of one of its models; they pool all three."""
    rows = at_tau(tables["predictor"])
    columns = ["target", "evaluation", "features", "tau", "auc", "auc_low", "auc_high", "accuracy"]
    columns += ["base_rate", "coef_log_rate", "coef_sparsity", "num_rows", "reason"]
    rows = rows[columns].reset_index(drop=True)
    models = {str(m) for t in tables.values() if "model" in t for m in t["model"].unique()}
    if models & set(published("matrix")["model"]):
        theirs = published("predictor")
        found = theirs[theirs["tau"] == PRIMARY_TAU].iloc[0]
        same = (
            (rows["target"] == "shared_init")
            & (rows["evaluation"] == "in_sample")
            & (rows["features"] == "rate_sparsity")
        )
        for name in ("auc", "accuracy"):
            rows[f"paper_{name}"] = pd.Series(found[name], index=rows.index).where(same)
    return rows
