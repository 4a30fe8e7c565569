"""One row per run: the means that the page shows first."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.persistence import SOURCES
from prunelens.paper import published
from prunelens.report.panels.panel import PRIMARY_TAU, Tables, at_tau, of_first_seed
from prunelens.report.panels.selftest import world_of
from prunelens.report.published import beside_published
from prunelens.report.sufficiency import training_verdicts, verdict_words

KEYS = ["run", "model", "method", "sparsity"]
SITE = ["model", "layer"]


def overviews(tables: Tables) -> dict[str, pd.DataFrame]:
    """Those tables by name (the keys of `questions.CAPTIONS` that are no CSV)."""
    made = {}
    if len(tables.get("stability", ())):
        made["stability by run"] = _stability(tables["stability"])
    if len(tables.get("survival", ())):
        made["survival by run"] = _survival(tables)
    if len(tables.get("predictor", ())):
        made["predictor at 0.7"] = _predictor(tables)
    made["identity by run"] = _identity(tables)
    made["warm start by run"] = _warm_start(tables)
    made["training by run"] = _training(training_verdicts(tables))
    if len(tables.get("selftest", ())):
        made |= _selftest(tables["selftest"])
    if len(tables.get("selftest_null", ())):
        made["selftest null"] = _nothing(tables["selftest_null"])
    return {name: table for name, table in made.items() if len(table)}


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


def _identity(tables: Tables) -> pd.DataFrame:
    """The other measures of identity, each beside what no pruning and no feature would give."""
    asked = ("activation_matching", "scaling", "subspace")
    rates, scaling, spans = (tables.get(name, pd.DataFrame()) for name in asked)
    made = _pruned_runs([rates, scaling, spans])
    if not len(made):
        return made
    rates = at_tau(rates)
    for arm in ("shared_init", "cross_init"):
        for source, name in (("pruned", ""), ("null", "_null")):
            made[f"activation_{arm}{name}"] = _of_run(made, rates, "mnn", arm=arm, source=source)
    for arm in ("ceiling_cross", "chance"):
        made[f"activation_{arm}"] = _of_dense(made, rates, "mnn", arm)
    names = {"pruned": "", "null": "_null", "noise_isotropic": "_noise", "unpaired": "_unpaired"}
    for source, name in names.items():
        made[f"scaling{name}"] = _of_run(made, scaling, "mean_scaling", source=source)
    made["scaling_median"] = _of_run(made, scaling, "median_scaling", source="pruned")
    for arm in ("shared_init", "cross_init"):
        made[f"subspace_{arm}"] = _of_run(made, spans, "overlap", arm=arm)
    for arm in ("ceiling_cross", "floor_shared", "chance"):
        made[f"subspace_{arm}"] = _of_dense(made, spans, "overlap", arm)
    corrected = at_tau(tables.get("survival_corrected", pd.DataFrame()))
    made["corrected_warm"] = _of_run(made, corrected, "corrected", arm="warm")
    return made.drop(columns="layer")


def _warm_start(tables: Tables) -> pd.DataFrame:
    """SAEs that were trained on from the dense ones, beside fresh ones; FVU in raw space, where
    both have the same denominator."""
    rates = at_tau(tables.get("survival", pd.DataFrame()))
    rates = rates[rates["coordinates"] == "normalised"] if len(rates) else rates
    warm = rates[rates["arm"] == "warm_start"] if len(rates) else rates
    made = _pruned_runs([warm])
    if not len(made):
        return made
    made["warm_start"] = _of_run(made, warm, "mnn")
    for arm in ("floor_warm", "ceiling_warm"):
        made[arm] = _of_dense(made, rates, "mnn", arm)
    corrected = at_tau(tables.get("survival_corrected", pd.DataFrame()))
    made["corrected_warm"] = _of_run(made, corrected, "corrected", arm="warm")
    trained = tables.get("sae_training", pd.DataFrame())
    trained = trained[~trained["rotated"].astype(bool)] if len(trained) else trained
    for training, name in (("warm", "warm"), ("own", "fresh")):
        made[f"steps_{name}"] = _of_run(made, trained, "steps", training=training)
        made[f"fvu_raw_{name}"] = _of_run(made, trained, "fvu_raw", training=training)
    if len(corrected):
        unknown = corrected[(corrected["arm"] == "warm") & corrected["corrected"].isna()]
        made["reason"] = made["run"].map(unknown.drop_duplicates("run").set_index("run")["reason"])
    return made.drop(columns="layer")


def _pruned_runs(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One row per pruned run of any of the tables, with KEYS and layer."""
    found = [part.loc[part["method"] != "dense", [*KEYS, "layer"]] for part in parts if len(part)]
    if not found:
        return pd.DataFrame()
    return pd.concat(found).drop_duplicates("run").reset_index(drop=True)


def _of_run(made: pd.DataFrame, rows: pd.DataFrame, column: str, **where: str) -> pd.Series:
    """The mean of a column over each run's rows with those values; NaN where there are none."""
    for name, value in where.items():
        rows = rows[rows[name] == value] if len(rows) else rows
    if not len(rows):
        return pd.Series(float("nan"), index=made.index)
    return made["run"].map(rows.groupby("run")[column].mean())


def _of_dense(made: pd.DataFrame, rows: pd.DataFrame, column: str, arm: str) -> pd.Series:
    """The mean of a control arm at each run's site."""
    rows = rows[rows["arm"] == arm] if len(rows) else rows
    if not len(rows):
        return pd.Series(float("nan"), index=made.index)
    means = rows.groupby(SITE)[column].mean().rename("found")
    return made[SITE].join(means, on=SITE)["found"]


def _training(verdicts: pd.DataFrame) -> pd.DataFrame:
    if not len(verdicts):
        return verdicts
    names = ["mean_init_retention", "fvu_fall", "fvu_fall_schedule", "fvu_fall_beyond_schedule"]
    made = verdicts[[*KEYS, *names]].reset_index(drop=True)
    made.insert(len(KEYS), "verdict", verdict_words(verdicts))
    made["why"] = verdicts["reason"].to_numpy()
    return made


def _selftest(grades: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One table per planted world, one row per measure; and what comes before training's end."""
    end, early = grades[grades["step"].isna()], grades[grades["step"].notna()]
    names = ["measure", "share_defined", "auc", "precision", "recall", "false_survival"]
    names += ["bias", "bias_rotated", "rate_rho", "rate_low", "rate_high", "truth_rho"]
    names += ["mark"]
    found = {}
    for world, part in end.groupby(world_of(end["run"]), sort=False):
        made = part[names].reset_index(drop=True)
        missed = "MISSED: " + part["reason"].fillna("").str.removeprefix("misses: ")
        passed = part["passed"].map({True: "passed"}).fillna("")
        made["verdict"] = missed.where(part["passed"].eq(False), passed).to_numpy()
        found[f"selftest {world}"] = made
    steps = early.assign(world=world_of(early["run"])) if len(early) else early
    if len(steps):
        wide = steps.pivot_table(index="step", columns="world", values="false_survival")
        found["selftest by step"] = wide.reset_index().astype({"step": int})
    return found


def _nothing(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a mark."""
    rows = rows[rows["mark"].notna() & (rows["mark"] != "")].reset_index(drop=True)
    names = ["measure", "source", "statistic", "value", "low", "high", "nothing", "passed"]
    return rows[names].assign(world=world_of(rows["run"]))[["world", *names]]


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
