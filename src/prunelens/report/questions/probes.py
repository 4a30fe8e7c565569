"""Concept probes on the page."""

from __future__ import annotations

import numpy as np
import pandas as pd

from prunelens.analyses.concept_fates import GONE, KEPT, READS
from prunelens.report.by_run import KEYS
from prunelens.report.panels.panel import Panel, Site, Tables, conditions, points_of, rows_of
from prunelens.report.questions.section import FigureOf, Section

VERDICTS = ("kept", "moved", "blurred", "gone", "undecided")
SAE = ("reads", "partly", "cannot")


def _panels(tables: Tables, site: Site) -> list[Panel]:
    """What is left of each concept, by how frequent it is; and how well the dense SAE reads it."""
    rows = rows_of(tables, "concepts", site, source="pruned")
    rows = rows[rows["auc_dense"] >= READS]
    rows = rows.assign(place=np.log10(rows["frequency"].astype(float)))
    left, style = [], {"line": "none"}
    for name, colour, marker, part in conditions(rows):
        shown = {"colour": colour, "marker": marker, **style}
        left.append(points_of(part, name, "place", "left", **shown))
        refitted = f"{name}, probe refitted"
        left.append(points_of(part, refitted, "place", "left_refit", hollow=True, **shown))
    first = rows.drop_duplicates("concept")  # the dense SAE is the same for all conditions
    columns = ("place", "sae_reads", "sae_reads_low", "sae_reads_high")
    read = [points_of(first, "five best latents", *columns, **style)]
    names = ("concept frequency (log10 of the share of tokens)", "share of the dense AUC above 0.5")
    return [
        Panel("controlled", "What pruning leaves of a concept", *names, left),
        Panel(
            "check",
            "What the dense SAE reads of it before pruning",
            names[0],
            "share of the probe's AUC above 0.5",
            read,
        ),
    ]


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    """Per run and source how many concepts get each verdict."""
    concepts = tables.get("concepts", pd.DataFrame())
    if not len(concepts):
        return {}
    by = [*KEYS, "source"]
    counted = concepts.groupby(by, sort=False)
    made = counted["verdict"].value_counts().unstack(fill_value=0)
    made = made.reindex(columns=VERDICTS, fill_value=0)
    sae = counted["sae"].value_counts().unstack(fill_value=0).reindex(columns=SAE, fill_value=0)
    made = made.join(sae.add_prefix("SAE "))
    harmed = concepts[concepts["beyond_noise_high"] < 0].groupby(by, sort=False).size()
    made["harmed beyond noise"] = harmed.reindex(made.index).fillna(0).astype(int)
    made = made.reset_index()
    rare = tables.get("concept_rarity", pd.DataFrame())
    if len(rare):
        names = {"rho": "rho with frequency", "low": "rho_low", "high": "rho_high"}
        columns = rare[["run", "source", *names]].rename(columns=names)
        made = made.merge(columns, on=["run", "source"], how="left")
    return {"concepts by run": made}


PROBES = Section(
    "probes",
    "Are concepts still there? Probes without a dictionary",
    "A latent may be lost because the model no longer represents what it stood for, or because the"
    " SAE no longer reads it. A probe of the activations tells the two apart.",
    "Not asked: every answer of the paper is about the latents of an SAE.",
    "Labels say which tokens have a concept. A logistic probe is fitted on dense activations and"
    " read on pruned ones (left), and fitted again there (left_refit), on other documents than it"
    f" is measured on. kept: the dense probe keeps at least {KEPT:.0%} of its AUC above one half;"
    f" moved: only the refitted one does; gone: the refitted one keeps less than {GONE:.0%};"
    " blurred: something between; undecided: the interval over documents says none of these."
    " beyond_noise: what the dense probe loses beyond what noise of equal size takes. SAE: how much"
    " of what the probe reads on dense activations the five best latents read. What the probe reads"
    " and they do not, this SAE cannot show, pruned or not. rho: rank correlation of a concept's"
    " frequency with beyond_noise, above 0 where the rare ones are harmed more. Of the null, noise"
    " in the place of pruning's doing, nothing may be said.",
    figures={"fig10_probes": FigureOf(_panels, ("concepts",), "Figure 10: concepts, by probes")},
    tables={"concepts by run": "Verdicts on concepts, counted"},
    more={
        "concepts": "Every concept",
        "concept_rarity": "Do rare concepts fare worse?",
        "probes": "Every probe, and the best latents of the first dense SAE",
    },
    needs=("concepts",),
    made=_made,
)
