"""Its section of the page, with a figure."""

from __future__ import annotations

from prunelens.report.panels.panel import Panel, Points, Site, Tables, rows_of
from prunelens.report.questions.section import FigureOf, Section


def _panels(tables: Tables, site: Site) -> list[Panel]:
    rows = rows_of(tables, "co_firing", site)
    x, y = (rows[name].tolist() if len(rows) else [] for name in ("sparsity", "mean_share"))
    points = Points("mean", x, y, colour="#1f77b4")
    return [Panel("controlled", "tokens in common", "sparsity", "share", [points], kind="dots")]


CO_FIRING = Section(
    "co_firing",
    "Do latents fire where they fired?",
    "On how many of its tokens does a latent still fire?",
    "",
    "",
    figures={"fig_co_firing": FigureOf(_panels, ("co_firing",), "Figure: co-firing")},
    tables={"co_firing": "Co-firing of every seed"},
    needs=("co_firing",),
)
