"""The answer before all tables: what became of model, features and dense SAE, and how sure that is.

Every number stands in another table, with its interval and its control; here are those that decide.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from prunelens.analyses.verdict import LIMITS
from prunelens.report.by_run import SITE, of_run, pruned_runs
from prunelens.report.panels.panel import Tables
from prunelens.report.panels.transfer import OWN
from prunelens.report.sufficiency import training_verdicts, verdict_words

ANSWERS = "answers"
MEASURE = "relative_shuffled"
ENOUGH, TOO_LITTLE, DENSE_ALONE = "trained enough", "not trained enough", "dense trained enough"
UNKNOWN = "not known"
SAE = {
    "keep": "keep the dense SAE",
    "refit": "refit the bias or the thresholds of the dense SAE",
    "retrain": "train a new SAE",
    "undecided": "whether the dense SAE can stay is undecided",
}
TRUST = {
    ENOUGH: "Dictionaries are trained enough to compare.",
    DENSE_ALONE: "The dense dictionary is trained enough; of the pruned one only the distance from"
    " its start is known.",
    TOO_LITTLE: "Dictionaries are not trained enough: believe nothing that compares two.",
    UNKNOWN: "Whether dictionaries are trained enough is not known.",
}


def answers(tables: Tables) -> pd.DataFrame:
    """One row per pruned run, with the columns of `tables/answers.csv`; see docs/tables.md."""
    asked = ("perplexity", "fragility_contrasts", "persistence", "transfer")
    given = {name: tables.get(name, pd.DataFrame()) for name in asked}
    made = pruned_runs([part for part in given.values() if "layer" in part])
    if not len(made):
        return made
    made["perplexity"], made["dense_perplexity"] = _perplexities(made, given["perplexity"])
    made["persistence"] = of_run(made, given["persistence"], "mean_correlation", source="pruned")
    ratio = given["fragility_contrasts"]
    for name, column in (("relative", "value"), ("low", "low"), ("high", "high")):
        for source, tail in (("pruned", ""), ("null", "_null")):
            made[name + tail] = of_run(
                made, ratio, column, measure=MEASURE, group="all", source=source
            )
    plain = given["transfer"]
    if len(plain):  # SAEs of others have rows and a section of their own
        plain = plain[plain["sae"].str.fullmatch(OWN)]
    for name in LIMITS:
        made[name] = of_run(
            made, plain, name, positions="norm_filtered", source="pruned", refit="none"
        )
    verdicts = _verdicts(plain)
    made["dense_sae"] = [verdicts.get(run, "") for run in made["run"]]
    made["training"] = _training(made, tables)
    made["answer"] = [" ".join(_in_words(row)) for row in made.to_dict("records")]
    return made


def _perplexities(made: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Of the longest window, and the dense model's."""
    if not len(rows):
        return of_run(made, rows, ""), of_run(made, rows, "")
    most = rows.groupby("model")["context_tokens"].transform("max")
    longest = rows[rows["context_tokens"] == most]
    dense = longest[longest["method"] == "dense"].groupby("model")["perplexity"].mean()
    return of_run(made, longest, "perplexity"), made["model"].map(dense)


def _verdicts(rows: pd.DataFrame) -> dict[str, str]:
    """Run -> what RQ3 says of the dense SAEs of all seeds; all that occur."""
    if not len(rows):
        return {}
    own = (rows["positions"] == "norm_filtered") & (rows["source"] == "pruned")
    found = rows[own & rows["verdict"].isin(SAE)].groupby("run")["verdict"]
    return {str(run): ", ".join(sorted(set(part))) for run, part in found}


def _training(made: pd.DataFrame, tables: Tables) -> list[str]:
    """Of the run and of the dense one of its site: too little where either is."""
    rows = training_verdicts(tables)
    if not len(rows):
        return [UNKNOWN] * len(made)
    rows = rows.assign(words=verdict_words(rows))
    by_run = dict(zip(rows["run"], rows["words"], strict=True))
    by_site = rows[rows["method"] == "dense"].set_index(SITE)["words"].to_dict()
    found = []
    for run in made.itertuples():
        own, dense = by_run.get(run.run), by_site.get((run.model, run.layer))
        if TOO_LITTLE in (own, dense):
            found.append(TOO_LITTLE)
        elif dense == ENOUGH:
            found.append(ENOUGH if own == ENOUGH else DENSE_ALONE)
        else:
            found.append(UNKNOWN)
    return found


def _in_words(row: dict[str, Any]) -> list[str]:
    """A sentence each about model, features, dense SAE and trust."""
    return [_model(row), _features(row), _sae(row), TRUST[row["training"]]]


def _model(row: dict[str, Any]) -> str:
    before, after = row["dense_perplexity"], row["perplexity"]
    if math.isnan(after) or math.isnan(before):
        return "Perplexity was not measured."
    return f"Perplexity {before:.4g} becomes {after:.4g} ({after / before:.2f} times)."


def _features(row: dict[str, Any]) -> str:
    if math.isnan(row["persistence"]):
        return "What became of the features was not asked."
    kept = f"Features persist at {row['persistence']:.2f}"
    low, high = row["low"], row["high"]
    if math.isnan(low):
        return f"{kept}; beside noise of equal size it was not judged."
    harm = "more" if high < 1 else "less" if low > 1 else "neither more nor less"
    number = f"{row['relative']:.3f} of what that leaves, {low:.3f} to {high:.3f}"
    text = f"{kept}, harmed {harm} than by noise of equal size ({number})."
    if math.isnan(row["low_null"]):
        text += " It was not asked on the null, so it decides nothing."
    elif not row["low_null"] <= 1 <= row["high_null"]:
        text += " Something is found where nothing is, too, so it decides nothing."
    return text


def _sae(row: dict[str, Any]) -> str:
    verdicts = [verdict for verdict in str(row["dense_sae"]).split(", ") if verdict]
    if not verdicts:
        return "The dense SAE was not tried."
    words = (
        SAE[verdicts[0]]
        if len(verdicts) == 1
        else f"seeds of the dense SAE differ ({', '.join(verdicts)})"
    )
    told = {
        "its error is {:.3g} times that on the dense model": "fvu_dense_var_ratio",
        "relative to the variance its error is {:.3g} times that": "fvu_raw_ratio",
        "{:.2g} less of the cross-entropy comes back": "ce_drop",
    }
    known = {text: name for text, name in told.items() if not math.isnan(row[name])}
    beyond = {text: name for text, name in known.items() if row[name] > LIMITS[name].most}
    numbers = [
        f"{text.format(row[name])} (limit {LIMITS[name].most:g})"
        for text, name in (beyond or known).items()
    ]
    text = f"{words[0].upper()}{words[1:]}"
    return f"{text}: {', '.join(numbers)}." if numbers else f"{text}."
