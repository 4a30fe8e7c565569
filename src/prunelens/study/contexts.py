"""Where latents fire, with the text, from a finished study."""

from __future__ import annotations

import pathlib

import pandas as pd
from safetensors.torch import load_file

from prunelens.errors import UserError
from prunelens.study.artifacts.store import Store
from prunelens.study.folder import open_study
from prunelens.study.matrix import Plan, Run


def study_contexts(
    out: pathlib.Path,
    *,
    run: str | None = None,
    under: str | None = None,
    artifacts: str | None = None,
) -> pd.DataFrame:
    """The contexts of the latents of one run's SAE (of the first seed).

    Args:
        out: the study's folder; its question `evidence` has been answered.
        run: a run's name; None: the first dense run.
        under: a pruned run of that model and layer, for a dense `run`: the same latents on the same
            tokens there.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
    Returns: one row per context: latent, kind (`top`: its strongest activations, each from another
        window; `sample`: one firing of each interval of its range), rank, low, high (of a sample's
        interval), window, position, activation, tokens (the text of each token around it),
        activations (of the latent at each of them; NaN where a token was not read); with `under`
        also activations_under. A latent that never fires has no rows.
    Raises: UserError where there is no such run or no evidence of it.
    """
    plan, store = open_study(out, artifacts)
    chosen = _run(plan, run)
    folder = _evidence(store, chosen)
    if not (folder / "contexts.parquet").is_file():
        raise UserError(f"run: {chosen.name} has no SAE of the study's first seed; name another")
    table = pd.read_parquet(folder / "contexts.parquet")
    texts = pd.read_parquet(folder / "tokens.parquet").set_index("token_id")["text"]
    # The dense run's evidence holds the text of all conditions.
    dense = next(run for run in plan.runs if _same_site(run, chosen) and not run.pruning)
    ids = load_file(_evidence(store, dense) / "text.safetensors")["ids"].numpy()
    table["tokens"] = _tokens(table, ids, texts.to_dict())
    if under is not None:
        table["activations_under"] = _under(plan, store, chosen, under)
    return table


def _run(plan: Plan, name: str | None) -> Run:
    runs = {run.name: run for run in plan.runs}
    if name is None:
        return plan.runs[0]
    if name not in runs:
        raise UserError(f"run: {name!r} is none of the study's ({', '.join(runs)})")
    return runs[name]


def _evidence(store: Store, run: Run) -> pathlib.Path:
    stage = run.stages.get("evidence")
    if stage is None:
        raise UserError("STUDY: its questions lack 'evidence'; add it and run the study again")
    return store.needed(stage, f"the evidence of {run.name}")


def _same_site(a: Run, b: Run) -> bool:
    return (a.model, a.layer) == (b.model, b.layer)


def _tokens(table: pd.DataFrame, ids: object, texts: dict[int, str]) -> list[list[str]]:
    """The text of each token of each context; empty before and behind the window."""
    found = []
    for window, position, activations in zip(
        table["window"], table["position"], table["activations"], strict=True
    ):
        row, side = ids[window], len(activations) // 2  # type: ignore[index]
        span = range(position - side, position + side + 1)
        found.append([texts[int(row[i])] if 0 <= i < len(row) else "" for i in span])
    return found


def _under(plan: Plan, store: Store, dense: Run, name: str) -> list[object]:
    pruned = _run(plan, name)
    if dense.pruning or not pruned.pruning or not _same_site(dense, pruned):
        raise UserError(
            f"under: {name!r} is no pruned run of the model and layer of {dense.name}, or that run"
            " is not the dense one; give a dense `run` and a pruned `under`"
        )
    return list(
        load_file(_evidence(store, pruned) / "under_pruning.safetensors")["activations"].numpy()
    )
