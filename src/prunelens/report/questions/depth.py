"""What each layer shows, on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.overall import depth
from prunelens.report.paper_tables import DEPTH as TABLE
from prunelens.report.questions.section import Section

DEPTH = Section(
    "depth",
    "Over depth, and emerging features",
    "What each layer shows, as means. Emerging: the share of the pruned SAE's features that no"
    " dense feature matches.",
    "",
    "",
    tables={"depth": "The questions over layers"},
    further=lambda tables: depth(tables.get(TABLE, pd.DataFrame())),
)
