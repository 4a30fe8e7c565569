"""Figure 6: what does the output lose when a latent is ablated?"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from prunelens.report.panels.panel import (
    Panel,
    Points,
    Site,
    Tables,
    conditions,
    points_of,
    rows_of,
)
from prunelens.report.published import beside_published

GROUPS = {
    "robust": "robust",
    "fragile": "fragile",
    "matched": "matched",
    "random": "random",
    "random_direction": "random direction",
}
RESAMPLED = (
    " Means over seeds and latents, with 95 % intervals over latents and documents; none where a"
    " group has too few of either, or where the interval would not cover (reason in causal.csv)."
)
KL = ("place", "kl_mean", "ci_low", "ci_high")  # the columns of a series
GROUP_COLOURS = {"robust": "#2a9d8f", "fragile": "#c1440e"}


def causal(tables: Tables, site: Site) -> list[Panel]:
    """Paper's Figure 6, with the part that is reconstruction error; beside it isolated effects."""
    rows = rows_of(tables, "causal", site)
    rows = rows[rows["ablated_in"].isin(["dense", "pruned"])]
    return [
        _as_published(rows),
        _where_it_fires(rows, "isolated", "isolated: with against without the latent"),
        _where_it_fires(rows, "error_preserving", "taken out of the model's own activation"),
    ]


def _as_published(rows: pd.DataFrame) -> Panel:
    rows = rows[(rows["grouping"] == "cosine") & (rows["protocol"] == "paper")]
    rows = rows.assign(place=_places(rows))
    points = []
    for group, colour in GROUP_COLOURS.items():
        part = rows[rows["group"] == group].dropna(subset="kl_mean")
        if len(part):
            shaded = list((part["kl_mean"] * part["reconstruction_share"].clip(0, 1)).fillna(0.0))
            points.append(points_of(part, group, *KL, colour=colour, shaded=shaded))
            points += _published_kl(part, group, colour)
    return Panel(
        "paper",
        "ablated in the SAE's reconstruction; shaded: the SAE's own error",
        "",
        "KL to the original output (nats)",
        points,
        kind="bars",
        categories=list(dict.fromkeys(rows["place"])),
        caption="Divergence of the output when one robust or one fragile latent is ablated, with"
        " the part that the SAE's reconstruction causes without any ablation." + RESAMPLED,
    )


def _places(rows: pd.DataFrame) -> pd.Series:
    """`wanda-row-0.30: dense`: the pair of models, and in which of them the latent is ablated."""
    condition = rows["run"].astype(str).str.rsplit("/", n=1).str[-1]
    return condition + ": " + rows["ablated_in"].astype(str)


def _published_kl(rows: pd.DataFrame, group: str, colour: str) -> list[Points]:
    found, columns = published_pairs(rows), ("place", f"paper_{group}_kl")
    style: dict[str, Any] = {"colour": colour, "line": "none", "hollow": True}
    series = points_of(found, f"paper: {group}", *columns, **style)
    return [series] if series.y else []


def published_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `causal` with the paper's Table 4 beside them.

    Its dense row belongs to the pair of models that it was measured for: the groups are the pair's.
    """
    paired = beside_published(rows, "causal")
    as_dense = beside_published(rows.assign(run="dense", method="dense", sparsity=0.0), "causal")
    names = [name for name in paired if name.startswith("paper_")]
    dense = (rows["ablated_in"] == "dense") & paired["paper_robust_kl"].notna()
    for name in names:
        paired[name] = paired[name].where(~dense, as_dense[name])
    return paired


def _where_it_fires(rows: pd.DataFrame, protocol: str, title: str) -> Panel:
    rows = rows[
        (rows["grouping"] == "persistence")
        & (rows["protocol"] == protocol)
        & (rows["contexts"] == "firing")
    ]
    points = []
    for name, colour, _marker, part in conditions(rows):
        for where, marker in (("dense", "circle"), ("pruned", "square")):
            here = part[(part["ablated_in"] == where) & part["group"].isin(list(GROUPS))]
            here = here.assign(place=here["group"].map(GROUPS))
            style = {"colour": colour, "marker": marker, "line": "none"}
            points.append(points_of(here, f"{name}: {where}", *KL, **style))
    present = {place for series in points for place in series.x}
    return Panel(
        "controlled",
        title,
        "grouped by persistence; read where the latent fires",
        "KL (nats)",
        [series for series in points if series.y and not all(map(math.isnan, series.y))],
        kind="dots",
        categories=[label for label in GROUPS.values() if label in present],
        caption="Divergence of the output where the ablated latent fires, by group of latents."
        + RESAMPLED,
    )
