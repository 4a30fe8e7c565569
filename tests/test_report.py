"""The report: figures, the paper's tables beside ours, and the page, on results with known numbers.

The page is read back with html.parser, as a reader of it would, not with the code that wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import itertools
import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from prunelens.config import study_from_data
from prunelens.paper import published
from prunelens.report.figures import write_figures
from prunelens.report.interactive import plotly_figure
from prunelens.report.page import page, write_page
from prunelens.report.panels import FIGURES
from prunelens.report.panels.panel import Panel, Points, Site, sites
from prunelens.report.paper_tables import paper_tables, write_paper_tables
from prunelens.report.published import beside_published
from prunelens.report.shown_table import number, shown
from synthetic_results import synthetic_runs, synthetic_study, synthetic_tables

HOSTILE = '</script><img src=x onerror="alert(1)">\'&\u2028$x$'
STUDY = synthetic_study()
TABLES = synthetic_tables(STUDY)


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
    assert found["q1_rare"] == rates[1]
    assert found["ratio"] == pytest.approx(rates[1] / rates[5])
    depth = made["depth"].set_index("run").loc[run]
    survival = TABLES["survival"]
    mine = [
        row.one_way_reverse
        for row in survival.itertuples()
        if (row.run, row.arm, row.tau) == (run, "shared_init", 0.7)
    ]
    assert len(mine) == 3
    assert depth["emerging"] == pytest.approx(1 - sum(mine) / 3)
    assert set(made["depth"]["layer"]) == {6, 12}
    assert made["tableA1_matrix"]["seeds"].unique().tolist() == [3]


def test_every_paper_table_begins_with_run_and_stale_ones_go(tmp_path: pathlib.Path) -> None:
    write_paper_tables(TABLES, STUDY, tmp_path)
    names = {path.stem for path in (tmp_path / "tables").glob("*.csv")}
    assert names == {
        "table1_perplexity", "table2_transfer", "table3_fragility", "table4_causal",
        "tableA1_matrix", "tableB1_quality", "depth",
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
    assert [path.stem for path in written] == list(FIGURES)
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


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_number_in_a_figure_stands_in_a_table(name: str) -> None:
    """As it is, or as a mean, deviation or product that the caption names: here as it is."""
    figure = FIGURES[name]
    single = {  # one seed, so that means are the values themselves
        key: t[
            (t["seed"] == 0) if "seed" in t else t["seed_a"] == 0 if "seed_a" in t else t.index >= 0
        ]
        for key, t in TABLES.items()
    }
    single["survival"] = single["survival"][single["survival"]["init_a"] == 0]
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
    for name, figure in FIGURES.items():
        views = [panel.protocol for panel in figure.panels(TABLES, Site("gemma-3-1b", 12))]
        assert views == sorted(views, key=["paper", "controlled"].index), name
        assert set(views) == {"paper", "controlled"}, name


# --- the page -------------------------------------------------------------------------------------


def test_every_claim_appears_with_both_verdicts(made: Page) -> None:
    articles = [a["id"] for tag, a in made.tags if tag == "article"]
    assert articles == [f"claim-{number}" for number in range(1, 12)]
    for claim in TABLES["claims"].itertuples():
        assert f"{claim.claim}. {claim.statement}" in made.text
        assert claim.why in made.text
        assert claim.paper_rule in made.text and claim.controlled_rule in made.text
    tally = made.tables["Claims by verdict"]
    counts = TABLES["claims"]["controlled"].value_counts()
    assert tally[2][1:] == [str(counts[v]) for v in ("holds", "fails", "undecided")]


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


def test_failed_runs_environment_and_training_are_told(made: Page) -> None:
    assert "NaN in m/L0/wanda-row-0.30" in made.text
    assert "not trained enough" in made.text
    assert ["torch", "2.y"] in made.tables["Made with"]


def test_hostile_names_are_text(tmp_path: pathlib.Path) -> None:
    """In the page, in JSON inside a script, and in plotly's own markup."""
    tables = {name: table.copy() for name, table in TABLES.items()}
    for table in tables.values():
        for column in {"run", "model"} & set(table):
            table[column] = HOSTILE + table[column].astype(str).str.replace("/L", f"/{HOSTILE}L")
    runs = synthetic_runs(STUDY, failed=HOSTILE)
    text = page(tmp_path, tables, runs, STUDY)
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
    assert anchors == {"verdicts", "study", *(set(kept) - {"claims"}), *depth}


def test_one_dense_run_alone_makes_a_page(tmp_path: pathlib.Path) -> None:
    study = study_from_data({"models": [{"name": "x/y", "layers": [0]}]})
    tables = synthetic_tables(study)
    write_figures(tables, tmp_path)
    assert "x" in page(tmp_path, tables, synthetic_runs(study), study)


def test_print_images_are_inside_the_page(tmp_path: pathlib.Path) -> None:
    few = {name: TABLES[name][TABLES[name]["layer"] == 6] for name in ("stability", "survival")}
    write_figures(few, tmp_path)
    found = Page(page(tmp_path, TABLES, synthetic_runs(STUDY), STUDY))
    images = [a for tag, a in found.tags if tag == "img"]
    assert len(images) == 2
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
