"""What columns mean is declared once, and every column of the output contract says it."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

import prunelens
from prunelens.columns import SHARED, meanings_of
from prunelens.study.folder import RUN_COLUMNS, RUN_MEANINGS
from prunelens.study.kind import CONDITION, Table
from prunelens.study.results import latent_meanings, study_tables, table_columns

DECLARED = prunelens.column_meanings() | {"latents": latent_meanings(), "runs": RUN_MEANINGS}


@pytest.mark.parametrize("name", DECLARED)
def test_every_column_has_a_sentence(name: str) -> None:
    for column, sentence in DECLARED[name].items():
        assert sentence.endswith("."), f"{name}: {column} says {sentence!r}"


def test_a_column_without_a_sentence_is_seen() -> None:
    table = Table("mine", "run", "nothing", "mine.parquet", "seed unheard_of")
    assert list(table.meanings) == [*CONDITION, "seed", "unheard_of"]
    assert table.meanings["seed"] == SHARED["seed"] and table.meanings["unheard_of"] == ""


def test_sentences_are_read_in_the_order_of_the_columns() -> None:
    declared = """
        tau mnn
        gain: How much,
            and of what: all.
        gain_low gain_high
        first second: Either.
        reason: Own.
        other_low
    """
    ends = "Ends of the 95 % interval of `gain`; empty where it has none."
    assert list(meanings_of(declared).items()) == [
        ("tau", SHARED["tau"]),
        ("mnn", SHARED["mnn"]),
        ("gain", "How much, and of what: all."),
        ("gain_low", ends),
        ("gain_high", ends),
        ("first", "Either."),
        ("second", "Either."),
        ("reason", "Own."),
        ("other_low", ""),
    ]
    assert meanings_of("") == {}


def test_names_and_meanings_are_of_the_same_tables() -> None:
    assert list(prunelens.column_meanings()) == list(table_columns()) == list(study_tables())
    assert {name: list(told) for name, told in prunelens.column_meanings().items()} == (
        table_columns()
    )
    assert list(RUN_MEANINGS) == RUN_COLUMNS


def test_the_page_of_tables_is_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "tools"))
    tool = importlib.import_module("write_tables")
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {*study_tables(), "runs.csv", "latents.parquet"} <= set(headings)
    own = table_columns()["stability"][len(CONDITION) :]
    section = text.split("## stability\n")[1].split("\n## ")[0]
    assert re.findall(r"`(\w+)`(?=[,:])", section) == own
