"""A study's results -> one self-contained HTML page that asks no network for anything.

The page is data and two inline scripts: plotly.js and a short one that hands it the figures. A
Content-Security-Policy lets no other script run, whatever the names of models and runs hold.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from PIL import Image

from prunelens.config import StudyConfig
from prunelens.report.answer import ANSWERS
from prunelens.report.interactive import plotly_figure
from prunelens.report.panels.panel import Panel, Tables, sites
from prunelens.report.paper_tables import DEPTH, MATRIX, paper_tables
from prunelens.report.questions import SECTIONS, overviews
from prunelens.report.questions.section import Section
from prunelens.report.shown_table import Shown, number, shown
from prunelens.report.sinks import sinks_found
from prunelens.report.sufficiency import not_enough
from prunelens.study.results import study_tables
from prunelens.study.work import read_json
from prunelens.temporary import replacing

TEMPLATES = pathlib.Path(__file__).parent / "templates"
MOST_ROWS = 300  # of one table on the page; the rest is in its CSV
VERDICTS = ("holds", "fails", "undecided")
REDUNDANT = ("model", "layer", "method", "sparsity", "scope", "pattern")  # the run's name has them
MATRIX_CAPTION = "Table A.1: the runs of this study"
FEW_COLOURS = 48
WHOLE_STUDY = "all"  # the run of rows that are about the whole study


class Drawn(NamedTuple):
    """A panel on the page."""

    identifier: str
    title: str
    caption: str
    published: bool
    """Of the paper's protocol."""


class Group(NamedTuple):
    """The panels of one site."""

    label: str
    panels: list[Drawn]

    @property
    def has_published(self) -> bool:
        """The paper's view stands beside the controlled one."""
        return any(panel.published for panel in self.panels)


class Filled(NamedTuple):
    """A section with what stands in it here."""

    declared: Section
    groups: list[Group]
    images: list[tuple[str, str]]
    """The figures for print: title, and the PNG as a data address."""
    tables: list[Shown]
    more: list[Shown]


def write_page(
    out: pathlib.Path, tables: Tables, runs: pd.DataFrame, study: StudyConfig
) -> pathlib.Path:
    """Write `report.html` of a study folder; returns its path.

    Args:
        out: the study's folder; figures/*.png, environment.json and study.yaml are shown where they
            are there.
        tables: the results by name, as `report.tables.write_tables` returns them.
        runs: the table of runs (runs.csv).
        study: the description of the study.
    """
    path = out / "report.html"
    with replacing(path) as file:
        file.write_text(page(out, tables, runs, study), encoding="utf-8")
    return path


def page(out: pathlib.Path, tables: Tables, runs: pd.DataFrame, study: StudyConfig) -> str:
    """The page's text; arguments as `write_page`."""
    figures: dict[str, Any] = {}
    theirs = paper_tables(tables, study)
    every = {**tables, **overviews(tables), **theirs}
    sections = [
        _filled(section, tables, every, out, figures)
        for section in SECTIONS
        if not section.needs or any(len(tables.get(name, ())) for name in section.needs)
    ]
    scripts = {"plotly": _plotly() if figures else "", "own": _template_text("report.js")}
    return _environment().get_template("report.html.j2").render(
        study=study,
        models=[model.label for model in study.models],
        answers=_records(theirs.get(ANSWERS, pd.DataFrame())),
        claims=_claims(tables),
        verdicts=VERDICTS,
        sections=[each for each in sections if each.groups or each.tables or each.more],
        untrained=not_enough(tables),
        sinks=sinks_found(tables),
        failed=_records(runs[runs["status"] == "failed"]) if len(runs) else [],
        num_runs=len(runs),
        matrix=shown(theirs[MATRIX], MATRIX_CAPTION, drop=REDUNDANT, file=_file(MATRIX)),
        environment=_environment_rows(out / "environment.json"),
        yaml=_read(out / "study.yaml"),
        style=_template_text("report.css"),
        scripts=scripts,
        policy=_policy(list(scripts.values())),
        figures=_as_data(figures),
    )  # fmt: skip


# --- sections -------------------------------------------------------------------------------------


def _filled(
    section: Section,
    tables: Tables,
    every: Tables,
    out: pathlib.Path,
    figures: dict[str, Any],
) -> Filled:
    groups = []
    for label, panels in _panels(section, tables, every):
        drawn = []
        for panel in panels:
            if not panel.empty:
                identifier = f"{section.anchor}-{len(figures)}"
                figures[identifier] = plotly_figure(panel)
                published = panel.protocol == "paper"
                drawn.append(Drawn(identifier, panel.title, panel.caption, published))
        if drawn:
            groups.append(Group(label, drawn))
    images = [
        (figure.title, _data_address(path))
        for name, figure in section.figures.items()
        if (path := out / "figures" / f"{name}.png").is_file()
    ]
    return Filled(
        section,
        groups,
        images,
        *(
            [
                _shown(name, every[name], caption, section.assumed.get(name, ""))
                for name, caption in told.items()
                if len(every.get(name, ()))
            ]
            for told in (section.tables, section.more)
        ),
    )


def _panels(section: Section, tables: Tables, every: Tables) -> Iterator[tuple[str, list[Panel]]]:
    """Label and panels, one per site; the paper's figures of a question stand together."""
    needs = [figure.needs[0] for figure in section.figures.values()]
    for site in sites(tables, needs):
        panels = [panel for each in section.figures.values() for panel in each.panels(tables, site)]
        yield f"{site.model}, layer {site.layer}", panels
    yield from section.further(every).items()


def _shown(name: str, table: pd.DataFrame, caption: str, assumed: str) -> Shown:
    drop = tuple(c for c in REDUNDANT if c != "layer") if name == DEPTH else REDUNDANT
    if len(table) > MOST_ROWS:
        caption += f" (the first {MOST_ROWS} of {len(table)} rows; all of them in the file)"
        table = table.head(MOST_ROWS)
    if "run" in table and (table["run"] == WHOLE_STUDY).all():
        table = table.drop(columns="run")
    file = None if " " in name else _file(name)
    told = study_tables()[name].meanings if name in study_tables() else {}
    return shown(table, caption, drop=drop, file=file, assumed=assumed, meanings=told)


def _claims(tables: Tables) -> list[dict[str, Any]]:
    """The claims with the contrasts that judge them, one by one."""
    claims = _records(tables.get("claims", pd.DataFrame()))
    for claim in claims:
        for name in ("paper_contrasts", "controlled_contrasts"):
            claim[name] = [text for text in claim.get(name, "").split("; ") if text]
    return claims


# --- what is around them --------------------------------------------------------------------------


def _environment_rows(path: pathlib.Path) -> list[tuple[str, str]]:
    """environment.json as name and value; libraries as rows of their own."""
    if not path.is_file():
        return []
    try:
        found = dict(read_json(path))
        libraries = dict(found.pop("libraries", {}))
    except (OSError, ValueError, TypeError, RecursionError):
        return [(path.name, "damaged")]
    return [(str(name), str(value)) for name, value in {**found, **libraries}.items()]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    known = table.astype(object)
    return known.where(known.notna(), "").to_dict("records")


def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _file(name: str) -> str:
    return f"tables/{name}.csv"


def _data_address(path: pathlib.Path) -> str:
    """The figure in few colours: a quarter of the bytes, and on paper the same."""
    small = io.BytesIO()
    with Image.open(path) as figure:
        quick = Image.Quantize.FASTOCTREE
        figure.convert("RGB").quantize(FEW_COLOURS, quick, dither=Image.Dither.NONE).save(
            small, "PNG"
        )
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


# --- safety ---------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment


def _policy(scripts: list[str]) -> str:
    """Only these scripts run, nothing is loaded from anywhere, nothing is evaluated.

    plotly.js sets styles as it draws, hence the inline ones.
    """
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def _as_data(figures: dict[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(figures, allow_nan=False, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")  # as browsers hash it


def _template_text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
