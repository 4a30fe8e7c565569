"""Figure 3: can SAEs of the dense model still be used on the pruned one?"""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.verdict import CE_MARGIN, FVU_FACTOR
from prunelens.report.panels.panel import (
    Level,
    Line,
    Panel,
    Points,
    Site,
    Tables,
    family_of,
    over_sparsity,
    published_points,
    rows_of,
    shortened,
    ticks,
)

OWN = r"seed \d+"  # our own dense SAEs are named so
OURS = "our SAEs"
LINES: tuple[Line, ...] = ("solid", "dashed", "dotted")


def transfer(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 3; beside it the two numbers that the verdict rests on."""
    plain = rows_of(tables, "transfer", site, refit="none")
    every = plain[plain["positions"] == "all"] if len(plain) else plain
    kept = plain[plain["positions"] == "norm_filtered"] if len(plain) else plain
    paper = Panel(
        "paper",
        "FVU over all positions, raw space",
        "sparsity",
        "FVU (fvu_raw)",
        _by_sae(every, "fvu_raw", words=False) + published_points(every, "transfer", "fvu"),
        x_ticks=ticks(every),
        caption="Unexplained variance of SAEs of the dense model on pruned activations. Hollow:"
        " the paper's numbers, of the official SAEs.",
    )
    error = Panel(
        "controlled",
        "error over the dense variance, unusual norms left out",
        "sparsity",
        "fvu_dense_var",
        _by_sae(kept, "fvu_dense_var", words=True),
        _limits(kept, "fvu_dense_var", factor=FVU_FACTOR, name=f"{FVU_FACTOR} x dense"),
        x_ticks=ticks(kept),
        caption="Error over the variance of dense activations, with the verdict at each point.",
    )
    recovered = Panel(
        "controlled",
        "what the model still gets from the reconstruction",
        "sparsity",
        "CE recovered",
        _by_sae(kept, "ce_recovered", words=True),
        _limits(kept, "ce_recovered", minus=CE_MARGIN, name=f"dense - {CE_MARGIN}"),
        x_ticks=ticks(kept),
        caption="Cross-entropy recovered when the reconstruction replaces the activations.",
    )
    return [paper, error, recovered]


def _by_sae(rows: pd.DataFrame, column: str, *, words: bool) -> list[Points]:
    points: list[Points] = []
    for (name, part), line in zip(_saes(rows), LINES * len(rows), strict=False):
        for series in over_sparsity(part, column, spread="range", line=line):
            named = series._replace(name=f"{series.name}, {shortened(name, 30)}")
            verdicts = _verdicts(part, series) if words else None
            points.append(named._replace(words=verdicts))
    return points


def _saes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Our own SAEs as one group, then each of others."""
    if not len(rows):
        return []
    names = rows["sae"].astype(str)
    group = names.where(~names.str.fullmatch(OWN), OURS)
    return [(str(name), part) for name, part in rows.groupby(group, sort=False)]


def _verdicts(rows: pd.DataFrame, series: Points) -> list[str]:
    """The verdicts of a family at its sparsities, e.g. `keep` or `keep/refit` between seeds."""
    family = rows[(family_of(rows["run"]) == series.name) & rows["verdict"].notna()]
    words = []
    for sparsity in series.x:
        found = family[family["sparsity"] == sparsity]["verdict"]
        words.append("/".join(dict.fromkeys(str(word) for word in found if word)))
    return words


def _limits(
    rows: pd.DataFrame, column: str, *, name: str, factor: float = 1.0, minus: float = 0.0
) -> tuple[Level, ...]:
    """Where the verdict turns, per SAE (the mean over ours)."""
    found = []
    for sae, part in _saes(rows):
        dense = part[part["method"] == "dense"][column].dropna()
        if len(dense):
            label = f"{name}, {shortened(sae, 30)}"
            found.append(Level(label, float(dense.mean()) * factor - minus, "#7f7f7f"))
    return tuple(found)
