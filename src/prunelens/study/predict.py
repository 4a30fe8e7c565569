"""Which latents will a pruning endanger? Told before pruning, from a study's predictor."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import pandas as pd

from prunelens.analyses.predictor import predict_survival
from prunelens.errors import UserError
from prunelens.study.conclude import predictor_stage
from prunelens.study.matrix import Plan, Run, Sae
from prunelens.study.run import open_study
from prunelens.study.store import Store
from prunelens.study.work import read_json

TAU = 0.7


def predict_latents(
    out: pathlib.Path,
    *,
    sparsity: float,
    latents: Sequence[int] | None = None,
    run: str | None = None,
    seed: int | None = None,
) -> pd.DataFrame:
    """Survival probability of the latents of a study's dense SAE under a pruning.

    Args:
        out: the study's folder; its `predictor` question has been answered.
        sparsity: of the pruning that is considered, in [0, 1).
        latents: only these; None: all.
        run: the dense run, e.g. `bundled/L2/dense`; needed where the study has several.
        seed: of the dense SAE; None: the first.
    Returns: latent, firing_rate, then for survival without a shared start (`persistence` above
        0.7) and as published (`shared_init`, MNN at tau 0.7) the probability with its 95 %
        interval: persistence, persistence_low, persistence_high, shared_init, shared_init_low,
        shared_init_high; the most endangered (by persistence) first, dead latents (NaN) last.
    Raises: UserError where there is no predictor, no such run, seed or latent, or the sparsity is
        out of range.
    """
    plan, store = open_study(out)
    chosen = _dense_run(plan, run)
    seeds = plan.study.sae.seeds
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed: {seed} is none of the study's sae.seeds {list(seeds)}")
    table = _latents(store, chosen, seeds[0] if seed is None else seed)
    for target, tau in (("persistence", None), ("shared_init", TAU)):
        found = predict_survival(
            _model(plan, store, target, tau), table["firing_rate"].to_numpy(), sparsity
        )
        table[target] = found["probability"].to_numpy()
        table[f"{target}_low"] = found["low"].to_numpy()
        table[f"{target}_high"] = found["high"].to_numpy()
    table = table.sort_values(["persistence", "latent"], na_position="last", ignore_index=True)
    return table if latents is None else _only(table, latents)


def _dense_run(plan: Plan, name: str | None) -> Run:
    dense = {run.name: run for run in plan.runs if run.pruning is None}
    if name is None and len(dense) == 1:
        return next(iter(dense.values()))
    if name not in dense:
        raise UserError(f"--run: {name!r} is no dense run; give one of {', '.join(dense)}")
    return dense[name]


def _latents(store: Store, run: Run, seed: int) -> pd.DataFrame:
    stage = run.saes[Sae(seed, seed)]
    if not store.has(stage):
        raise UserError(f"STUDY: the dense SAE of {run.name} is not there; run the study first")
    return pd.read_parquet(store.read(stage) / "latents.parquet")[["latent", "firing_rate"]]


def _model(plan: Plan, store: Store, target: str, tau: float | None) -> dict:
    stage = predictor_stage(plan, store)
    if stage is None or not store.has(stage):
        raise UserError(
            "STUDY: it has no predictor; run it with the question 'predictor' and some prunings"
        )
    for model in read_json(store.read(stage) / "models.json"):
        if model["target"] == target and model["tau"] == tau:
            return model
    raise UserError(f"taus: the study has no predictor at tau {tau}; add it to the study's taus")


def _only(table: pd.DataFrame, latents: Sequence[int]) -> pd.DataFrame:
    unknown = sorted(set(latents) - set(table["latent"]))
    if unknown:
        raise UserError(
            f"--latents: {unknown[0]} is no latent of this SAE, which has {len(table)}, counted"
            " from 0"
        )
    return table[table["latent"].isin(latents)].reset_index(drop=True)
