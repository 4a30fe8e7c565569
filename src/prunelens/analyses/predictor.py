"""Can a latent's survival be told before pruning, from its firing rate?

A logistic regression on log firing rate and sparsity, as in the paper; beside it, the same for a
target that no shared start inflates, evaluations on conditions and models that the fit has not
seen, and the baseline that knows only how near a latent stayed to its start.

Input: one row per pruned run, seed and alive dense latent, with columns model, condition (the run,
so model x layer x pruning: no two layers share a name), sparsity, seed, latent, firing_rate (> 0),
firing_rate_first_half (of the eval documents), init_retention, cosine_shared_init,
mutual_shared_init, persistence (NaN = undefined). A cluster is a condition; conditions of one model
share their dense latents, which no interval accounts for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from prunelens.analyses.statistics import (
    LogisticFit,
    clustered_auc,
    clustered_covariance,
    fit_logistic,
    t_quantile,
)
from prunelens.errors import UserError

TAUS = (0.6, 0.7, 0.8)
PERSISTENT = 0.7  # correlation above which a latent counts as persisting
FEATURES = {
    "rate_sparsity": ["log_rate", "sparsity"],
    "init_retention": ["init_retention"],
    "init_retention_sparsity": ["init_retention", "sparsity"],
}
EVALUATIONS = {"in_sample": None, "held_out_condition": "condition", "held_out_model": "model"}
NUM_BINS = 10
FEWEST_CONDITIONS = 4  # one more than coefficients, or their clustered covariance is singular


class PredictorResult(NamedTuple):
    """Everything that one study says about prediction."""

    table: pd.DataFrame
    """target, tau, evaluation, features, then auc, auc_within (pairs of latents of the same
    condition only), coef_log_rate, coef_sparsity, each with _low and _high; accuracy, base_rate
    (share of the larger class), standardised_log_rate, standardised_sparsity (per standard
    deviation), num_rows, num_conditions, reason. Coefficients stand in the rows in_sample /
    rate_sparsity alone: the others have no such coefficient."""
    calibration: pd.DataFrame
    """target, tau, evaluation, features, bin (1..10), predicted, observed (means), num_rows."""
    models: list[dict]
    """Per target and tau what `predict_survival` needs, JSON-able (an undefined value is None)."""


def fit_predictor(rows: pd.DataFrame, taus: Sequence[float], *, seed: int = 0) -> PredictorResult:
    """Fit and judge the predictor for every target.

    Targets: `shared_init` at tau (paper); `persistence` > 0.7 (controlled; tau NaN, rows without a
    persistence left out); `index_mean`, the paper's "survival rate > 0.5" taken literally: mean of
    the shared_init match over seeds at equal latent index, rows then per (condition, latent).
    Evaluations: `in_sample` (paper), `held_out_condition`, `held_out_model`: fitted without one
    condition or model at a time, predictions pooled. Intervals: coefficients cluster-robust by
    condition, t with conditions - 1 degrees of freedom; AUC by a bootstrap of conditions with
    predictions fixed.
    Args: rows as the module describes; taus of the study, of which 0.6, 0.7 and 0.8 are used; seed
        of the bootstrap.
    Returns: what cannot be fitted is NaN with a reason, never an exception.
    Source: paper §4.6; methods §7 Predictor.
    """
    assert (rows["firing_rate"] > 0).all(), "dead latents have no log firing rate"
    assert rows["init_retention"].notna().all(), "init_retention is a cosine of unit vectors"
    table, curves, models = [], [], []
    for target, tau, data in _targets(rows, [tau for tau in TAUS if tau in taus]):
        for evaluation, held_out in EVALUATIONS.items():
            for features in FEATURES:
                key = {"target": target, "tau": tau, "evaluation": evaluation, "features": features}
                predicted, reason = _predictions(data, FEATURES[features], held_out)
                row = key | _scores(data, predicted, reason, seed)
                if (evaluation, features) == ("in_sample", "rate_sparsity"):
                    fit = _clustered_fit(data)
                    row |= _coefficients(fit, data, row["reason"])
                    models.append({"target": target, "tau": _json(tau), **_model(fit, data)})
                table.append(row)
                if not reason:
                    curves.append(_calibration(data.y, predicted).assign(**key))
    columns = [
        "target",
        "tau",
        "evaluation",
        "features",
        "bin",
        "predicted",
        "observed",
        "num_rows",
    ]
    calibration = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=columns)
    return PredictorResult(pd.DataFrame(table, columns=_COLUMNS), calibration[columns], models)


def predict_survival(
    model: dict, firing_rate: Float[np.ndarray, " latents"], sparsity: float
) -> pd.DataFrame:
    """Chance that each latent of a dense SAE survives a pruning to `sparsity`.

    Args:
        model: one of `PredictorResult.models`.
        firing_rate: share of tokens on which each latent fires, in [0, 1].
        sparsity: in [0, 1); beyond model["sparsities"] it is an extrapolation.
    Returns: firing_rate, probability, and its 95 % interval low, high: delta method on the linear
        predictor, cluster-robust covariance, t with conditions - 1 degrees of freedom, then the
        logistic function. It is the uncertainty of the fit. NaN for dead latents; low and high NaN
        where the fit has no covariance (model["reason"]).
    Raises: UserError where nothing was fitted or the sparsity is out of range.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity: {sparsity} is outside [0, 1); give the share to be pruned")
    if model["coefficients"] is None:
        raise UserError(
            f"target: {model['target']} has no predictor in this study: {model['reason']}; "
            "use another target, or a study with more conditions"
        )
    beta = np.array([model["coefficients"][name] for name in ("intercept", "log_rate", "sparsity")])
    log_rate = np.log(np.where(firing_rate > 0, firing_rate, np.nan))
    x = np.column_stack([np.ones(len(log_rate)), log_rate, np.full(len(log_rate), sparsity)])
    half_width = np.full(len(x), np.nan)
    if model["covariance"] is not None:
        variance = np.einsum("ni,ij,nj->n", x, np.array(model["covariance"]), x)
        half_width = t_quantile(model["num_conditions"] - 1) * np.sqrt(variance)
    linear = x @ beta
    return pd.DataFrame(
        {
            "firing_rate": firing_rate,
            "probability": _logistic(linear),
            "low": _logistic(linear - half_width),
            "high": _logistic(linear + half_width),
        }
    )


_COLUMNS = [
    *("target", "tau", "evaluation", "features", "auc", "auc_low", "auc_high"),
    *("auc_within", "auc_within_low", "auc_within_high", "accuracy"),
    *("base_rate", "coef_log_rate", "coef_log_rate_low", "coef_log_rate_high"),
    *("coef_sparsity", "coef_sparsity_low", "coef_sparsity_high"),
    *("standardised_log_rate", "standardised_sparsity", "num_rows", "num_conditions", "reason"),
]


class _Data(NamedTuple):
    """The rows of one target."""

    x: pd.DataFrame
    """log_rate (natural), sparsity, init_retention."""
    y: Bool[np.ndarray, " rows"]
    condition: Int[np.ndarray, " rows"]
    """A number per condition: the cluster."""
    model: Int[np.ndarray, " rows"]

    @property
    def num_conditions(self) -> int:
        """Conditions that have a row."""
        return len(np.unique(self.condition))


class _ClusteredFit(NamedTuple):
    fit: LogisticFit
    covariance: Float[np.ndarray, "3 3"] | None
    reason: str
    """Why there is no fit or no covariance."""


def _targets(rows: pd.DataFrame, taus: Sequence[float]) -> Iterator[tuple[str, float, _Data]]:
    known = rows[rows["cosine_shared_init"].notna()]
    for tau in taus:
        matched = known["mutual_shared_init"].eq(True) & (known["cosine_shared_init"] >= tau)
        yield "shared_init", tau, _data(known, matched)
        by_index = known.assign(matched=matched.astype(float)).groupby(
            ["model", "condition", "latent"]
        )
        columns = ["sparsity", "firing_rate", "init_retention", "matched"]
        means = by_index[columns].mean().reset_index()
        yield "index_mean", tau, _data(means, means["matched"] > 0.5)
    # Persistence is of the second half: what latents are told apart by must not share its noise.
    first_half = rows.assign(firing_rate=rows["firing_rate_first_half"])
    known = first_half[first_half["persistence"].notna() & (first_half["firing_rate"] > 0)]
    yield "persistence", np.nan, _data(known, known["persistence"] > PERSISTENT)


def _data(rows: pd.DataFrame, y: pd.Series) -> _Data:
    return _Data(
        x=pd.DataFrame(
            {
                "log_rate": np.log(rows["firing_rate"].to_numpy(dtype=float)),
                "sparsity": rows["sparsity"].to_numpy(dtype=float),
                "init_retention": rows["init_retention"].to_numpy(dtype=float),
            }
        ),
        y=y.to_numpy(dtype=bool),
        condition=rows.groupby(["model", "condition"]).ngroup().to_numpy(),
        model=rows.groupby("model").ngroup().to_numpy(),
    )


def _predictions(
    data: _Data, columns: list[str], held_out: str | None
) -> tuple[Float[np.ndarray, " rows"], str]:
    """Probability of every row, by a fit that has not seen its group; NaN and why if one fails."""
    x, predicted = data.x[columns], np.full(len(data.y), np.nan)
    if held_out is None:
        fit = fit_logistic(x, data.y)
        return _probability(fit, x), fit.reason
    group: np.ndarray = getattr(data, held_out)
    names = np.unique(group)
    if len(names) < 2:
        return predicted, f"nothing to hold out: fewer than two {held_out}s"
    for name in names:
        inside = group == name
        fit = fit_logistic(x[~inside], data.y[~inside])
        if fit.reason:
            return np.full(len(x), np.nan), f"with one {held_out} held out: {fit.reason}"
        predicted[inside] = _probability(fit, x[inside])
    return predicted, ""


def _scores(data: _Data, predicted: Float[np.ndarray, " rows"], reason: str, seed: int) -> dict:
    base = float(max(data.y.mean(), 1 - data.y.mean())) if len(data.y) else np.nan
    row = {"base_rate": base, "num_rows": len(data.y), "num_conditions": data.num_conditions}
    if reason:
        return row | {"reason": reason}
    auc = clustered_auc(data.y, predicted, data.condition, seed=seed)
    return row | {
        "auc": auc.value,
        "auc_low": auc.low,
        "auc_high": auc.high,
        "auc_within": auc.within,
        "auc_within_low": auc.within_low,
        "auc_within_high": auc.within_high,
        "accuracy": float(((predicted >= 0.5) == data.y).mean()),
        "reason": auc.reason,
    }


def _clustered_fit(data: _Data) -> _ClusteredFit:
    """The paper's model on all rows, with its covariance where there are enough conditions."""
    x = data.x[FEATURES["rate_sparsity"]]
    fit = fit_logistic(x, data.y)
    if fit.reason:
        return _ClusteredFit(fit, None, fit.reason)
    if data.num_conditions < FEWEST_CONDITIONS:
        few = f"{data.num_conditions} conditions; intervals of coefficients need 4 or more"
        return _ClusteredFit(fit, None, few)
    return _ClusteredFit(fit, clustered_covariance(x, data.y, data.condition, fit), "")


def _coefficients(fit: _ClusteredFit, data: _Data, reason: str) -> dict:
    """The coefficient columns of the table."""
    width = np.full(3, np.nan)
    if fit.covariance is not None:
        width = t_quantile(data.num_conditions - 1) * np.sqrt(np.diag(fit.covariance))
    row: dict = {"reason": "; ".join(dict.fromkeys(r for r in (reason, fit.reason) if r))}
    for i, name in enumerate(FEATURES["rate_sparsity"], start=1):
        value = fit.fit.coefficients[i]
        row[f"coef_{name}"] = float(value)
        row[f"coef_{name}_low"] = float(value - width[i])
        row[f"coef_{name}_high"] = float(value + width[i])
        row[f"standardised_{name}"] = float(value * data.x[name].std(ddof=0))
    return row


def _model(fit: _ClusteredFit, data: _Data) -> dict:
    names = ("intercept", *FEATURES["rate_sparsity"])
    fitted = not fit.fit.reason
    sparsity = data.x["sparsity"]
    return {
        "coefficients": dict(zip(names, fit.fit.coefficients.tolist(), strict=True))
        if fitted
        else None,
        "covariance": None if fit.covariance is None else fit.covariance.tolist(),
        "num_conditions": data.num_conditions,
        "sparsities": [float(sparsity.min()), float(sparsity.max())] if len(sparsity) else None,
        "reason": fit.reason,
    }


def _calibration(
    y: Bool[np.ndarray, " rows"], predicted: Float[np.ndarray, " rows"]
) -> pd.DataFrame:
    """Ten bins with equal numbers of rows; equal predictions share one, so some can be missing."""
    edges = np.quantile(predicted, np.arange(1, NUM_BINS) / NUM_BINS)
    data = pd.DataFrame({"predicted": predicted, "observed": y.astype(float)})
    bins = data.groupby(np.searchsorted(edges, predicted, side="right") + 1)
    table = bins.mean().assign(num_rows=bins.size())
    return table.rename_axis("bin").reset_index()


def _probability(fit: LogisticFit, x: pd.DataFrame) -> Float[np.ndarray, " rows"]:
    return _logistic(fit.coefficients[0] + x.to_numpy(dtype=float) @ fit.coefficients[1:])


def _logistic(linear: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return 0.5 * (1 + np.tanh(linear / 2))  # never overflows


def _json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
