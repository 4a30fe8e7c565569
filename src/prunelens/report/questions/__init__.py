"""What the page says about each question, and which figures and tables answer it."""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.panel import Tables
from prunelens.report.questions.causal import CAUSAL
from prunelens.report.questions.depth import DEPTH
from prunelens.report.questions.fragility import FRAGILITY
from prunelens.report.questions.identity import IDENTITY
from prunelens.report.questions.perplexity import PERPLEXITY
from prunelens.report.questions.predictor import PREDICTOR
from prunelens.report.questions.probes import PROBES
from prunelens.report.questions.quality import QUALITY
from prunelens.report.questions.section import FigureOf
from prunelens.report.questions.selftest import SELFTEST
from prunelens.report.questions.stability import STABILITY
from prunelens.report.questions.sufficiency import SUFFICIENCY
from prunelens.report.questions.survival import SURVIVAL
from prunelens.report.questions.transfer import TRANSFER

SECTIONS = [  # sections of the page in their order; append one of your own
    SELFTEST,
    PERPLEXITY,
    SUFFICIENCY,
    STABILITY,
    SURVIVAL,
    IDENTITY,
    PROBES,
    TRANSFER,
    FRAGILITY,
    PREDICTOR,
    CAUSAL,
    DEPTH,
    QUALITY,
]


def figures() -> dict[str, FigureOf]:
    """All of them, by the names of their files."""
    return {name: section.figures[name] for section in SECTIONS for name in section.figures}


def overviews(tables: Tables) -> dict[str, pd.DataFrame]:
    """The tables that are made for the page alone, by name."""
    made = {name: t for section in SECTIONS for name, t in section.made(tables).items()}
    return {name: table for name, table in made.items() if len(table)}
