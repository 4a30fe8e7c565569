"""docs/performance.md: its table is what the saved reports of the benchmarks say."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "write_performance.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
REPORTS = tool.reports()


def test_the_table_is_made_from_the_saved_reports():
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.with_table(page, REPORTS) == page, "run python tools/write_performance.py"


@pytest.mark.parametrize(
    "report", REPORTS, ids=lambda report: report["benchmark"] + report.get("variant", "")
)
def test_a_report_says_where_it_ran_and_judges_by_its_numbers(report):
    assert (ROOT / "benchmarks" / f"{report['benchmark']}.py").is_file()
    assert report["setting"]["commit"] and report["setting"]["versions"]["torch"]
    for mark in report["marks"]:
        kept = {"at least": mark["measured"] >= mark["asked"]}
        kept["at most"] = mark["measured"] <= mark["asked"]
        assert mark["reached"] == kept[mark["direction"]]


def test_what_was_missed_is_said():
    mark = {"row": 1, "what": "a / b", "asked": 2, "direction": "at least", "measured": 1.5}
    setting = {"commit": "abc", "changed_since": True}
    report = {"benchmark": "x", "marks": [{**mark, "reached": False}], "setting": setting}
    line = tool.table(json.loads(json.dumps([report]))).splitlines()[-1]
    assert line == "| 1 | a / b | at least 2 | 1.5 | **not reached** | `x` | abc+ |"
