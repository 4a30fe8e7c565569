"""The answer stands first, says what the tables say, and fits where it is printed."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pandas as pd
import pytest

from prunelens.console import Console
from prunelens.report.answer import answers
from prunelens.report.page import page
from prunelens.report.paper_tables import paper_tables
from prunelens.report.summary import summary
from synthetic_results import synthetic_runs, synthetic_study, synthetic_tables

STUDY = synthetic_study()
TABLES = synthetic_tables(STUDY, retention=0.5)
RUN = "gemma-3-1b/L12/wanda-row-0.50"
NAN = float("nan")


def one(**changed: object) -> pd.Series:
    """The answer about a run of which these numbers are known."""
    place = {"run": RUN, "model": "gemma-3-1b", "layer": 12, "method": "wanda", "sparsity": 0.5}
    before = place | {"run": "gemma-3-1b/L12/dense", "method": "dense", "sparsity": 0.0}
    facts: dict = {"low": 0.9, "value": 0.95, "high": 0.99, "null": (0.99, 1.0, 1.01)}
    facts |= {"verdicts": ["keep", "keep"], "ratios": (1.1, 1.2, 0.01), "trained": True}
    facts |= {"dense": changed.get("trained", True)} | changed
    names = ("fvu_dense_var_ratio", "fvu_raw_ratio", "ce_drop")
    ratios = dict(zip(names, facts["ratios"], strict=True))
    ours = {"measure": "relative_shuffled", "group": "all"}
    tables = {
        "perplexity": [
            {**where, "context_tokens": tokens, "perplexity": value * tokens / 512}
            for where, value in ((before, 10.0), (place, 15.0))
            for tokens in (256, 512)
        ],
        "persistence": [
            {**place, "source": source, "mean_correlation": value}
            for source, value in (("pruned", 0.8), ("pruned", 0.6), ("null", 0.1))
        ],
        "fragility_contrasts": [
            place | ours | {"source": source, "low": low, "value": value, "high": high}
            for source, (low, value, high) in {
                "pruned": (facts["low"], facts["value"], facts["high"]),
                "null": facts["null"],
            }.items()
        ]
        + [place | ours | {"source": "pruned", "group": "Q1", "value": 0.1}],
        "transfer": [
            {**place, **ratios, "positions": positions, "source": "pruned", "refit": "none"}
            | {"sae": f"seed {seed}", "verdict": verdict if positions == "norm_filtered" else "x"}
            for seed, verdict in enumerate(facts["verdicts"])
            for positions in ("norm_filtered", "all")
        ]
        + [  # of others
            {**place, "fvu_raw_ratio": 9.0, "positions": "norm_filtered", "source": "pruned"}
            | {"refit": "none", "sae": "theirs", "verdict": "retrain"}
        ],
        "sufficiency": [
            {**where, "trained_enough": facts[which], "mean_init_retention": 0.5}
            | {"fvu_fall_beyond_schedule": 0.01, "reason": ""}
            for where, which in ((before, "dense"), (place, "trained"))
        ],
    }
    found = answers({name: pd.DataFrame(rows) for name, rows in tables.items()})
    assert len(found) == 1
    return found.iloc[0]


def test_numbers_are_those_of_the_tables() -> None:
    found = one()
    assert (found["perplexity"], found["dense_perplexity"]) == (15, 10)  # of the longest window
    assert found["persistence"] == pytest.approx(0.7)
    assert found[["relative", "low", "high"]].tolist() == [0.95, 0.9, 0.99]
    assert found[["low_null", "high_null"]].tolist() == [0.99, 1.01]
    assert found["dense_sae"] == "keep" and found["training"] == "trained enough"
    assert found["answer"] == (
        "Perplexity 10 becomes 15 (1.50 times). Features persist at 0.70, harmed more than by"
        " noise of equal size (0.950 of what that leaves, 0.900 to 0.990). Keep the dense SAE: its"
        " error is 1.1 times that on the dense model (limit 1.25), relative to the variance its"
        " error is 1.2 times that (limit 1.25), 0.01 less of the cross-entropy comes back (limit"
        " 0.02). Dictionaries are trained enough to compare."
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"low": 0.9, "high": 1.1}, "harmed neither more nor less than by noise"),
        ({"low": 1.01, "high": 1.1}, "harmed less than by noise"),
        ({"low": NAN, "high": NAN}, "0.70; beside noise of equal size it was not judged"),
        ({"null": (0.9, 0.95, 0.99)}, "found where nothing is, too, so it decides nothing"),
        ({"null": (NAN, NAN, NAN)}, "not asked on the null, so it decides nothing"),
        ({"verdicts": ["keep", "undecided"]}, "Seeds of the dense SAE differ (keep, undecided)"),
        ({"verdicts": [NAN]}, "The dense SAE was not tried."),
        ({"verdicts": ["refit"]}, "Refit the bias or the thresholds of the dense SAE: "),
        ({"verdicts": ["undecided"]}, "Whether the dense SAE can stay is undecided: "),
        (
            {"verdicts": ["retrain"], "ratios": (2.0, 1.1, NAN)},
            "Train a new SAE: its error is 2 times that on the dense model (limit 1.25). ",
        ),
        ({"trained": False}, "Dictionaries are not trained enough: believe nothing"),
        ({"verdicts": ["keep"], "ratios": (NAN, NAN, NAN)}, "Keep the dense SAE. Dict"),
        ({"trained": False, "dense": True}, "Dictionaries are not trained enough: believe"),
        ({"trained": NAN, "dense": True}, "of the pruned one only the distance from its start"),
        ({"trained": True, "dense": NAN}, "Whether dictionaries are trained enough is not known."),
        ({"trained": NAN}, "Whether dictionaries are trained enough is not known."),
    ],
)
def test_words_follow_intervals_and_verdicts(changed: dict, words: str) -> None:
    assert words in one(**changed)["answer"]


def test_the_longest_window_is_each_models_own() -> None:
    """One model is asked with shorter windows alone."""
    both = {}
    for name in ("perplexity", "persistence"):
        other = TABLES[name].assign(model="other", run=TABLES[name]["run"].str.replace("gem", "x"))
        both[name] = pd.concat([TABLES[name], other])
    windows = both["perplexity"]["context_tokens"]
    short = (both["perplexity"]["model"] == "other") & (windows == windows.max())
    assert short.any() and not short.all()
    found = answers(both | {"perplexity": both["perplexity"][~short]})
    assert set(found["model"]) == {"gemma-3-1b", "other"}
    assert found[["perplexity", "dense_perplexity"]].notna().all().all()


@pytest.mark.parametrize("name", ["perplexity", "persistence", "fragility_contrasts", "transfer"])
def test_what_was_not_asked_is_said(name: str) -> None:
    few = {key: table for key, table in TABLES.items() if key != name}
    found = answers(few)
    assert len(found) == 8
    said = {
        "perplexity": "Perplexity was not measured.",
        "persistence": "What became of the features was not asked.",
        "fragility_contrasts": "beside noise of equal size it was not judged.",
        "transfer": "The dense SAE was not tried.",
    }
    assert found["answer"].str.contains(said[name], regex=False).all()
    assert answers({"runs": pd.DataFrame()}).empty


def test_it_is_a_table_and_comes_first_on_the_page(tmp_path: pathlib.Path) -> None:
    made = paper_tables(TABLES, STUDY)["answers"]
    text = page(tmp_path, TABLES, synthetic_runs(STUDY), STUDY)
    places = [text.index(f"<h3>{row.run}</h3><p>{row.answer}</p>") for row in made.itertuples()]
    assert len(places) == 8 and places == sorted(places)
    assert places[-1] < text.index('<h2 id="perplexity"')


def test_the_summary_is_whole_in_80_columns() -> None:
    tables = TABLES | paper_tables(TABLES, STUDY)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(tables, synthetic_runs(STUDY)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    said = " ".join(text.split())
    assert all(" ".join(answer.split()) in said for answer in tables["answers"]["answer"])
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("wanda-row-0.50")]
    longest = tables["perplexity"]["context_tokens"].max()
    for row, layer in zip(rows, (6, 12), strict=True):
        run = f"gemma-3-1b/L{layer}/wanda-row-0.50"
        own = {
            name: tables[name][tables[name]["run"] == run] for name in ("perplexity", "stability")
        }
        known = own["perplexity"][own["perplexity"]["context_tokens"] == longest]["perplexity"]
        assert float(row[1]) == pytest.approx(known.mean(), abs=0.006)
        rate = own["stability"][own["stability"]["tau"] == 0.7]["mnn"].mean()
        assert np.isclose(float(row[2]), rate, atol=6e-4)
