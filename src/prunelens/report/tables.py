"""Artifacts of a study -> the CSV tables and `latents.parquet` (the output contract).

Columns are stable; docs/tables.md says what each means.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from prunelens.study.matrix import Plan, Run, Sae
from prunelens.study.run import method_columns
from prunelens.study.store import Store

_CONDITION = ["run", "model", "layer", "method", "sparsity"]
COLUMNS = {
    "perplexity": [
        "run", "model", "corpus", "method", "scope", "pattern", "sparsity", "achieved_sparsity",
        "context_tokens", "bos", "num_tokens", "nll", "perplexity",
    ],
    "sae_quality": [
        *_CONDITION, "seed", "fvu", "fvu_raw", "fvu_dense_var", "l0", "alive", "num_latents",
        "steps",
    ],
    "sae_training": [
        *_CONDITION, "init_seed", "data_seed", "rotated", "steps", "mean_init_retention",
        "fvu_at_three_quarters", "fvu", "folder",
    ],
    "stability": [*_CONDITION, "seed_a", "seed_b", "tau", "one_way", "mnn", "greedy"],
    "survival": [
        *_CONDITION, "arm", "coordinates", "init_a", "order_a", "init_b", "order_b", "tau",
        "one_way", "mnn", "greedy", "one_way_reverse",
    ],
    "survival_corrected": [
        *_CONDITION, "arm", "tau", "corrected", "low", "high", "interval", "reason",
    ],
    "persistence": [
        *_CONDITION, "seed", "source", "mean_correlation", "mean_jaccard", "share_above_0.7",
        "num_silenced", "num_undefined", "excess_z",
    ],
}  # fmt: skip


def write_tables(plan: Plan, store: Store, out: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Write `tables/*.csv` and `latents.parquet`; returns the tables by name.

    Runs that failed are missing in the tables that they did not reach. A table of a question that
    the study does not ask is not written, and one from an earlier run is removed.
    Raises: UserError where an artifact is damaged.
    """
    (out / "tables").mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, rows in _BUILDERS.items():
        parts = [_with_run(run, part) for run, part in rows(plan, store)]
        if parts:
            table = pd.concat(parts, ignore_index=True)[COLUMNS[name]]
            _replace(out / "tables" / f"{name}.csv", table.to_csv(index=False).encode())
            tables[name] = table
        else:
            (out / "tables" / f"{name}.csv").unlink(missing_ok=True)
    latents = [_with_run(run, part) for run, part in _latents(plan, store)]
    if latents:
        temporary = out / ".latents.parquet.tmp"
        pd.concat(latents, ignore_index=True).to_parquet(temporary, index=False)
        temporary.replace(out / "latents.parquet")
    return tables


_Rows = Iterator[tuple[Run, pd.DataFrame]]


def _perplexity(plan: Plan, store: Store) -> _Rows:
    text = plan.study.perplexity.corpus
    name = f"{plan.study.corpus.source} eval" if text is None else text.dataset or text.source
    for run, folder in _folders(plan, store, "perplexity"):
        achieved = 0.0
        if run.pruning:
            masks = store.read(run.stages["prune"]) / "prune.json"
            achieved = json.loads(masks.read_text())["achieved_sparsity"]
        rows = pd.read_parquet(folder / "perplexity.parquet")
        yield run, rows.assign(corpus=name, achieved_sparsity=achieved)


def _sae_quality(plan: Plan, store: Store) -> _Rows:
    for run, sae, folder in _sae_folders(plan, store):
        if sae.init_seed == sae.data_seed and not sae.rotated:
            numbers = json.loads((folder / "quality.json").read_text())
            steps = plan.study.sae.steps
            yield run, pd.DataFrame([{**numbers, "seed": sae.init_seed, "steps": steps}])


def _sae_training(plan: Plan, store: Store) -> _Rows:
    for run, sae, folder in _sae_folders(plan, store):
        numbers = json.loads((folder / "quality.json").read_text())
        which: dict[str, Any] = {
            "init_seed": sae.init_seed,
            "data_seed": sae.data_seed,
            "rotated": sae.rotated,
        }
        which |= {"folder": folder.relative_to(store.root.parent).as_posix()}
        yield run, pd.DataFrame([{**numbers, **which, "steps": plan.study.sae.steps}])


def _from_artifact(role: str, file: str) -> Callable[[Plan, Store], _Rows]:
    def rows(plan: Plan, store: Store) -> _Rows:
        for run, folder in _folders(plan, store, role):
            yield run, pd.read_parquet(folder / file)

    return rows


def _latents(plan: Plan, store: Store) -> _Rows:
    """One row per run, seed and latent.

    Firing rate, mean activation and init retention are those of the run's own SAE; match, cosine,
    mutual and persistence say what became of the *dense* SAE's latent of that seed and index.
    """
    for run, sae, folder in _sae_folders(plan, store):
        if sae.init_seed != sae.data_seed or sae.rotated:
            continue
        table = pd.read_parquet(folder / "latents.parquet").set_index("latent")
        table.insert(0, "seed", sae.init_seed)
        for role, attach in (("survival", _attach_matches), ("persistence", _attach_persistence)):
            if role in run.stages and store.has(run.stages[role]):
                found = pd.read_parquet(store.read(run.stages[role]) / "latents.parquet")
                table = attach(table, found, sae.init_seed, plan.study.sae.seeds)
        yield run, table.reset_index()


def _attach_matches(
    table: pd.DataFrame, found: pd.DataFrame, seed: int, seeds: tuple[int, ...]
) -> pd.DataFrame:
    """Best match per arm; arms over pairs of starts are shown against the next seed in the list."""
    following = seeds[(seeds.index(seed) + 1) % len(seeds)]
    for arm, part in found[found["init_a"] == seed].groupby("arm"):
        shares_start = part["init_b"] == seed
        chosen = part[shares_start | (part["init_b"] == following)].set_index("latent")
        for column in ("match", "cosine", "mutual"):
            table[f"{column}_{arm}"] = chosen[column]
    return table


def _attach_persistence(
    table: pd.DataFrame, found: pd.DataFrame, seed: int, _seeds: tuple[int, ...]
) -> pd.DataFrame:
    for source, part in found[found["seed"] == seed].groupby("source"):
        name = "persistence" if source == "pruned" else f"persistence_{source}"
        by_latent = part.set_index("latent")
        table[name] = by_latent["correlation"]
        if source == "pruned":
            table["persistence_jaccard"] = by_latent["jaccard"]
            table["silenced"] = by_latent["silenced"]
    return table


_BUILDERS: dict[str, Callable[[Plan, Store], _Rows]] = {
    "perplexity": _perplexity,
    "sae_quality": _sae_quality,
    "sae_training": _sae_training,
    "stability": _from_artifact("stability", "stability.parquet"),
    "survival": _from_artifact("survival", "survival.parquet"),
    "survival_corrected": _from_artifact("corrected", "corrected.parquet"),
    "persistence": _from_artifact("persistence", "persistence.parquet"),
}


def _folders(plan: Plan, store: Store, role: str) -> Iterator[tuple[Run, pathlib.Path]]:
    for run in plan.runs:
        if role in run.stages and store.has(run.stages[role]):
            yield run, store.read(run.stages[role])


def _sae_folders(plan: Plan, store: Store) -> Iterator[tuple[Run, Sae, pathlib.Path]]:
    for run in plan.runs:
        for sae, stage in run.saes.items():
            if store.has(stage):
                yield run, sae, store.read(stage)


def _with_run(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    names = {"run": run.name, "model": run.model, "layer": run.layer, **method_columns(run.pruning)}
    return pd.concat([pd.DataFrame([names] * len(table), index=table.index), table], axis=1)


def _replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
