"""RQ2 on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.persistence import SOURCES
from prunelens.report.by_run import KEYS
from prunelens.report.panels.panel import Tables, at_tau, of_first_seed
from prunelens.report.panels.survival import survival
from prunelens.report.published import beside_published
from prunelens.report.questions.section import FigureOf, Section


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    return {"survival by run": _survival(tables)} if len(tables.get("survival", ())) else {}


def _survival(tables: Tables) -> pd.DataFrame:
    rows = at_tau(tables["survival"])
    rows = rows[rows["coordinates"] == "normalised"]
    pruned = rows[rows["method"] != "dense"]
    made = pruned[KEYS].drop_duplicates("run").reset_index(drop=True)

    def add(name: str, part: pd.DataFrame, column: str) -> None:
        made[name] = made["run"].map(part.groupby("run")[column].mean())

    shared = pruned[pruned["arm"] == "shared_init"]
    add("mnn", of_first_seed(shared, "init_a"), "mnn")
    made = beside_published(made, "survival").rename(columns={"mnn": "mnn, first seed"})
    add("mnn, mean of seeds", shared, "mnn")
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
    for source in SOURCES if len(persistence) else ():
        name = "persistence" if source == "pruned" else source
        add(name, persistence[persistence["source"] == source], "mean_correlation")
    for source, tail in (("pruned", ""), ("null", "_null")) if len(persistence) else ():
        part = persistence[persistence["source"] == source]
        add(f"relative_shuffled{tail}", part, "relative_shuffled")
    return made


SURVIVAL = Section(
    "survival",
    "RQ2: which features are found again after pruning?",
    "Of the features of the dense model, how many does an SAE of the pruned model also have?",
    "The SAEs of both models start from the same weights and see the data in the same order. So"
    " a latent that hardly moved from its start counts as one that survived.",
    "Corrected: 0 is what a shared start shows where no feature is shared, 1 what it shows"
    " where nothing was pruned. Persistence needs no second SAE: the dense SAE reads the"
    " activations of both models on the same tokens. Beside it stands noise of the same size:"
    " pruning moves and scales all activations alike (common_change), which harms no feature"
    " and is kept; the rest of a token's change is another token's. The ratio of the two is"
    " 1 where pruning does what noise does; on the null, a further draw of that noise in the"
    " place of the pruned activations, it is 1 but for chance.",
    figures={
        "fig2_survival": FigureOf(
            survival,
            ("survival", "survival_corrected", "persistence"),
            "Figure 2: survival under pruning",
        )
    },
    tables={"survival by run": "Survival at tau 0.7 and persistence, means"},
    more={
        "survival_corrected": "Corrected survival",
        "common_change": "What pruning did to all activations alike, and the share of the rest",
        "persistence": "Persistence of every seed",
    },
    assumed={
        "survival by run": (
            "The paper's numbers are set beside those of the first seed: it compares"
            " conditions by its seed 0."
        )
    },
    needs=(
        "survival",
        "persistence",
    ),
    made=_made,
)
