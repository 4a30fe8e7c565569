"""HTML in every string of a study's results: the report, the explorer and the cards are inert."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import pathlib
import zlib
from typing import Any

import markupsafe
import pandas as pd
import pytest

from explorer_world import explorer_world
from prunelens.cards import escaped
from prunelens.report.explorer.folder import front_files, write_explorer
from prunelens.report.page import page
from synthetic_results import synthetic_runs, synthetic_study, synthetic_tables

PAYLOADS = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></textarea><iframe src=javascript:alert(1)>",
    "<!--<script>",
    "javascript:alert(1)",
    "{{ 7*7 }}{% raw %}",
    "]]><a href=javascript:alert(1)>x</a>",
    "\u2028</script\u2029><object data=x>",
]
FORBIDDEN = {"img", "svg", "iframe", "object", "embed", "base", "form", "link", "audio", "video"}


ADDRESSES = {"href", "src", "action", "formaction", "data", "srcdoc", "xlink:href", "content"}


class Tags(html.parser.HTMLParser):
    """What a browser would make elements of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def alive(self) -> list[str]:
        """Elements and attributes that could load or run something."""
        bad = []
        for tag, attributes in self.found:
            own_picture = tag == "img" and str(attributes.get("src")).startswith("data:image/png")
            if tag in FORBIDDEN and not own_picture:
                bad.append(tag)
            for name, value in attributes.items():
                if name.startswith("on"):
                    bad.append(f"{tag} {name}")
                if name in ADDRESSES and "script:" in str(value).lower():
                    bad.append(f"{tag} {name}")
        return bad


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_are_seen(payload: str) -> None:
    """So that the tests below say something, each as it would stand in text or an attribute."""
    texts = (f"<p>{payload}</p>", f'<p title="{payload}">', f"<p title='{payload}'>", payload)
    hrefs = (f"<a href='{payload}'>", f"<script>{payload}")
    seen = [Tags(text).alive() or len(Tags(text).found) > 1 for text in (*texts, *hrefs)]
    assert any(seen) or payload.startswith(("<!--", "{{"))


# --- the report -----------------------------------------------------------------------------------


def filled(table: pd.DataFrame) -> pd.DataFrame:
    """Every string made hostile, equal ones alike, so that rows that belong together still do."""
    hostile = {}
    for name, column in table.items():
        cells = [f"{payload_of(cell)}{cell}" if isinstance(cell, str) else cell for cell in column]
        hostile[name] = pd.Series(cells, index=table.index, dtype=object)
        if column.dtype.kind in "biuf":
            hostile[name] = column
    return pd.DataFrame(hostile)


def payload_of(text: str) -> str:
    return PAYLOADS[zlib.crc32(text.encode()) % len(PAYLOADS)]


@pytest.mark.parametrize("what", ["names", "all"])
def test_a_report_of_hostile_strings_is_inert(what: str, tmp_path: pathlib.Path) -> None:
    """`names`: what a study's input can set; `all`: every string of the tables, reasons included.

    With every string changed, methods and measures are none that the page knows, so that some of
    its sections are empty; hence both.
    """
    study = synthetic_study(layers=(12,), sparsities=(0.3,))
    tables = synthetic_tables(study)
    runs = pd.concat([synthetic_runs(study, failed=payload) for payload in PAYLOADS])
    named = {"run", "model", "corpus", "sae", "reason", "folder", "numbers"}
    for name, table in tables.items():
        keep = set(table) - named if what == "names" else set()
        tables[name] = filled(table).assign(**{c: table[c] for c in keep})
    both = {payload: payload for payload in PAYLOADS}
    (tmp_path / "environment.json").write_text(json.dumps({**both, "libraries": both}))
    (tmp_path / "study.yaml").write_text("\n".join(PAYLOADS), encoding="utf-8")
    text = page(tmp_path, tables, filled(runs), study)
    found = Tags(text)
    assert not found.alive()
    assert len([tag for tag, _ in found.found if tag == "script"]) == 3
    [policy] = [a["content"] for tag, a in found.found if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in str(policy)
    assert all(text.count(shown) >= 2 for shown in map(markupsafe.escape, PAYLOADS))


# --- the explorer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_explorer_of_hostile_strings_is_data(payload: str, tmp_path: pathlib.Path) -> None:
    """Its page holds nothing of a study; its data cannot end the script that they stand in."""
    plain, hostile = tmp_path / "plain", tmp_path / "hostile"
    world = explorer_world(num_latents=20, num_conditions=2, windows=4, hostile=False)
    write_explorer(world, plain)
    write_explorer(infected(world, payload), hostile)
    for path in plain.rglob("*"):
        if path.relative_to(plain).as_posix() in front_files():
            same = (hostile / path.relative_to(plain)).read_bytes()
            assert same == path.read_bytes()
    files = list((hostile / "data").rglob("*.js"))
    assert any(json.dumps(payload)[1:5] in path.read_text() for path in files) or "<" in payload
    for path in files:
        text = path.read_text(encoding="ascii")
        assert "<" not in text and text.startswith("prunelens.receive(")
        decoder = json.JSONDecoder()
        name, end = decoder.raw_decode(text, len("prunelens.receive("))
        data, end = decoder.raw_decode(text, end + 1)
        assert text[end:] == ");\n" and isinstance(name, str) and data is not None


def infected(found: Any, payload: str) -> Any:
    """The same with the payload in every string but those that become names of files."""
    if isinstance(found, str):
        return payload + found
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        return dataclasses.replace(found, **_infected_fields(fields, payload))
    if hasattr(found, "_asdict"):
        return found._replace(**_infected_fields(found._asdict(), payload))
    if isinstance(found, list | tuple):
        return type(found)(infected(part, payload) for part in found)
    return found


def _infected_fields(fields: dict[str, Any], payload: str) -> dict[str, Any]:
    kept = {"id", "key", "kind", "kept_means", "neuronpedia", "unit"}
    return {name: infected(value, payload) for name, value in fields.items() if name not in kept}


# --- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
def test_names_on_cards_are_text(payload: str) -> None:
    shown = escaped(payload)
    assert "<" not in shown and "\n" not in shown and not Tags(shown).found
    assert "javascript:" not in shown or "](" not in shown
