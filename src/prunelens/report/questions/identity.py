"""Other measures of identity on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.report.by_run import of_dense, of_run, pruned_runs
from prunelens.report.panels.identity import identity
from prunelens.report.panels.panel import Tables, at_tau
from prunelens.report.questions.section import FigureOf, Section


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    return {"identity by run": _identity(tables), "warm start by run": _warm_start(tables)}


def _identity(tables: Tables) -> pd.DataFrame:
    """The other measures of identity, each beside what no pruning and no feature would give."""
    asked = ("activation_matching", "scaling", "subspace")
    rates, scaling, spans = (tables.get(name, pd.DataFrame()) for name in asked)
    made = pruned_runs([rates, scaling, spans])
    if not len(made):
        return made
    rates = at_tau(rates)
    for arm in ("shared_init", "cross_init"):
        for source, name in (("pruned", ""), ("null", "_null")):
            made[f"activation_{arm}{name}"] = of_run(made, rates, "mnn", arm=arm, source=source)
    for arm in ("ceiling_cross", "chance"):
        made[f"activation_{arm}"] = of_dense(made, rates, "mnn", arm)
    names = {"pruned": "", "null": "_null", "noise_isotropic": "_noise", "unpaired": "_unpaired"}
    for source, name in names.items():
        made[f"scaling{name}"] = of_run(made, scaling, "mean_scaling", source=source)
    made["scaling_median"] = of_run(made, scaling, "median_scaling", source="pruned")
    for arm in ("shared_init", "cross_init"):
        made[f"subspace_{arm}"] = of_run(made, spans, "overlap", arm=arm)
    for arm in ("ceiling_cross", "floor_shared", "chance"):
        made[f"subspace_{arm}"] = of_dense(made, spans, "overlap", arm)
    corrected = at_tau(tables.get("survival_corrected", pd.DataFrame()))
    made["corrected_warm"] = of_run(made, corrected, "corrected", arm="warm")
    return made.drop(columns="layer")


def _warm_start(tables: Tables) -> pd.DataFrame:
    """SAEs that were trained on from the dense ones, beside fresh ones; FVU in raw space, where
    both have the same denominator."""
    rates = at_tau(tables.get("survival", pd.DataFrame()))
    rates = rates[rates["coordinates"] == "normalised"] if len(rates) else rates
    warm = rates[rates["arm"] == "warm_start"] if len(rates) else rates
    made = pruned_runs([warm])
    if not len(made):
        return made
    made["warm_start"] = of_run(made, warm, "mnn")
    for arm in ("floor_warm", "ceiling_warm"):
        made[arm] = of_dense(made, rates, "mnn", arm)
    corrected = at_tau(tables.get("survival_corrected", pd.DataFrame()))
    made["corrected_warm"] = of_run(made, corrected, "corrected", arm="warm")
    trained = tables.get("sae_training", pd.DataFrame())
    trained = trained[~trained["rotated"].astype(bool)] if len(trained) else trained
    for training, name in (("warm", "warm"), ("own", "fresh")):
        made[f"steps_{name}"] = of_run(made, trained, "steps", training=training)
        made[f"fvu_raw_{name}"] = of_run(made, trained, "fvu_raw", training=training)
    if len(corrected):
        unknown = corrected[(corrected["arm"] == "warm") & corrected["corrected"].isna()]
        made["reason"] = made["run"].map(unknown.drop_duplicates("run").set_index("run")["reason"])
    return made.drop(columns="layer")


IDENTITY = Section(
    "identity",
    "Is it the same feature? Other ways to ask",
    "A direction that is found again need not mean that the feature is, nor the reverse.",
    "Decoder directions alone: the mutual nearest neighbour at a cosine of 0.7.",
    "By activations: do two latents fire alike on the same tokens, wherever they point? A"
    " rotated feature counts as the same here; null: the pruned SAE reads noise in the place of"
    " pruning's particular doing. Latent scaling: how many times its own size is"
    " a dense direction in pruned activations, by regression on paired tokens? A multiple of"
    " the direction, not a share: a gain common to all activations raises every latent's, so"
    " read one latent's beside the null's, where that gain is all there is. 0 is expected of"
    " unpaired tokens. Subspace overlap: does the direction lie in the span"
    " of its four nearest in the pruned SAE, as that of a split feature would? Among many"
    " directions chance alone finds much of it there. Warm start: the dense SAE trained on with"
    " pruned activations, between the same on dense ones and on a rotated space.",
    figures={
        "fig8_identity": FigureOf(
            identity,
            ("survival", "activation_matching", "scaling", "subspace"),
            "Figure 8: is it the same feature?",
        )
    },
    tables={
        "identity by run": "Other measures of identity: rates at tau 0.7, and means",
        "warm start by run": "SAEs trained on from the dense ones, at tau 0.7; fvu in raw space",
    },
    more={
        "activation_matching": "Matching by activations, every pair",
        "scaling": "Latent scaling of every seed",
        "subspace": "Subspace overlap of every pair",
    },
    made=_made,
)
