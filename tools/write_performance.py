"""Write the table of docs/performance.md from benchmarks/results/*.json.

usage: python tools/write_performance.py [--check]

Every benchmark, run with --save, leaves a report that says what was asked, what was measured, and
where. The table between the two marker lines is made from those reports alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    """Write, or with --check only compare (exit code 1 where they differ)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    written = with_table(page, reports())
    if parser.parse_args().check:
        sys.exit(written != page)
    PAGE.write_text(written, encoding="utf-8")


def reports() -> list[dict[str, Any]]:
    """All saved reports, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def with_table(page: str, found: list[dict[str, Any]]) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "docs/performance.md lacks the two marker lines"
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def table(found: list[dict[str, Any]]) -> str:
    """A line per mark, by row of the issue, then by benchmark."""
    lines = [
        "| row | what | asked | measured | | benchmark | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    marks = [(mark["row"], report, mark) for report in found for mark in report["marks"]]
    for row, report, mark in sorted(marks, key=lambda each: (each[0], each[1]["benchmark"])):
        reached = "reached" if mark["reached"] else "**not reached**"
        commit = report["setting"]["commit"] + ("+" if report["setting"]["changed_since"] else "")
        benchmark = f"`{report['benchmark']}` {report.get('variant', '').replace('_', ' ')}"
        lines.append(
            f"| {row} | {mark['what']} | {mark['direction']} {number(mark['asked'])} |"
            f" {number(mark['measured'])} | {reached} | {benchmark.strip()} | {commit} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
