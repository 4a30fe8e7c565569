"""RQ3 on the page."""

from __future__ import annotations

from prunelens.analyses.transfer import TRANSFER_RULE
from prunelens.report.panels.transfer import transfer
from prunelens.report.questions.section import FigureOf, Section

TRANSFER = Section(
    "transfer",
    "RQ3: can SAEs of the dense model still be used?",
    "An SAE that was trained on the dense model reads activations of the pruned one.",
    "FVU over all positions. One position with a huge norm can decide it, and a variance that"
    " shrinks or grows moves it. The paper's numbers are of the official SAEs.",
    "Filtered, that is without the first position and unusual norms: how many times the dense"
    " model's the error is, over the dense variance and over the pruned model's own, and how"
    " much less of the cross-entropy the model recovers from the reconstruction; each with its"
    f" interval, on the same tokens of both models. The verdict: {TRANSFER_RULE}. Beside it"
    " what noise of equal size does; where that gets the same verdict, because says so.",
    figures={
        "fig3_transfer": FigureOf(transfer, ("transfer",), "Figure 3: SAEs of the dense model")
    },
    tables={"table2_transfer": "Table 2: SAEs of the dense model"},
    more={"transfer": "Every SAE, set of positions and refit"},
    assumed={
        "table2_transfer": (
            "The paper does not say in which space its FVU is. Official SAEs read raw"
            " activations, so its numbers are set beside fvu_raw; fvu divides errors and variance"
            " by the dense deviations."
        )
    },
    needs=("transfer",),
)
