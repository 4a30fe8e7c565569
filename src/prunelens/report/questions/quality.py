"""The quality of SAEs, on the page."""

from __future__ import annotations

from prunelens.report.questions.section import Section

QUALITY = Section(
    "quality",
    "Quality of the SAEs",
    "Means over seeds. fvu_dense_var divides by the variance of the dense activations, which"
    " pruning cannot change.",
    "",
    "",
    tables={"tableB1_quality": "Table B.1: reconstruction"},
    more={
        "sae_training": "Every SAE",
        "sinks": "Tokens left out for their dense norm, and sinks of one condition alone",
    },
    assumed={
        "tableB1_quality": (
            "fvu is in the normalised space that the SAEs are trained in, fvu_raw in"
            " that of the activations; the paper does not say which it prints. Optimiser, unit norm"
            " of decoder rows and the way dead latents restart are assumed too."
        )
    },
    needs=("sae_quality",),
)
