"""Is a concept still there, and can the dense SAE read it? The answer without a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
import torch

from prunelens.analyses.concept_fates import (
    CONCEPT_COLUMNS,
    RARITY_COLUMNS,
    concept_fates,
    probe_grades,
    rarity,
)
from prunelens.analyses.probes import COLUMNS, Halves, probes, sources
from prunelens.columns import meanings_of
from prunelens.concepts import Labels
from prunelens.sae.architectures import load_sae
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table
from prunelens.study.parents import sae_role
from prunelens.study.questions.grades import COVERAGE_TABLE
from prunelens.study.questions.paired import (
    load_common_change,
    load_documents,
    paired_activations,
)
from prunelens.study.work import Work, read_json

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

CONCEPTS, PASSES = 64, 100  # about as many as there are, and passes of a fit over its tokens


def _probes(work: Work) -> None:
    both = paired_activations(work)
    kept, documents = load_documents(work)
    labels = Labels.load(work.parents["labels"]).at(kept.numpy())
    groups = torch.zeros(len(kept), dtype=torch.long)
    groups[both.second] = both.groups
    first, second = (rows[labels.known[rows]] for rows in (both.first.numpy(), both.second.numpy()))
    halves = Halves(first, second, documents.numpy(), groups.numpy())
    found = probes(
        sources(both.dense, both.pruned, load_common_change(work), torch.arange(len(kept))),
        {s.init_seed: load_sae(f).to(work.device) for s, f in work.saes("sae").items()},
        labels,
        halves,
        most=work.config["tokens"],
        progress=work.progress,
    )
    fates = concept_fates(found.readings)
    found.readings[[*meanings_of(COLUMNS)]].to_parquet(work.out / "readings.parquet")
    found.best.to_parquet(work.out / "latents.parquet")
    fates.to_parquet(work.out / "concepts.parquet")
    rarity(fates, found.readings).to_parquet(work.out / "rarity.parquet")


def _grades(work: Work) -> None:
    """What is said of concepts whose fate is known."""
    fates = pd.read_parquet(work.parents["world"] / "truth.parquet")["fate"]
    choice = read_json(work.parents["world"] / "choice.json")
    concepts = pd.read_parquet(work.parents["probes"] / "concepts.parquet")
    truth = concepts["concept"].map(lambda name: fates[int(name.split()[-1])])
    rare = pd.read_parquet(work.parents["probes"] / "rarity.parquet")
    grades = probe_grades(concepts.assign(fate=truth), rare, choice)
    grades.to_parquet(work.out / "coverage.parquet")


def _cost(costed: Costed) -> Cost:
    """Every source by the SAE, and fits to some thousand tokens."""
    encodings = 4 * costed.eval_tokens * len(costed.saes("sae"))
    fits = CONCEPTS * PASSES * 4 * 2 * costed.config["tokens"] * 4.0 * costed.shape.d_model
    return Cost(costed.encoding(encodings) + fits)


def _by_latent(table: pd.DataFrame, seed: int, _seeds: object) -> pd.DataFrame:
    """The concept that a latent tells best, of those whose best five it is among."""
    own = table[table["seed"] == seed].sort_values("apart", ascending=False)
    return own.drop_duplicates("latent").set_index("latent")[["concept"]].sort_index()


def _plan(run: LayerPlan) -> Mapping[str, Stage]:
    labels = run.model.labels()
    if labels is None:
        return {}
    first = run.dense.seeds()[0]  # one SAE is asked, as for the text on which latents fire
    parents = {
        **run.both_activations(),
        "common_change": run.answer("common_change"),
        "labels": labels,
        sae_role("sae", first, plain=True): run.dense.saes[first],
    }
    return {"probes": run.stage("probes", {"tokens": run.study.probes.tokens}, parents)}


def _plan_grades(run: LayerPlan) -> Mapping[str, Stage]:
    """Where somebody knows the truth."""
    if not run.model.config.is_planted or "probes" not in run.answers:
        return {}
    parents = {"world": run.prune, "probes": run.answers["probes"]}
    return {"probe_grades": run.stage("probe_grades", {}, parents)}


PROBES = Question(
    "probes",
    1,
    _probes,
    cost=_cost,
    work_kind="SAE encoding",
    asked=("probes",),
    of="pruned",
    tables=(
        Table(
            "concepts",
            "pruned run, concept, source",
            "is a concept kept, moved or gone, and can the dense SAE read it",
            "concepts.parquet",
            CONCEPT_COLUMNS,
        ),
        Table(
            "concept_rarity",
            "pruned run, source",
            "do rare concepts fare worse (claim 1, asked without an SAE)",
            "rarity.parquet",
            RARITY_COLUMNS,
        ),
        Table(
            "probes",
            "pruned run, concept, reader, seed, source, fit",
            "how well probes and latents read each concept",
            "readings.parquet",
            COLUMNS,
        ),
    ),
    by_latent=_by_latent,
    latents="""
    concept: What the dense latent tells best, of the concepts whose five best it is among; of the
        first seed.""",
    plan=_plan,
)
PROBE_GRADES = Question(
    "probe_grades",
    1,
    _grades,
    of="pruned",
    tables=(COVERAGE_TABLE,),
    plan=_plan_grades,
)
