"""Figure 3: can SAEs of the dense model still be used on the pruned one?"""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.verdict import LIMITS
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
    """Paper's Figure 3; beside it the three numbers that the verdict rests on."""
    plain = rows_of(tables, "transfer", site, refit="none")
    every = plain[plain["positions"] == "all"]
    kept = plain[plain["positions"] == "norm_filtered"]
    paper = Panel(
        "paper",
        "FVU over all positions, raw space",
        "sparsity",
        "FVU (fvu_raw)",
        _by_sae(every, "fvu_raw") + published_points(every, "transfer", "fvu"),
        x_ticks=ticks(every),
        caption="Unexplained variance of SAEs of the dense model on pruned activations. Hollow:"
        " the paper's numbers, of the official SAEs.",
    )
    return [
        paper,
        _judged(
            kept,
            "fvu_dense_var_ratio",
            "error over the dense variance, unusual norms left out",
            "times the dense model's",
        ),
        _judged(
            kept,
            "fvu_raw_ratio",
            "error over the pruned model's own variance",
            "times the dense model's",
        ),
        _judged(
            kept,
            "ce_drop",
            "what less the model gets from the reconstruction",
            "CE recovered, dense - pruned",
        ),
    ]


def _judged(rows: pd.DataFrame, name: str, title: str, y_label: str) -> Panel:
    """A number of the verdict with its limit, the verdicts, and what noise of equal size does."""
    null, own = (rows[rows["source"] == source] for source in ("null", "pruned"))
    return Panel(
        "controlled",
        title,
        "sparsity",
        y_label,
        [
            *_by_sae(own, name, judged=True),
            *_by_sae(null, name, judged=True, suffix="null", line="dotted"),
        ],
        (Level("limit", LIMITS[name].most, "#7f7f7f"),),
        x_ticks=ticks(own),
        caption=f"{name} with the verdict at each point; intervals over documents (of several"
        " seeds, from the lowest end to the highest). Dotted: noise of equal size in its place.",
    )


def _by_sae(
    rows: pd.DataFrame,
    column: str,
    *,
    judged: bool = False,
    suffix: str = "",
    line: Line | None = None,
) -> list[Points]:
    points: list[Points] = []
    for (name, part), style in zip(_saes(rows), LINES * len(rows), strict=False):
        for series in over_sparsity(part, column, spread="range", line=line or style):
            label = ", ".join(filter(None, (series.name, shortened(name, 30), suffix)))
            shown = _with_intervals(part, column, series) if judged else series
            points.append(shown._replace(name=label))
    return points


def _with_intervals(rows: pd.DataFrame, column: str, series: Points) -> Points:
    """The series with the ends of its intervals and its verdicts."""
    family = rows[(rows["method"] == "dense") | (family_of(rows["run"]) == series.name)]
    at = [family[family["sparsity"] == sparsity] for sparsity in series.x]
    return series._replace(
        low=[float(part[f"{column}_low"].fillna(part[column]).min()) for part in at],
        high=[float(part[f"{column}_high"].fillna(part[column]).max()) for part in at],
        words=["/".join(dict.fromkeys(word for word in part["verdict"] if word)) for part in at],
    )


def _saes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Our own SAEs as one group, then each of others."""
    names = rows["sae"].astype(str)
    group = names.where(~names.str.fullmatch(OWN), OURS)
    return [(str(name), part) for name, part in rows.groupby(group, sort=False)]
