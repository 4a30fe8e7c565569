"""Figure 8: is it the same feature? By activations, by direction, by span, by training on."""

from __future__ import annotations

import pandas as pd

from prunelens.report.panels.panel import (
    PRIMARY_TAU,
    Level,
    Line,
    Panel,
    Site,
    Tables,
    at_tau,
    by_value,
    over_sparsity,
    rows_of,
    ticks,
)
from prunelens.report.panels.survival import ARM_COLOURS, levels_of

ARM_LINES: dict[str, tuple[str, Line]] = {
    "shared_init": ("same start", "solid"),
    "cross_init": ("other start", "dotted"),
}
SOURCE_LINES: dict[str, tuple[str, Line]] = {
    "pruned": ("pruned", "solid"),
    "null": ("the null", "dashed"),
    "unpaired": ("another token", "dotted"),
}


def identity(tables: Tables, site: Site) -> list[Panel]:
    """Four more ways to ask, each beside what it says without pruning and without features."""
    matching, null, unpruned = (
        at_tau(rows_of(tables, "activation_matching", site, source=source))
        for source in ("pruned", "null", "dense")
    )
    spans = rows_of(tables, "subspace", site)
    return [
        Panel(
            "controlled",
            "matched by activations",
            "sparsity",
            f"mutual best, correlation >= {PRIMARY_TAU}",
            by_value(matching, "arm", ARM_LINES, "mnn")
            + by_value(null, "arm", {"shared_init": ("the null, same start", "dashed")}, "mnn"),
            levels_of(unpruned, "mnn", ["ceiling_shared", "ceiling_cross", "chance"]),
            y_range=(-0.02, 1.02),
            x_ticks=ticks(matching),
            caption="Share of dense latents whose activations a latent of the pruned SAE matches on"
            " the same tokens, over sparsity, beside the same where that SAE reads the null: the"
            " common change and another token's remainder.",
        ),
        _scaling(rows_of(tables, "scaling", site)),
        Panel(
            "controlled",
            "inside the span of the four nearest directions",
            "sparsity",
            "subspace overlap (mean)",
            by_value(spans, "arm", ARM_LINES, "overlap"),
            levels_of(spans, "overlap", ["ceiling_cross", "floor_shared", "chance"]),
            y_range=(-0.02, 1.02),
            x_ticks=ticks(spans[spans["method"] != "dense"]),
            caption="Share of each dense direction that lies in the span of the four nearest"
            " directions of the pruned SAE, over sparsity.",
        ),
        _warm_start(at_tau(rows_of(tables, "survival", site, coordinates="normalised"))),
    ]


def _scaling(rows: pd.DataFrame) -> Panel:
    return Panel(
        "controlled",
        "multiple of each dense direction",
        "sparsity",
        "latent scaling (mean)",
        by_value(rows, "source", SOURCE_LINES, "mean_scaling"),
        (Level("", 1.0, ARM_COLOURS["ceiling_shared"]), Level("", 0.0, ARM_COLOURS["chance"])),
        x_ticks=ticks(rows),
        caption="Mean multiple of dense latents' directions in pruned activations over sparsity,"
        " beside the null (the common gain expected) and activations of other tokens (0 expected).",
    )


def _warm_start(rows: pd.DataFrame) -> Panel:
    warm = rows[rows["arm"] == "warm_start"]
    return Panel(
        "controlled",
        "dense SAEs trained on while pruned",
        "sparsity",
        f"MNN rate to dense, tau {PRIMARY_TAU}",
        over_sparsity(warm, "mnn", spread="range"),
        levels_of(rows, "mnn", ["ceiling_warm", "floor_warm"]),
        y_range=(-0.02, 1.02),
        x_ticks=ticks(warm),
        caption="Share of dense features that an SAE keeps when it is trained on with pruned"
        " activations, over sparsity, beside the same with dense ones and in a rotated space.",
    )
