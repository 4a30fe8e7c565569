"""Panels about the whole study rather than one site: the predictor's calibration, depth."""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.panel import (
    Panel,
    Points,
    Protocol,
    Tables,
    at_tau,
    conditions,
    points_of,
)

FEATURE_COLOURS = {"rate_sparsity": "#2a9d8f", "init_retention": "#9467bd"}
FEATURE_LABELS = {
    "rate_sparsity": "firing rate and sparsity",
    "init_retention": "distance from the start alone",
}
DEPTH_COLUMNS = {"survival": "paper", "persistence": "controlled"}


def calibration(tables: Tables) -> list[Panel]:
    """What the predictor says against what happened: as published, and held out."""
    rows = tables.get("predictor_calibration", pd.DataFrame())
    if not len(rows):
        return []
    views: list[tuple[Protocol, str, str, str]] = [
        ("paper", "shared_init", "in_sample", "in sample, survival with a shared start"),
        ("controlled", "beyond_noise", "held_out_condition", "conditions held out, beyond noise"),
    ]
    panels = []
    for protocol, target, evaluation, title in views:
        part = rows[(rows["target"] == target) & (rows["evaluation"] == evaluation)]
        part = at_tau(part)
        points = [Points("perfect", [0.0, 1.0], [0.0, 1.0], line="dotted")]
        for features, colour in FEATURE_COLOURS.items():
            known = part[part["features"] == features].dropna(subset="predicted")
            columns = (FEATURE_LABELS[features], "predicted", "observed")
            series = points_of(known.sort_values("predicted"), *columns, colour=colour)
            points += [series] if series.y else []
        panels.append(
            Panel(
                protocol, title, "predicted share", "observed share",
                points if len(points) > 1 else [], y_range=(-0.02, 1.02),
                caption="Predicted against observed share of latents that survive, in ten groups.",
            )
        )  # fmt: skip
    return panels


def depth(table: pd.DataFrame) -> dict[str, list[Panel]]:
    """Survival and persistence over layers, by model; only where there is more than one layer."""
    found = {}
    for model, rows in table.groupby("model", sort=False) if len(table) else ():
        if rows["layer"].nunique() > 1:
            found[str(model)] = [_over_layers(rows, column) for column in DEPTH_COLUMNS]
    return found


def _over_layers(rows: pd.DataFrame, column: str) -> Panel:
    points = []
    for name, colour, marker, part in conditions(rows):
        known = part.sort_values("layer").astype({"layer": float})
        points.append(points_of(known, name, "layer", column, colour=colour, marker=marker))
    return Panel(
        "paper" if DEPTH_COLUMNS[column] == "paper" else "controlled",
        f"{column} over layers",
        "layer",
        column,
        [series for series in points if series.y],
        y_range=(-0.02, 1.02),
        x_ticks=sorted(float(layer) for layer in rows["layer"].unique()),
        caption=f"Mean {column} of every condition over the layers of the model.",
    )
