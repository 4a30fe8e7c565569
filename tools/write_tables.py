"""Write the list of tables and the lists of columns of docs/tables.md from what is declared.

.venv/bin/python tools/write_tables.py

What stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` is written anew: the list of
tables where NAME is `tables`, else the columns of that table. What is written by hand around it
stays. A table that the page has no section of gets one at its end.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from prunelens.study.folder import RUN_MEANINGS
from prunelens.study.kind import CONDITION
from prunelens.study.results import latent_meanings, study_tables

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "tables.md"


def listed() -> str:
    """A row for every table."""
    rows = ["| file | one row per | answers |", "|---|---|---|"]
    rows += [f"| `tables/{t.name}.csv` | {t.per} | {t.answers} |" for t in study_tables().values()]
    return "\n".join(rows) + "\n"


def columns(meanings: Mapping[str, str]) -> str:
    """An item for every sentence, with the columns that it is about."""
    sentences = dict.fromkeys(meanings.values())
    names = {
        s: ", ".join(f"`{name}`" for name in meanings if meanings[name] == s) for s in sentences
    }
    return "".join(f"- {names[sentence]}: {sentence}\n" for sentence in sentences)


def generated() -> dict[str, str]:
    """What is written, by the name of its place.

    Columns that stand first in most tables are told once, in the place `leading`.
    """
    tables = study_tables()
    leading = {name: tables["stability"].meanings[name] for name in CONDITION}
    places = {"tables": listed(), "leading": columns(leading)}
    for name, table in tables.items():
        own = {c: s for c, s in table.meanings.items() if c not in table.leading}
        places[name] = columns(own)
    return places | {"runs": columns(RUN_MEANINGS), "latents": columns(latent_meanings())}


def page(before: str) -> str:
    """The page with all that in its places."""
    places = generated()
    for name in places:
        if f"<!-- {name}: begin -->" not in before:
            before += f"\n## {name}\n<!-- {name}: begin -->\n<!-- {name}: end -->\n"
    found = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->\n)", re.DOTALL)
    return found.sub(lambda m: m[1] + places[m[2]] + m[3], before)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
