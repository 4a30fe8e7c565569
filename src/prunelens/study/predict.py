"""Which latents will a pruning endanger? Told before pruning, from a study's predictor."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from prunelens.analyses.predictor import predict_survival
from prunelens.errors import UserError
from prunelens.match import TAU
from prunelens.study.artifacts.store import Store
from prunelens.study.conclude import predictor_stage
from prunelens.study.folder import open_study
from prunelens.study.matrix import Plan, Run
from prunelens.study.parents import Sae
from prunelens.study.work import read_json

log = logging.getLogger(__name__)

TARGETS = {"persistence": "firing_rate_first_half", "shared_init": "firing_rate"}  # and its rate


def predict_latents(
    out: pathlib.Path,
    *,
    sparsity: float,
    latents: Sequence[int] | None = None,
    run: str | None = None,
    seed: int | None = None,
    artifacts: str | None = None,
) -> pd.DataFrame:
    """Survival probability of the latents of a study's dense SAE under a pruning.

    Args:
        out: the study's folder; its `predictor` question has been answered.
        sparsity: of the pruning that is considered, in [0, 1).
        latents: only these; None: all.
        run: the dense run, e.g. `bundled/L2/dense`; needed where the study has several.
        seed: of the dense SAE; None: the first.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
    Returns: latent, firing_rate, then for survival without a shared start (`persistence` above
        0.7) and as published (`shared_init`, MNN at tau 0.7) the probability with its 95 %
        interval: persistence, persistence_low, persistence_high, shared_init, shared_init_low,
        shared_init_high; the most endangered (by persistence) first, dead latents (NaN) last.
    Raises: UserError where there is no predictor, no such run, seed or latent, or the sparsity is
        out of range.
    """
    plan, store = open_study(out, artifacts)
    chosen = _dense_run(plan, run)
    seeds = plan.study.sae.seeds
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed: {seed} is none of the study's sae.seeds {list(seeds)}")
    table = _latents(store, chosen, seeds[0] if seed is None else seed)
    models = _models(plan, store)
    for target, rate in TARGETS.items():
        found = _predicted(models[target], table[rate].to_numpy(), sparsity)
        table[[target, f"{target}_low", f"{target}_high"]] = found
    table = table.drop(columns="firing_rate_first_half")
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
    folder = store.needed(run.saes[Sae(seed, seed)], f"the dense SAE of {run.name}")
    columns = ["latent", "firing_rate", "firing_rate_first_half"]
    return pd.read_parquet(folder / "latents.parquet")[columns]


def _models(plan: Plan, store: Store) -> dict[str, dict]:
    """The study's fits by target; at least one of them is usable."""
    folder = store.found(predictor_stage(plan, store))
    if folder is None:
        raise UserError(
            "STUDY: it has no predictor; run it with the question 'predictor' and some prunings"
        )
    fits = read_json(folder / "models.json")
    found = {fit["target"]: fit for fit in fits if fit["tau"] in (None, TAU)}
    if "shared_init" not in found:
        raise UserError(
            f"taus: the study has no predictor at tau {TAU}; add it to the study's taus"
        )
    reasons = [found[target]["reason"] for target in TARGETS]
    if all(found[target]["coefficients"] is None for target in TARGETS):
        raise UserError(f"STUDY: its predictor could not be fitted ({reasons[0]}); prune more")
    return found


def _predicted(model: dict, rates: np.ndarray, sparsity: float) -> np.ndarray:
    """[latents, 3]: probability, low, high; NaN where the target has no fit."""
    if model["coefficients"] is None:
        log.warning("%s could not be fitted: %s", model["target"], model["reason"])
        return np.full((len(rates), 3), np.nan)
    low, high = model["sparsities"]
    if not low <= sparsity <= high:
        log.warning(
            "%s: the study pruned to between %g and %g; %g is an extrapolation",
            *(model["target"], low, high, sparsity),
        )
    found = predict_survival(model, rates, sparsity)
    return found[["probability", "low", "high"]].to_numpy()


def _only(table: pd.DataFrame, latents: Sequence[int]) -> pd.DataFrame:
    unknown = sorted(set(latents) - set(table["latent"]))
    if unknown:
        raise UserError(
            f"--latents: {unknown[0]} is no latent of this SAE, which has {len(table)}, counted"
            " from 0"
        )
    return table[table["latent"].isin(latents)].reset_index(drop=True)
