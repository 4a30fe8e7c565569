"""Text that a spreadsheet would run does not arrive as a formula in any CSV file."""

from __future__ import annotations

import ast
import csv
import io
import pathlib
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from prunelens.config import ModelConfig, study_from_data
from prunelens.csv_table import as_csv, as_written, harmless
from prunelens.errors import UserError
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.tables import write_tables
from prunelens.study.folder import RUN_COLUMNS, read_runs
from synthetic_results import synthetic_study, synthetic_tables

FORMULAS = [
    *("=cmd|' /C calc'!A0", "=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1"),
    *(
        '=HYPERLINK("x")',
        "＝1+1",
        "＋1",
        "－1",
        "＠x",
        "-x",
        "'=1",
        "a\r=1",
        "a\r\n=1",
        '";=1',
        "-1_0",
    ),
]
PACKAGE = pathlib.Path(__file__).parents[2] / "src" / "prunelens"


def live_cells(text: str) -> list[str]:
    """Cells that begin a formula, as Excel splits rows: at any carriage return outside quotes."""
    rows = csv.reader(io.StringIO(text, newline=""))
    cells = [cell for row in rows for cell in row]
    return [c for c in cells if c.strip()[:1] in set("=+-@＝＋－＠") and not is_number(c)]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def test_live_cells_are_seen() -> None:
    for formula in FORMULAS:
        if not formula.startswith(("'", '"')) and "\r\n" not in formula:  # those are quoted
            assert live_cells(pd.DataFrame({"a": [formula]}).to_csv(index=False)), formula


# --- one cell -------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_becomes_text_and_comes_back(formula: str) -> None:
    table = pd.DataFrame({"text": [formula], "number": [-1.5], formula: [1]})
    text = as_csv(table)
    assert not live_cells(text)
    back = pd.read_csv(io.StringIO(text), keep_default_na=False)
    assert as_written(back["text"][0]) == formula.replace("\r\n", "\n").replace("\r", "\n")
    assert back["number"][0] == -1.5


@settings(max_examples=200, derandomize=True, database=None)
@given(st.text(alphabet=st.sampled_from("=+-@\t\r\n'\" ,;1ax＝"), max_size=6))
def test_any_text_becomes_harmless_and_comes_back(text: str) -> None:
    assert as_written(harmless(text)) in (
        text.replace("\r\n", "\n").replace("\r", "\n"),
        text.removeprefix("'") if is_number(text) else None,
    )
    assert not live_cells(as_csv(pd.DataFrame({"a": ["x", text]})))


def test_numbers_keep_their_sign_and_their_bytes() -> None:
    """As pandas writes them, in columns of every type."""
    table = pd.DataFrame(
        {
            "float": [-1.5, float("nan"), float("-inf"), 1e-300],
            "int": [-1, 2, -3, 4],
            "bool": [True, False, True, False],
            "mixed": pd.Series([-1, None, "-2.5", True], dtype=object),
            "integers": pd.Series([1, None, 2, -3], dtype=object),
            "strings": pd.array(["a", "-0.5", None, "1e-3"], dtype="string"),
            "float32": np.array([-0.1, 0.2, 0.3, 0.4], dtype=np.float32),
        }
    )
    assert as_csv(table) == table.to_csv(index=False)
    assert as_csv(table.head(0)) == table.head(0).to_csv(index=False)


# --- every table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_table_has_a_formula_wherever_text_comes_from(
    formula: str, tmp_path: pathlib.Path
) -> None:
    study = synthetic_study(layers=(12,), sparsities=(0.3,))
    tables = synthetic_tables(study)
    for table in tables.values():
        for name, column in list(table.items()):
            cells = [formula if isinstance(cell, str) else cell for cell in column]
            table[name] = pd.Series(cells, index=table.index, dtype=column.dtype)
    written = write_tables(tables, tmp_path)
    for name in ("perplexity", "claims", "transfer"):
        assert formula in written[name].to_numpy()
    files = list((tmp_path / "tables").glob("*.csv"))
    assert len(files) >= 15
    for path in files:
        assert not live_cells(path.read_text(encoding="utf-8")), path.name
    hostile = {
        name: table.replace("gemma-3-1b", formula)
        for name, table in synthetic_tables(study).items()
    }
    write_paper_tables(hostile, study, tmp_path)
    for path in (tmp_path / "tables").glob("*.csv"):
        assert not live_cells(path.read_text(encoding="utf-8")), path.name


def test_runs_come_back_as_they_were(tmp_path: pathlib.Path) -> None:
    row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS, "x")
    row |= {"reason": "=cmd() failed", "sparsity": -0.5}
    (tmp_path / "runs.csv").write_text(as_csv(pd.DataFrame([row])))
    assert not live_cells((tmp_path / "runs.csv").read_text())
    found = read_runs(tmp_path)
    assert (found["reason"][0], found["sparsity"][0]) == ("=cmd() failed", -0.5)


def test_csv_is_written_in_one_place() -> None:
    calls = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("to_csv", "writer", "DictWriter"):
                calls[path.name] = node.attr
    assert calls == {"csv_table.py": "to_csv"}


# --- names ----------------------------------------------------------------------------------------

NAMES = ["=cmd()", "@x", "+1", "-x", "＝x", "\tx", "a\nb", "a\x1b[31m", "...", " ", "\u202ex"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tables_are_refused_in_the_study(name: str) -> None:
    """By the name of a folder, and where a name is given."""
    for model in (
        {"name": f"./{name}"},
        {"name": "bundled", "short_name": name},
        {"name": "bundled", "pretrained": [{"layer": 3, "folder": "x", "name": name}]},
        {"name": "bundled", "pretrained": [{"layer": 3, "folder": f"x/{name}"}]},
    ):
        with pytest.raises(UserError, match=r"name|folder"):
            study_from_data({"models": [model]})
    for checkpoint in ({"checkpoint": f"x/{name}"}, {"checkpoint": "x/y", "name": name}):
        with pytest.raises(UserError, match=r"prunings\.0"):
            study_from_data({"prunings": [checkpoint]})
    with pytest.raises(UserError, match="name"):
        study_from_data({"name": name})


def test_a_folder_with_such_a_name_may_be_given_another() -> None:
    assert ModelConfig(name="./=cmd()", short_name="theirs").label == "theirs"
