"""The report: figures, the paper's tables beside ours, and the page, on results with known numbers.

The page is read back with html.parser, as a reader of it would, not with the code that wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import itertools
import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
import rich.console

from prunelens.analyses.grades import MEASURES as GRADED
from prunelens.config import study_from_data
from prunelens.paper import published
from prunelens.report.figures import write_figures
from prunelens.report.interactive import plotly_figure
from prunelens.report.page import page, write_page
from prunelens.report.panels.panel import Panel, Points, Site, sites
from prunelens.report.paper_tables import paper_tables, write_paper_tables
from prunelens.report.published import beside_published
from prunelens.report.questions import SECTIONS, figures, overviews
from prunelens.report.shown_table import number, shown
from prunelens.report.sufficiency import known_of_the_others, not_enough, training_verdicts
from prunelens.report.summary import summary
from prunelens.study.results import column_meanings
from synthetic_results import synthetic_runs, synthetic_study, synthetic_tables

HOSTILE = '</script><img src=x onerror="alert(1)">\'&\u2028$x$'
STUDY = synthetic_study()
TABLES = synthetic_tables(STUDY)
OTHER = "gemma-3-1b/L12/wanda-row-0.50"


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: tags, text and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._caption = ""
        self._inside: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        inside = set(self._inside)
        if "script" in inside:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif "style" not in inside:
            self.texts.append(data)
            if inside & {"td", "th"} and "sup" not in inside:
                self._rows[-1][-1] += data
            elif "caption" in inside and "a" not in inside:
                self._caption += data

    def figures(self) -> dict:
        """The data that the figures are drawn from."""
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == "figures"]
        return json.loads(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("study")
    (out / "environment.json").write_text('{"python": "3.x", "libraries": {"torch": "2.y"}}')
    runs = synthetic_runs(STUDY, failed="m/L0/wanda-row-0.30")
    path = write_page(out, TABLES, runs, STUDY)
    return Page(path.read_text(encoding="utf-8"))


# --- the paper's numbers --------------------------------------------------------------------------


def test_published_numbers_stand_only_where_model_method_and_sparsity_agree() -> None:
    """Checked row by row against the paper's files, for all of its tables but the matrix."""
    study = synthetic_study(("gemma-3-1b", "bundled"), (12,), (0.2, 0.25, 0.5))
    made = paper_tables(synthetic_tables(study), study)
    checked = {
        "table1_perplexity": ("perplexity", "perplexity"),
        "table3_fragility": ("fragility", "q1_rare"),
        "tableB1_quality": ("sae_quality", "fvu"),
    }
    for name, (source, column) in checked.items():
        theirs = published(source).set_index(["model", "method", "sparsity"])[column]
        rows = made[name]
        if "context_tokens" in rows:
            assert rows[rows["context_tokens"] == 2048]["paper_perplexity"].isna().all()
            rows = rows[rows["context_tokens"] == 256]
        for row in rows.to_dict("records"):
            wanted = theirs.get((row["model"], row["method"], row["sparsity"]), np.nan)
            assert row[f"paper_{column}"] == pytest.approx(wanted, nan_ok=True), row["run"]
        assert rows[rows["model"] == "gemma-3-1b"][f"paper_{column}"].notna().any()
        assert rows[rows["model"] == "bundled"].filter(like="paper_").isna().all(axis=None)


@pytest.mark.parametrize(
    ("condition", "agrees"),
    [
        ("wanda-row-0.30", True),
        ("wanda-matrix-0.30", False),
        ("wanda-row-0.30-sequential", False),
        ("magnitude-global-0.30", True),
        ("magnitude-global-0.30-head", True),
        ("wanda-row-0.30-head", False),
        ("magnitude-row-0.30", False),
    ],
)
def test_another_scope_or_calibration_is_not_the_papers_method(
    condition: str, agrees: bool
) -> None:
    method = condition.split("-")[0]
    row = {"run": f"gemma-3-1b/L12/{condition}", "model": "gemma-3-1b"}
    rows = pd.DataFrame([{**row, "method": method, "sparsity": 0.3}], index=[7])
    found = beside_published(rows, "survival")
    assert found["paper_mnn"].notna().tolist() == [agrees]
    assert found.index.tolist() == [7]


def test_table_4_has_the_dense_row_only_beside_the_pair_that_the_paper_measured() -> None:
    table = paper_tables(TABLES, STUDY)["table4_causal"]
    known = table[table["paper_robust_kl"].notna()]
    assert set(known["run"].str.rsplit("/").str[-1]) == {"wanda-row-0.30"}
    by_model = known.set_index(["layer", "ablated_in"])["paper_robust_kl"]
    assert by_model.loc[(12, "dense")] == 0.695
    assert by_model.loc[(12, "pruned")] == 0.268


def test_official_sae_numbers_do_not_stand_beside_our_own_saes() -> None:
    table = paper_tables(TABLES, STUDY)["table2_transfer"]
    ours = table["sae"].str.startswith("seed")
    assert table[ours]["paper_fvu"].isna().all()
    assert table[~ours & (table["method"] == "dense")]["paper_fvu"].tolist() == [0.011, 0.011]


def test_tables_hold_the_studys_own_numbers() -> None:
    made = paper_tables(TABLES, STUDY)
    rows = TABLES["fragility"]
    run = "gemma-3-1b/L12/wanda-row-0.50"
    part = rows[(rows["run"] == run) & (rows["measure"] == "shared_init") & (rows["tau"] == 0.7)]
    rates = part.set_index("quintile")["survival_rate"]
    found = made["table3_fragility"].set_index("run").loc[run]
    assert found["mean_q1_rare"] == rates[1]
    assert found["mean_ratio"] == pytest.approx(rates[1] / rates[5])
    depth = made["depth"].set_index("run").loc[run]
    survival = TABLES["survival"]
    mine = [
        row.one_way_reverse
        for row in survival.itertuples()
        if (row.run, row.arm, row.tau) == (run, "shared_init", 0.7)
    ]
    assert len(mine) == 3
    assert depth["emerging"] == pytest.approx(1 - sum(mine) / 3)
    assert set(made["depth"]["layer"]) == {6, 12, 0}  # 0: of the planted world
    assert made["tableA1_matrix"]["seeds"].unique().tolist() == [3]


def test_table_3_and_figure_2_are_of_the_first_seed_with_means_beside() -> None:
    """The seeds of a study need not begin with 0, nor be in order."""
    tables = {**TABLES, "survival": TABLES["survival"].copy()}
    by_seed = tables["fragility_by_seed"]
    tables["fragility_by_seed"] = by_seed.assign(seed=7 - by_seed["seed"])
    first = by_seed[(by_seed["seed"] == 2) & (by_seed["run"] == OTHER)]
    first = first[(first["measure"] == "shared_init") & (first["tau"] == 0.7)]
    ends = first.set_index("quintile")["survival_rate"]
    found = paper_tables(tables, STUDY)["table3_fragility"].set_index("run").loc[OTHER]
    assert (found["q1_rare"], found["q5_frequent"]) == (ends[1], ends[5])
    assert found["ratio"] == pytest.approx(ends[1] / ends[5])
    assert found["q1_rare"] != found["mean_q1_rare"]

    rates = tables["survival"]
    rates["init_a"] = rates["init_a"].map({0: 3, 1: 9, 2: 1})  # the third is the lowest
    chosen = (rates["run"] == OTHER) & (rates["arm"] == "shared_init") & (rates["tau"] == 0.7)
    rates.loc[chosen, "mnn"] = rates.loc[chosen, "init_a"].map({3: 0.2, 9: 0.3, 1: 0.7})
    panel = figures()["fig2_survival"].panels(tables, Site("gemma-3-1b", 12))[0]
    lines = {points.name: points for points in panel.points}
    ours, mean = lines["wanda-row, first seed"], lines["wanda-row, mean of seeds"]
    assert (ours.x[-1], ours.y[-1], ours.low, ours.line) == (0.5, 0.7, None, "solid")
    assert mean.low and mean.high
    assert (mean.y[-1], mean.low[-1], mean.high[-1]) == pytest.approx((0.4, 0.2, 0.7))
    row = overviews(tables)["survival by run"].set_index("run").loc[OTHER]
    assert (row["mnn, first seed"], row["mnn, mean of seeds"]) == pytest.approx((0.7, 0.4))
    tables["survival"] = rates[rates["init_a"] == 1]
    (panel, *_) = figures()["fig2_survival"].panels(tables, Site("gemma-3-1b", 12))
    assert {"wanda-row", "magnitude-global"} <= {points.name for points in panel.points}
    assert not [points.name for points in panel.points if "mean" in points.name]


def test_the_papers_fvu_of_official_saes_stands_beside_the_raw_one() -> None:
    tables = {**TABLES, "transfer": TABLES["transfer"].assign(fvu=0.9, fvu_raw=0.4)}
    table = paper_tables(tables, STUDY)["table2_transfer"]
    columns = list(table.columns)
    assert columns.index("fvu_raw") + 1 == columns.index("fvu")
    assert set(table["fvu_raw"]) == {0.4} and set(table["fvu"]) == {0.9}
    panel = figures()["fig3_transfer"].panels(tables, Site("gemma-3-1b", 12))[0]
    assert {y for points in panel.points if not points.hollow for y in points.y} == {0.4}
    assert [points.name for points in panel.points if points.hollow]


def test_every_paper_table_begins_with_run_and_stale_ones_go(tmp_path: pathlib.Path) -> None:
    write_paper_tables(TABLES, STUDY, tmp_path)
    names = {path.stem for path in (tmp_path / "tables").glob("*.csv")}
    assert names == {
        "table1_perplexity", "table2_transfer", "table3_fragility", "table4_causal",
        "tableA1_matrix", "tableB1_quality", "depth", "answers",
    }  # fmt: skip
    for path in (tmp_path / "tables").glob("*.csv"):
        assert path.read_text().startswith("run,"), path.name
    write_paper_tables({}, STUDY, tmp_path)
    assert [path.stem for path in (tmp_path / "tables").glob("*.csv")] == ["tableA1_matrix"]


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_written_for_one_condition_long_names_and_missing_numbers(
    tmp_path: pathlib.Path,
) -> None:
    study = synthetic_study(("a" * 90,), (1,), (0.5,))
    tables = synthetic_tables(study)
    tables["causal"]["ci_low"] = np.nan
    tables["fragility"].loc[::3, "survival_rate"] = np.nan
    tables["transfer"]["model"] = tables["fragility_tests"]["model"] = "$\\frac$ </b>"
    written = write_figures(tables, tmp_path)
    assert [path.stem for path in written] == list(figures())
    assert all(
        path.stat().st_size > 1000 and path.with_suffix(".pdf").is_file() for path in written
    )


def test_without_results_there_is_no_figure_and_an_old_one_goes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "figures").mkdir()
    old = tmp_path / "figures" / "fig6_causal.png"
    old.write_bytes(b"old")
    empty = {"causal": TABLES["causal"].assign(kl_mean=np.nan)}
    assert write_figures(empty, tmp_path) == []
    assert not old.exists()


@pytest.mark.parametrize("name", list(figures()))
def test_every_number_in_a_figure_stands_in_a_table(name: str) -> None:
    """As it is, or as a mean, deviation or product that the caption names: here as it is."""
    figure = figures()[name]
    single = {  # one seed, so that means are the values themselves
        key: t[
            (t["seed"] == 0) if "seed" in t else t["seed_a"] == 0 if "seed_a" in t else t.index >= 0
        ]
        for key, t in TABLES.items()
    }
    for name in ("survival", "activation_matching", "subspace", "survival_by_step"):
        single[name] = single[name][single[name]["init_a"] == 0]
    single["transfer"] = single["transfer"][single["transfer"]["sae"] != "seed 1"]
    known = {
        round(float(value), 9)
        for table in [*single.values(), *paper_tables(single, STUDY).values()]
        for value in table.select_dtypes("number").to_numpy().ravel()
    } | {round(float(v), 9) for t in ("stability", "survival") for v in published(t)["mnn"]}
    drawn = 0
    for site in sites(TABLES, figure.needs[:1]):
        for panel in figure.panels(single, site):
            for points in panel.points:
                for y in points.y:
                    assert round(float(y), 9) in known, (panel.title, points.name, y)
                    drawn += 1
    assert drawn > 10


def test_paper_and_controlled_panels_stand_beside_each_other() -> None:
    ours = {
        "fig7_training": {"check"},
        "fig8_identity": {"controlled"},
        "fig9_selftest": {"check"},
        "fig10_probes": {"controlled", "check"},
    }
    for name, figure in figures().items():
        panels = figure.panels(TABLES, sites(TABLES, figure.needs[:1])[-1])
        views = [panel.protocol for panel in panels]
        assert views == sorted(views, key=["paper", "controlled", "check"].index), name
        assert set(views) == ours.get(name, {"paper", "controlled"}), name
        assert not [panel.title for panel in panels if panel.empty], name


# --- the page -------------------------------------------------------------------------------------


def test_every_claim_appears_with_both_verdicts(made: Page) -> None:
    articles = [a["id"] for tag, a in made.tags if tag == "article" and "id" in a]
    assert articles == [f"claim-{number}" for number in range(1, 12)]
    for claim in TABLES["claims"].itertuples():
        assert f"{claim.claim}. {claim.statement}" in made.text
        assert claim.why in made.text
        assert claim.paper_rule in made.text and claim.controlled_rule in made.text
    verdicts = [
        [cell.split()[-1] for cell in row[1:]] for row in made.tables["Claims by verdict"][1:]
    ]
    assert verdicts == TABLES["claims"][["paper_protocol", "controlled"]].to_numpy().tolist()


def test_numbers_shown_equal_the_tables(made: Page) -> None:
    heading, *rows = made.tables[
        "Table 3: survival of the rarest and the most frequent fifth, tau 0.7"
    ]
    table = paper_tables(TABLES, STUDY)["table3_fragility"].set_index("run")
    assert [row[0] for row in rows] == list(table.index)
    for row in rows:
        for name, text in zip(heading[1:], row[1:], strict=True):
            column = name.replace("paper: ", "paper_").replace(" ", "_")
            value = table.loc[row[0], column]
            if text == "–":
                assert np.isnan(value)
            else:
                assert float(text.replace(",", "")) == pytest.approx(value, rel=5e-3, abs=5e-4)


def test_unknown_numbers_say_why(made: Page) -> None:
    titles = [a["title"] for tag, a in made.tags if tag == "td" and "title" in a]
    assert "ceiling - floor is below 0.02" in titles
    assert "ceiling - floor is below 0.02" in made.text  # on paper and phones there is no title
    assert "one model only" in made.text


def test_what_is_assumed_of_the_paper_stands_under_its_tables(made: Page) -> None:
    assert sum(len(section.assumed) for section in SECTIONS) == 7
    for section in SECTIONS:
        captions = section.tables | section.more
        for name, words in section.assumed.items():
            assert made.text.count(words) == 1, name
            assert made.text.index(captions[name]) < made.text.index(words)
    asked = shown(pd.DataFrame({"run": ["a"]}), "caption")
    assert asked.assumed == ""


def test_headings_of_columns_say_what_these_mean(made: Page) -> None:
    titles = {a["title"] for tag, a in made.tags if tag == "th" and "title" in a}
    sentences = {s for table in column_meanings().values() for s in table.values()}
    assert len(titles) > 50 and titles <= sentences
    assert any('"' in str(title) for title in titles)  # which did not end the attribute


def test_nothing_is_loaded_and_only_our_scripts_run(made: Page) -> None:
    for tag, attributes in made.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert not str(attributes.get("href", "#")).startswith(("http", "//", "javascript"))
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = [str(a["content"]) for _, a in made.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "eval" not in policy and "unsafe-inline" not in policy.split("style-src")[0]
    for attributes, text in made.scripts:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy


def test_page_is_ordered_for_readers_of_all_kinds(made: Page) -> None:
    levels = [int(tag[1]) for tag, _ in made.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    names = [tag for tag, _ in made.tags]
    assert names.count("table") == names.count("caption")
    assert all(a.get("alt") for tag, a in made.tags if tag == "img")
    plots = [a for _, a in made.tags if a.get("class") == "plot"]
    assert all(a["aria-label"] for a in plots)
    assert {a["id"] for a in plots} == set(made.figures())
    identifiers = [a["id"] for _, a in made.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    targets = {str(a["href"])[1:] for t, a in made.tags if str(a.get("href", "")).startswith("#")}
    assert targets <= set(identifiers)
    assert ("meta", "viewport") in [(tag, a.get("name")) for tag, a in made.tags]


def test_failed_runs_and_environment_are_told(made: Page) -> None:
    assert "NaN in m/L0/wanda-row-0.30" in made.text
    assert ["torch", "2.y"] in made.tables["Made with"]


# --- were the SAEs trained enough? ----------------------------------------------------------------


def test_untrained_dictionaries_are_warned_of_before_the_claims(made: Page) -> None:
    warned = made.text.index("These dictionaries are not trained enough to compare")
    assert warned < made.text.index("The published study's claims", warned)
    for layer in (6, 12):
        assert f"gemma-3-1b, layer {layer} (dense, magnitude-global-0.30" in made.text
    assert "mean cosine to the start 0.950 (limit 0.9)" in made.text
    lines = printed(TABLES, width=1000).splitlines()
    warnings = [line for line in lines if "these dictionaries are not trained enough" in line]
    assert [line.split(" (")[0] for line in warnings] == [
        f"warning gemma-3-1b, layer {layer}" for layer in (6, 12)
    ]
    assert all("cosine to the start 0.950 (limit 0.9)" in line for line in warnings)


def test_a_warning_has_the_violated_number_alone_and_whom_dense_dictionaries_taint() -> None:
    """FVU that would still fall, in dictionaries far from their start."""
    rows = synthetic_tables(STUDY, retention=0.7)["sufficiency"]
    dense, follower = (rows["method"] == "dense"), rows["run"].str.contains("L6/magnitude.*0.30")
    refused = (dense & (rows["layer"] == 12)) | follower
    rows.loc[refused, "fvu_fall_beyond_schedule"] = 0.174
    rows["trained_enough"] = rows["trained_enough"].where(~refused, False)
    said = {each.site.layer: each for each in not_enough({"sufficiency": rows})}
    assert said[6].conditions == ["magnitude-global-0.30"]
    assert said[6].numbers == "twice the steps lower FVU by 17.4 % (limit 2 %)"
    assert said[12].conditions == ["dense"]
    start, taints = said[12].numbers.split(". ")
    assert start == said[6].numbers
    assert "Pruned runs are compared with these dense dictionaries" in taints
    assert "\n" not in said[12].text


def test_trained_dictionaries_are_not_warned_of_and_unknown_ones_named(
    tmp_path: pathlib.Path,
) -> None:
    tables = synthetic_tables(STUDY, retention=0.5)
    few = {name: tables[name] for name in ("claims", "sufficiency", "training_curves")}
    text = Page(page(tmp_path, few, synthetic_runs(STUDY), STUDY)).text
    assert "not trained enough to compare" not in text
    assert "cannot be said" in text
    said = printed(tables, width=1000)
    assert "warning" not in said and "not trained enough" not in said
    assert "4 runs trained enough: mean cosine to the start 0.500 (limit 0.9)" in said
    assert "twice the steps lower FVU by 1.1 % (limit 2 %)" in said
    assert "of 6 runs only the distance from the start is known" in said


@pytest.mark.parametrize(("retention", "verdict"), [(0.95, False), (0.5, None)])
def test_a_study_that_did_not_ask_is_judged_by_the_distance_from_the_start(
    retention: float, verdict: bool | None
) -> None:
    """By its own SAEs alone: one that goes on from another is near that start by design."""
    rows = synthetic_tables(STUDY, retention=retention)["sae_training"]
    controls = (rows["training"] != "own") | rows["rotated"].astype(bool)
    rows.loc[controls, "mean_init_retention"] = 0.99
    found = training_verdicts({"sae_training": rows})
    assert found["run"].tolist() == rows["run"].drop_duplicates().tolist()
    assert found["trained_enough"].tolist() == [verdict] * len(found)
    assert found["mean_init_retention"].tolist() == [retention] * len(found)
    warned = [
        (each.site.layer, len(each.conditions)) for each in not_enough({"sae_training": rows})
    ]
    assert warned == ([(6, 5), (12, 5)] if retention > 0.9 else [])
    assert training_verdicts({}).empty and not not_enough({}) and not known_of_the_others({})


def printed(tables: dict[str, pd.DataFrame], width: int) -> str:
    console = rich.console.Console(width=width, record=True, file=io.StringIO())
    console.print(summary(tables, synthetic_runs(STUDY)))
    return console.export_text()


# --- other measures of identity, and the self-test ------------------------------------------------


def test_identity_stands_beside_the_controls_of_the_same_site() -> None:
    tables = {**TABLES, "activation_matching": TABLES["activation_matching"].copy()}
    rates = tables["activation_matching"]
    rates.loc[(rates["layer"] == 6) & (rates["arm"] == "chance"), "mnn"] = 0.123
    made = overviews(tables)["identity by run"].set_index("run")
    assert len(made) == 8
    dense = "gemma-3-1b/L12/dense"
    for column, (table, value, arm, whose) in {
        "activation_shared_init": ("activation_matching", "mnn", "shared_init", OTHER),
        "activation_shared_init_null": ("activation_matching", "mnn", "shared_init", OTHER),
        "activation_ceiling_cross": ("activation_matching", "mnn", "ceiling_cross", dense),
        "subspace_cross_init": ("subspace", "overlap", "cross_init", OTHER),
        "subspace_floor_shared": ("subspace", "overlap", "floor_shared", dense),
    }.items():
        mine = [
            row[value]
            for row in tables[table].to_dict("records")
            if (row["run"], row["arm"], row.get("tau", 0.7)) == (whose, arm, 0.7)
            and (row.get("source") == "null") == column.endswith("_null")
        ]
        assert len(mine) == 3
        assert made.loc[OTHER, column] == pytest.approx(sum(mine) / 3), column
    sources = ["scaling", "scaling_null", "scaling_noise", "scaling_unpaired"]
    assert made.loc[OTHER, sources].tolist() == [0.5, 0.9, 1, 0]
    assert made.loc[OTHER, "scaling_median"] == pytest.approx(0.45)
    assert made.loc[OTHER, "corrected_warm"] == 0.5
    chance = made["activation_chance"].groupby(made.index.str.contains("/L6/")).unique()
    assert chance[True].tolist() == [0.123] and 0.123 not in chance[False]


def test_warm_starts_stand_beside_fresh_saes_of_the_same_run() -> None:
    made = overviews(TABLES)["warm start by run"].set_index("run").loc[OTHER]
    numbers = ["steps_warm", "steps_fresh", "fvu_raw_warm", "fvu_raw_fresh"]
    assert made[numbers].tolist() == [125, 500, 0.27, 0.25]
    assert 0 < made["floor_warm"] < made["warm_start"] < made["ceiling_warm"]
    without = {**TABLES, "survival": TABLES["survival"].query("arm != 'warm_start'")}
    assert "warm start by run" not in overviews(without)


def test_identity_measures_that_were_not_asked_leave_no_trace(tmp_path: pathlib.Path) -> None:
    rates = TABLES["survival"]
    few = {"survival": rates[~rates["arm"].str.contains("warm")]}
    few["persistence"] = TABLES["persistence"]
    found = Page(page(tmp_path, few, synthetic_runs(STUDY), STUDY))
    anchors = {a["id"] for tag, a in found.tags if tag == "h2"}
    assert anchors == {"answer", "verdicts", "survival", "depth", "study"}
    for name in ("fig7_training", "fig8_identity", "fig9_selftest"):
        panels = figures()[name].panels(few, Site("gemma-3-1b", 12))
        assert panels and all(panel.empty for panel in panels), name


def test_every_grade_and_every_miss_is_shown(made: Page) -> None:
    for world in ("fates do not depend on firing rate", "rare features are destroyed more often"):
        heading, *rows = made.tables[f"Grades where {world}"]
        verdicts = {row[0]: row[heading.index("verdict")] for row in rows}
        assert list(verdicts) == list(GRADED)
        assert verdicts.pop("scaling") == "MISSED: AUC >= 0.95"
        assert set(verdicts.values()) == {"passed"}
    steps = made.tables["False survival by a shared start, by training step"]
    assert steps[0] == ["step", "by rate", "independent", "none"]
    assert [row[0] for row in steps[1:]] == ["60", "125", "250", "500"]


def test_training_curves_are_of_the_runs_that_were_followed() -> None:
    site = Site("gemma-3-1b", 12)
    fvu, distance, survival = figures()["fig7_training"].panels(TABLES, site)
    lines = {points.name: points.x for points in fvu.points}
    assert lines == {
        "dense": [60, 125, 250, 500],
        "dense, one seed twice as long": [500, 1000],
        "magnitude-global-0.30": [60, 125, 250, 500],
        "magnitude-global-0.30, one seed twice as long": [500, 1000],
    }
    assert [level.y for level in distance.levels] == [0.9]
    same, other = survival.points
    assert same.y == [1.0, 60 / 125, 60 / 250, 60 / 500]
    assert other.y == [60 / 1000, 125 / 1000, 0.25, 0.5]


def test_controlled_fragility_is_relative_to_noise() -> None:
    for name in ("fig4_fragility", "fig5_fragility_by_method"):
        panels = figures()[name].panels(TABLES, Site("gemma-3-1b", 12))
        words = " ".join(str(x) for panel in panels for points in panel.points for x in points.x)
        assert "beyond" not in words
        if name.startswith("fig4"):
            assert panels[2].y_label == "relative to shuffled noise (ratio of means)"
            assert panels[2].y_range is None  # it may exceed 1
            assert [level.y for level in panels[2].levels] == [1.0]  # nothing beyond noise
        else:
            assert "relative to shuffled noise" in words
    rows = TABLES["fragility"]
    part = rows[(rows["run"] == OTHER) & (rows["measure"] == "relative_shuffled")]
    part = part[part["source"] != "null"]
    table = paper_tables(TABLES, STUDY)["table3_fragility"].set_index("run").loc[OTHER]
    ends = part.set_index("quintile")["survival_rate"]
    assert table["relative_q1_rare"] == ends[1] and table["relative_q5_frequent"] == ends[5]


def test_arms_are_told_apart_where_a_single_sparsity_draws_no_lines() -> None:
    tables = synthetic_tables(synthetic_study(layers=(12,), sparsities=(0.3,)))
    for panel in figures()["fig8_identity"].panels(tables, Site("gemma-3-1b", 12)):
        looks = [(points.colour, points.marker) for points in panel.points]
        assert len(looks) == len(set(looks)) >= 2, panel.title


# --- safety, and what is missing ------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path: pathlib.Path) -> None:
    """In the page, in JSON inside a script, and in plotly's own markup."""
    study = synthetic_study(layers=(12,), sparsities=(0.3,))
    tables = synthetic_tables(study)
    for table in tables.values():
        for column in {"run", "model"} & set(table):
            table[column] = HOSTILE + table[column].astype(str).str.replace("/L", f"/{HOSTILE}L")
    runs = synthetic_runs(study, failed=HOSTILE)
    text = page(tmp_path, tables, runs, study)
    assert "\u2028" not in text.split('id="figures">')[1].split("</script>")[0]
    found = Page(text)
    assert not [a for tag, a in found.tags if tag == "img" or "onerror" in a]
    assert len(found.scripts) == 3
    assert HOSTILE.replace("\u2028", " ") in found.text.replace("\u2028", " ")
    names = [str(trace["name"]) for f in found.figures().values() for trace in f["data"]]
    assert names and not [name for name in names if "<" in name]


@pytest.mark.parametrize("kept", [(), ("perplexity",), ("stability",), ("transfer",), ("claims",)])
def test_missing_tables_leave_their_sections_out(tmp_path: pathlib.Path, kept: tuple) -> None:
    tables = {name: TABLES[name] for name in kept}
    runs = pd.DataFrame(columns=["run", "status", "reason"])
    found = Page(page(tmp_path, tables, runs, STUDY))
    anchors = {a["id"] for tag, a in found.tags if tag == "h2"}
    depth = {"depth"} if {"stability", "transfer"} & set(kept) else set()
    assert anchors == {"answer", "verdicts", "study", *(set(kept) - {"claims"}), *depth}


def test_one_dense_run_alone_makes_a_page(tmp_path: pathlib.Path) -> None:
    study = study_from_data({"models": [{"name": "x/y", "layers": [0]}]})
    tables = synthetic_tables(study)
    del tables["selftest"]
    write_figures(tables, tmp_path)
    assert "x" in page(tmp_path, tables, synthetic_runs(study), study)


def test_print_images_are_inside_the_page(tmp_path: pathlib.Path) -> None:
    few = {name: TABLES[name].query("layer == 6") for name in ("stability", "survival")}
    write_figures(few, tmp_path)
    found = Page(page(tmp_path, few, synthetic_runs(STUDY), STUDY))
    images = [a for tag, a in found.tags if tag == "img"]
    assert [str(a["alt"]).split(":")[0] for a in images] == ["Figure 1", "Figure 2", "Figure 8"]
    assert all(str(a["src"]).startswith("data:image/png;base64,iVBOR") for a in images)


# --- parts ----------------------------------------------------------------------------------------


def test_interactive_figure_has_the_panels_numbers_and_no_nan() -> None:
    points = Points(
        "a<b", ["x", "y"], [1.0, np.nan], [0.5, np.nan], [1.25, np.nan], shaded=[0.9, 0]
    )
    panel = Panel("paper", "t", "x", "y", [points], kind="bars", categories=["x", "y"])
    figure = plotly_figure(panel)
    error, rest = figure["data"]
    assert json.dumps(figure, allow_nan=False)
    assert error["y"][0] + rest["y"][0] == pytest.approx(1.0)
    assert rest["base"][0] == 0.9 and rest["y"][1] is None
    assert rest["error_y"]["array"][0] == pytest.approx(0.25)
    assert rest["error_y"]["arrayminus"][0] == pytest.approx(0.5)
    assert rest["name"] == "a&lt;b"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"), (0.0, "0.000"), (3, "3"), (9216, "9,216"), (333.0, "333"),
        (64.2, "64.20"), (34020.0, "34,020"), (1e-5, "1.00e-05"), (float("nan"), "–"),
        (2.5e7, "2.500e+07"),
    ],
)  # fmt: skip
def test_numbers_are_rounded_for_reading(value: float, text: str) -> None:
    assert number(value) == text


def test_shown_table_keeps_columns_whose_absence_is_explained() -> None:
    table = pd.DataFrame({"run": ["a", "b"], "x": [np.nan] * 2, "reason": ["too few seeds", ""]})
    made = shown(table, "t")
    assert made.columns == ["run", "x"]
    assert [row[1].note for row in made.rows] == [1, None]
    assert made.notes == ["too few seeds"]
    assert shown(table.drop(columns="reason"), "t").columns == ["run"]
