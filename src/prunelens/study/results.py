"""Artifacts of a study -> its results as tables, each row with the run that it belongs to.

What is missing (a run that failed, a question that is not asked) has no rows, and a table without
any is not there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from prunelens.analyses.claims import COLUMNS as CLAIM_COLUMNS
from prunelens.analyses.claims import judge_claims
from prunelens.analyses.fragility import holm
from prunelens.columns import meanings_of
from prunelens.config import CheckpointConfig
from prunelens.prune.stored import FACTS
from prunelens.study.artifacts.store import Store
from prunelens.study.conclude import predictor_stage
from prunelens.study.kind import Table
from prunelens.study.matrix import Plan, Run
from prunelens.study.parents import Sae
from prunelens.study.questions import QUESTIONS
from prunelens.study.questions.predictor import PREDICTOR
from prunelens.study.work import read_json

ALL_RUNS = "all"  # the run of rows that are about the whole study
_Rows = Iterator[tuple[Run, pd.DataFrame]]


def study_results(plan: Plan, store: Store) -> dict[str, pd.DataFrame]:
    """Every table of the output contract by name (docs/tables.md), and `perplexity_windows`.

    Raises: UserError where an artifact is damaged.
    """
    tables = {}
    for name, rows in _builders().items():
        parts = [with_run(run, part, store) for run, part in rows(plan, store) if len(part)]
        if parts:
            tables[name] = pd.concat(parts, ignore_index=True)
    if "fragility_tests" in tables:
        tables["fragility_tests"] = holm(tables["fragility_tests"])
    tables |= _predictor(plan, store)
    if tables:
        claims = judge_claims(tables)
        claims.insert(0, "run", ALL_RUNS)
        tables["claims"] = claims
    return tables


def method_columns(run: Run) -> dict[str, Any]:
    """method, scope, pattern, sparsity as tables name them."""
    if (pruning := run.pruning) is None:
        return {"method": "dense", "scope": "", "pattern": "", "sparsity": 0.0}
    own = {name: getattr(pruning, name) for name in ("scope", "pattern", "sparsity")}
    return {"method": pruning.criterion, **own}


def with_run(run: Run, table: pd.DataFrame, store: Store | None = None) -> pd.DataFrame:
    """The table with the columns that say which run its rows belong to."""
    names = {"run": run.name, "model": run.model, "layer": run.layer, **method_columns(run)}
    if store is not None:
        names["sparsity"] = sparsity_of(run, store)
    return pd.concat([pd.DataFrame([names] * len(table), index=table.index), table], axis=1)


def sparsity_of(run: Run, store: Store) -> float:
    """The sparsity that was asked for; of a checkpoint of others the one that it was found to have.

    Raises: UserError where the artifact that says so is damaged.
    """
    if not isinstance(run.pruning, CheckpointConfig):
        return run.pruning.sparsity if run.pruning else 0.0
    folder = store.found(run.stages["prune"])
    if folder is None:
        return run.pruning.sparsity
    return float(read_json(folder / FACTS)["achieved_sparsity"])


def _perplexity(plan: Plan, store: Store) -> _Rows:
    text = plan.study.perplexity.corpus
    name = f"{plan.study.corpus.source} eval" if text is None else text.dataset or text.source
    for run, folder in _folders(plan, store, "perplexity"):
        achieved = 0.0
        if run.pruning:
            achieved = read_json(store.read(run.stages["prune"]) / FACTS)["achieved_sparsity"]
        rows = pd.read_parquet(folder / "perplexity.parquet")
        yield run, rows.assign(corpus=name, achieved_sparsity=achieved)


def _sae_quality(plan: Plan, store: Store) -> _Rows:
    for run, sae, folder in _sae_folders(plan, store):
        if sae.is_plain:
            numbers = read_json(folder / "quality.json")
            numbers |= {"seed": sae.init_seed, "steps": plan.study.sae.steps}
            if statistics := store.found(run.stages["statistics"]):
                spread = read_json(statistics / "variance.json")
                numbers["participation_ratio"] = spread["participation_ratio"]
            yield run, pd.DataFrame([numbers])


def _sae_training(plan: Plan, store: Store) -> _Rows:
    for run, sae, folder in _sae_folders(plan, store):
        which: dict[str, Any] = {
            "init_seed": sae.init_seed,
            "data_seed": sae.data_seed,
            "rotated": sae.rotated,
            "training": sae.training,
            "folder": f"artifacts/{folder.relative_to(store.root).as_posix()}",
            "steps": run.saes[sae].config["steps"],
        }
        yield run, pd.DataFrame([{**read_json(folder / "quality.json"), **which}])


def _transfer(plan: Plan, store: Store) -> _Rows:
    """Our own SAEs, then those of others; a row that says so where there are none of those."""
    for run in plan.runs:
        stages = [stage for stage in run.stages.values() if stage.name == "transfer"]
        measured = [(stage, folder) for stage in stages if (folder := store.found(stage))]
        for stage, folder in measured:
            table = pd.read_parquet(folder / "transfer.parquet")
            given = stage.source.pretrained if stage.source else None
            yield run, table.assign(sae=given.label) if given else table
        if measured and len(stages) == 1:
            reason = "no pretrained SAE is named for this model and layer (models.pretrained)"
            yield run, pd.DataFrame([{"sae": "pretrained", "reason": reason}])


def _from_artifacts(table: str) -> Callable[[Plan, Store], _Rows]:
    """The rows of every question that has some for a table."""

    def rows(plan: Plan, store: Store) -> _Rows:
        for role, each in _asked():
            if each.name == table:
                yield from _from_artifact(plan, store, role, each.file)

    return rows


def _from_artifact(plan: Plan, store: Store, role: str, file: str) -> _Rows:
    for run, folder in _folders(plan, store, role):
        if (folder / file).is_file():  # not every run of a stage has every part
            yield run, pd.read_parquet(folder / file)


def _asked() -> Iterator[tuple[str, Table]]:
    """Every table of a question, and who has rows of it."""
    return ((question.name, table) for question in QUESTIONS for table in question.tables)


def _latents(plan: Plan, store: Store) -> _Rows:
    """One row per run, seed and latent.

    Firing rate, mean activation and init retention are those of the run's own SAE; matches,
    scaling, subspace and persistence say what became of the *dense* SAE's latent of that seed and
    index.
    """
    for run, sae, folder in _sae_folders(plan, store):
        if not sae.is_plain:
            continue
        seed, seeds = sae.init_seed, plan.study.seeds_of(run.pruning)
        parts = [pd.read_parquet(folder / "latents.parquet").set_index("latent")]
        for question in QUESTIONS:
            if question.by_latent and (answer := store.found(run.stages.get(question.name))):
                latents = pd.read_parquet(answer / "latents.parquet")
                parts.append(question.by_latent(latents, seed, seeds))
        table = pd.concat(parts, axis=1)
        table.insert(0, "seed", seed)
        yield run, table.reset_index(names="latent")


def _predictor(plan: Plan, store: Store) -> dict[str, pd.DataFrame]:
    """The predictor's tables; they are about the whole study."""
    folder = store.found(predictor_stage(plan, store))
    if folder is None:
        return {}
    tables = {}
    for table in PREDICTOR.tables:
        tables[table.name] = pd.read_parquet(folder / table.file)
        tables[table.name].insert(0, "run", ALL_RUNS)
    return tables


def _builders() -> dict[str, Callable[[Plan, Store], _Rows]]:
    return {
        "perplexity": _perplexity,
        "perplexity_windows": lambda plan, store: _from_artifact(
            plan, store, "perplexity", "windows.parquet"
        ),
        "sae_quality": _sae_quality,
        "sae_training": _sae_training,
        "latents": _latents,
        **{table.name: _from_artifacts(table.name) for _, table in _asked()},
        "transfer": _transfer,
    }


LATENT_COLUMNS = """
run model layer method scope pattern sparsity
latent: Index of the latent.
seed
firing_rate: Share of the eval tokens on which the latent fires.
firing_rate_first_half: `firing_rate` on the first half of the eval documents.
mean_activation: Mean activation over the tokens on which the latent fires.
init_retention: Cosine of the latent's direction to the random one that it started from: near 1
    training has hardly moved it, and any two SAEs that share the start will agree on it.
resampled: Whether training has started the latent anew.
"""
_OWN = (  # of more than one kind of artifact, or of none
    Table(
        "perplexity",
        "run, window length",
        "how much the model itself suffered",
        "",
        """
        model
        corpus: Text that is predicted: a data set, or the eval part of the study's.
        method scope pattern sparsity
        achieved_sparsity: Share of the prunable weights that the masks zero.
        context_tokens: Length of the windows, which do not overlap.
        bos: Whether every window opens with the BOS, which is context and never predicted.
        num_tokens: Tokens that are predicted.
        nll: Mean negative log likelihood of a predicted token, in nats.
        perplexity: exp of `nll`.""",
        leading=("run",),
    ),
    Table(
        "sae_quality",
        "run, seed",
        "how well each SAE describes its activations",
        "",
        """
        seed fvu fvu_raw fvu_dense_var l0
        alive: Latents that fire at least once.
        num_latents: Latents of the SAE.
        steps
        participation_ratio: How many directions share the activations' variance, 1 to d_model.""",
    ),
    Table(
        "sae_training",
        "run, SAE (controls too)",
        "how each SAE was trained, and where it is",
        "",
        """
        init_seed: Seed of the start.
        data_seed: Seed of the data order.
        rotated: Whether it is the SAE of the `floor_*` arms.
        steps mean_init_retention fvu
        folder: Where the SAE is, for `prunelens match`.
        training: `own`, from a random start; `warm`, begun from the dense SAE; `doubled`, twice as
            long.
        fvu_raw: As in `sae_quality.csv`; empty for rotated SAEs.""",
    ),
    Table(
        "claims",
        "claim of the paper",
        "what holds here, by the paper's protocol and by the controlled one",
        "",
        CLAIM_COLUMNS,
        leading=("run",),
    ),
)


def study_tables() -> dict[str, Table]:
    """Every table of the output contract (docs/tables.md), by name."""
    asked = (table for kind in (*QUESTIONS, PREDICTOR) for table in kind.tables)
    return {table.name: table for table in (*_OWN, *asked)}


def table_columns() -> dict[str, list[str]]:
    """The columns of each, by name."""
    return {name: list(meanings) for name, meanings in column_meanings().items()}


def column_meanings() -> dict[str, dict[str, str]]:
    """What every column of the output contract means: table -> column -> a sentence."""
    return {name: table.meanings for name, table in study_tables().items()}


def latent_meanings() -> dict[str, str]:
    """What the columns of `latents.parquet` mean; those of arms end in `_<arm>`."""
    found = meanings_of(LATENT_COLUMNS)
    for question in QUESTIONS:
        found |= question.latent_meanings
    return found


def _folders(plan: Plan, store: Store, role: str) -> Iterator[tuple[Run, pathlib.Path]]:
    for run in plan.runs:
        if folder := store.found(run.stages.get(role)):
            yield run, folder


def _sae_folders(plan: Plan, store: Store) -> Iterator[tuple[Run, Sae, pathlib.Path]]:
    for run in plan.runs:
        for sae, stage in run.saes.items():
            if folder := store.found(stage):
                yield run, sae, folder
