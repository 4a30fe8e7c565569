"""RQ4 on the page."""

from __future__ import annotations

from prunelens.report.panels.fragility import fragility, fragility_by_method
from prunelens.report.questions.section import FigureOf, Section

FRAGILITY = Section(
    "fragility",
    "RQ4: are rare latents harmed less than frequent ones?",
    "The living latents of the dense SAE are sorted by firing rate into five groups.",
    "Survival by group, with a shared start. Rare latents are trained least and stay nearest to"
    " their start, which this measure counts as survival.",
    "Persistence by group, and its mean as a share of what noise of equal size leaves: noise"
    " alone lowers the correlation of a rare latent more than that of a frequent one. Dotted,"
    " the same on the null, where firing rate changes nothing: what is seen there too says"
    " nothing of pruning. Rank correlations over single latents with intervals, also given each"
    " latent's distance from its start.",
    figures={
        "fig4_fragility": FigureOf(fragility, ("fragility",), "Figure 4: survival by firing rate"),
        "fig5_fragility_by_method": FigureOf(
            fragility_by_method, ("fragility", "fragility_tests"), "Figure 5: the same by method"
        ),
    },
    tables={
        "table3_fragility": "Table 3: survival of the rarest and the most frequent fifth, tau 0.7"
    },
    more={
        "fragility_contrasts": "Groups of latents and their differences, with intervals",
        "fragility_tests": "Rank correlations of firing rate and fate",
        "fragility": "Survival by fifth",
    },
    assumed={
        "table3_fragility": (
            "By the first seed, as the paper compares conditions by its seed 0; mean_*"
            " and all that follows: over seeds. Alive is read as firing at least once on the"
            " eval tokens."
        )
    },
    needs=("fragility",),
)
