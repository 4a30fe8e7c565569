"""Write the list of tables of docs/tables.md from what the questions declare.

.venv/bin/python tools/write_tables.py

What stands between `<!-- tables: begin -->` and `<!-- tables: end -->` is written anew.
"""

from __future__ import annotations

import pathlib

from prunelens.study.results import study_tables

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "tables.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def listed() -> str:
    """A row for every table."""
    rows = ["| file | one row per | answers |", "|---|---|---|"]
    rows += [f"| `tables/{t.name}.csv` | {t.per} | {t.answers} |" for t in study_tables().values()]
    return "\n".join(rows) + "\n"


def page(before: str) -> str:
    """The page with that list in its place."""
    head, _, rest = before.partition(BEGIN)
    return head + BEGIN + listed() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
