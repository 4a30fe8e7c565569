"""What the figures show, apart from how they are drawn: tables in, panels out.

Every number in a panel stands in a CSV; nothing is computed but means and ranges. A figure is a
function of the tables and a site (model and layer); it returns its panels from left to right, the
paper's view first where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prunelens.report.panels.causal import causal
from prunelens.report.panels.fragility import fragility, fragility_by_method
from prunelens.report.panels.identity import identity
from prunelens.report.panels.panel import Panel, Site, Tables
from prunelens.report.panels.selftest import selftest
from prunelens.report.panels.survival import seed_stability, survival
from prunelens.report.panels.training import training
from prunelens.report.panels.transfer import transfer


class FigureOf(NamedTuple):
    """One of the paper's six figures, or of ours."""

    panels: Callable[[Tables, Site], list[Panel]]
    needs: tuple[str, ...]
    """Without the first of these tables there is no figure."""
    title: str


FIGURES = {
    "fig1_seed_stability": FigureOf(
        seed_stability, ("stability", "survival"), "Figure 1: agreement between seeds"
    ),
    "fig2_survival": FigureOf(
        survival,
        ("survival", "survival_corrected", "persistence"),
        "Figure 2: survival under pruning",
    ),
    "fig3_transfer": FigureOf(transfer, ("transfer",), "Figure 3: SAEs of the dense model"),
    "fig4_fragility": FigureOf(fragility, ("fragility",), "Figure 4: survival by firing rate"),
    "fig5_fragility_by_method": FigureOf(
        fragility_by_method, ("fragility", "fragility_tests"), "Figure 5: the same by method"
    ),
    "fig6_causal": FigureOf(causal, ("causal",), "Figure 6: effect of ablations"),
    "fig7_training": FigureOf(
        training, ("training_curves", "survival_by_step"), "Figure 7: SAEs while they are trained"
    ),
    "fig8_identity": FigureOf(
        identity,
        ("survival", "activation_matching", "scaling", "subspace"),
        "Figure 8: is it the same feature?",
    ),
    "fig9_selftest": FigureOf(selftest, ("selftest",), "Figure 9: measures held against the truth"),
}
