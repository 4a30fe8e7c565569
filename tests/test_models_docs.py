"""docs/models.md says what a handful of its models, made anew, do."""

from __future__ import annotations

import importlib
import pathlib
import sys
from types import ModuleType

import pytest

TOOLS = pathlib.Path(__file__).parents[1] / "tools"
# Of each kind of answer one; `row` tries everything that the table speaks of.
KINDS = ("llama", "afmoe", "mamba", "openai-gpt", "mixtral", "recurrent_gemma", "xlnet")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module("write_models")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_the_model_does(tool: ModuleType, kind: str):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.line(tool.NAMES[kind], tool.row(kind)) in page


def test_every_class_of_the_installed_transformers_has_its_line(tool: ModuleType):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"transformers {tool.transformers.__version__}:" in page
    assert not [name for name in tool.NAMES.values() if f"`{name}`" not in page]
