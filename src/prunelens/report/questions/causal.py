"""RQ5 on the page."""

from __future__ import annotations

from prunelens.report.panels.causal import causal
from prunelens.report.questions.section import FigureOf, Section

CAUSAL = Section(
    "causal",
    "RQ5: does the model rely on what survives?",
    "One latent at a time is taken out; how far does the model's output move?",
    "The latent is zeroed in the SAE's reconstruction and the output compared with the"
    " original's. The shaded part is the SAE's own error, which is there without ablation.",
    "Isolated: the reconstruction with against without the latent. Error-preserving: the latent"
    " is subtracted from the model's own activation. Both are read where the latent fires,"
    " beside robust latents of the same firing rate, random latents and random directions. The"
    " latents of a group are a sample, as the documents are: intervals resample both, over all"
    " seeds, and are left out where a group has too few of either. A group whose largest latent"
    " holds more than a third of its mean says so.",
    figures={"fig6_causal": FigureOf(causal, ("causal",), "Figure 6: effect of ablations")},
    tables={"table4_causal": "Table 4: mean KL (nats) when one latent is ablated"},
    more={"causal": "Every group and protocol"},
    assumed={
        "table4_causal": (
            "The paper does not say which prompts it took, nor whether latents could"
            " be dead: here windows of the eval documents, and alive latents only."
        )
    },
    needs=("causal",),
)
