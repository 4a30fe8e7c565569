"""Can a latent's survival be told before pruning, from its firing rate?

A logistic regression on log firing rate and sparsity, as in the paper; beside it, the same for a
target that no shared start inflates, evaluations on conditions and models that the fit has not
seen, and the baseline that knows only how near a latent stayed to its start.

Input: one row per pruned run, seed and alive dense latent, with columns model, condition (the run,
so model x layer x pruning: no two layers share a name), sparsity, and those of `analyses.fates`.
What an interval leaves out are conditions, with their fits: it is about conditions like these, on
these dense latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from prunelens.analyses.fragility import NUM_QUINTILES
from prunelens.analyses.statistics import (
    LogisticFit,
    clustered_auc,
    fit_logistic,
    jackknifed,
    no_estimate,
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
STATED = "stated_sign"
NUM_BINS = 10
FEWEST_CONDITIONS = 4  # left out in turn, fewer cannot tell three coefficients apart


class PredictorResult(NamedTuple):
    """Everything that one study says about prediction."""

    table: pd.DataFrame
    """target, tau, evaluation, features, then auc, auc_within (pairs of latents of the same
    condition only), gain (of stated_sign: what auc_within has beyond that of init_retention),
    coef_log_rate, coef_sparsity, each with _low, _high, _error, _df, _least and _most (see
    `Estimate`); accuracy, base_rate (share of the larger class), standardised_log_rate,
    standardised_sparsity (per standard deviation), num_rows, num_conditions, reason, and source:
    pruned, or null for the targets that read pruned activations. Coefficients stand in the rows
    in_sample / rate_sparsity alone: the others have no such coefficient."""
    calibration: pd.DataFrame
    """target, tau, evaluation, features, bin (1..10), predicted, observed (means), num_rows."""
    models: list[dict]
    """Per target and tau what `predict_survival` needs, JSON-able (an undefined value is None)."""


def fit_predictor(rows: pd.DataFrame, taus: Sequence[float]) -> PredictorResult:
    """Fit and judge the predictor for every target.

    Targets: `shared_init` at tau (paper); `quintile`, the same with a row per quintile and
    condition of the first seed: whether more than half of it survived (what the paper's accuracies
    look like: 66, 73 and 79 of 95 rows); `index_mean`, its "survival rate > 0.5" taken literally:
    mean of the shared_init match over seeds at equal latent index, rows then per (condition,
    latent); `persistence` > 0.7 (tau NaN, rows without a persistence left out), which noise moves
    with firing rate; `beyond_noise` (controlled): persistence above the median of the draws of
    shuffled noise, which on the null is even odds for every latent.
    Evaluations: `in_sample` (paper), `held_out_condition`, `held_out_model`: fitted without one
    condition or model at a time, predictions pooled; `stated_sign`: nothing fitted, the rarer the
    better, within conditions alone. (What was held out is biased where nothing is: if the others
    lean one way by chance, it leans the other.) Intervals leave out conditions in turn, t
    with conditions - 1 degrees of freedom: coefficients with the fit, AUCs with predictions fixed.
    Args: rows as the module describes; taus of the study, of which 0.6, 0.7 and 0.8 are used.
    Returns: what cannot be fitted is NaN with a reason, never an exception.
    Source: paper §4.6; methods §7 Predictor, §10.
    """
    assert (rows["firing_rate"] > 0).all(), "dead latents have no log firing rate"
    assert rows["init_retention"].notna().all(), "init_retention is a cosine of unit vectors"
    table, curves, models = [], [], []
    for target, source, tau, data in _targets(rows, [tau for tau in TAUS if tau in taus]):
        table.append({"target": target, "tau": tau, "source": source} | _by_stated_sign(data))
        for evaluation, held_out in EVALUATIONS.items():
            predicted = {
                features: _predictions(data, columns, held_out)
                for features, columns in FEATURES.items()
            }
            for features, (scores, reason) in predicted.items():
                key = {"target": target, "tau": tau, "evaluation": evaluation, "features": features}
                row = key | {"source": source} | _scores(data, scores, reason)
                if (evaluation, features) == ("in_sample", "rate_sparsity"):
                    fit = _clustered_fit(data)
                    row |= _coefficients(fit, data, row["reason"])
                    if source == "pruned":
                        models.append({"target": target, "tau": _json(tau), **_model(fit, data)})
                table.append(row)
                if not reason and source == "pruned":
                    curves.append(_calibration(data.y, scores).assign(**key))
    columns = ["target", "tau", "evaluation", "features", "bin"]
    columns += ["predicted", "observed", "num_rows"]
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
        predictor, covariance by leaving out conditions, t with conditions - 1 degrees of freedom,
        then the logistic function. It is the uncertainty of the fit. NaN for dead latents; low and
        high NaN where the fit has no covariance (model["reason"]).
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


_ESTIMATED = ("auc", "auc_within", "gain", "coef_log_rate", "coef_sparsity")
_COLUMNS = [
    *("target", "tau", "evaluation", "features", "source"),
    *(column for name in _ESTIMATED for column in no_estimate(np.nan, "").columns(name)),
    *("accuracy", "base_rate", "standardised_log_rate", "standardised_sparsity"),
    *("num_rows", "num_conditions", "reason"),
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
    without: Float[np.ndarray, "conditions 3"] | None
    """The coefficients without each condition."""
    reason: str
    """Why there is no fit, or no interval."""


def _targets(rows: pd.DataFrame, taus: Sequence[float]) -> Iterator[tuple[str, str, float, _Data]]:
    """Target, source, tau and rows."""
    known = rows[rows["cosine_shared_init"].notna()]
    for tau in taus:
        matched = known["mutual_shared_init"].eq(True) & (known["cosine_shared_init"] >= tau)
        yield "shared_init", "pruned", tau, _data(known, matched)
        quintiles = quintile_rows(known.assign(matched=matched.astype(float)))
        yield "quintile", "pruned", tau, _data(quintiles, quintiles["matched"] > 0.5)
        by_index = known.assign(matched=matched.astype(float)).groupby(
            ["model", "condition", "latent"]
        )
        columns = ["sparsity", "firing_rate", "init_retention", "matched"]
        means = by_index[columns].mean().reset_index()
        yield "index_mean", "pruned", tau, _data(means, means["matched"] > 0.5)
    # Persistence is of the second half: what latents are told apart by must not share its noise.
    first_half = rows.assign(firing_rate=rows["firing_rate_first_half"])
    for source, column in (("pruned", "persistence"), ("null", "persistence_null")):
        known = first_half[first_half[column].notna() & (first_half["firing_rate"] > 0)]
        yield "persistence", source, np.nan, _data(known, known[column] > PERSISTENT)
        draws = known["persistence_noise_shuffled_draws"]
        median = np.median(np.stack(draws), axis=1) if len(draws) else np.empty(0)
        yield "beyond_noise", source, np.nan, _data(known, known[column] > median)


def quintile_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per model, condition and firing-rate quintile of the first seed: means of its latents.

    Args: rows: with `matched`, a number per latent. Quintiles as in `fragility`.
    """
    first = rows[rows["seed"] == rows["seed"].min()]
    groups = first.groupby(["model", "condition"])["firing_rate"]
    place = groups.rank(method="first") - 1
    quintile = (place * NUM_QUINTILES // groups.transform("size")).astype(int)
    columns = ["sparsity", "firing_rate", "init_retention", "matched"]
    grouped = first.assign(quintile=quintile).groupby(["model", "condition", "quintile"])
    return grouped[columns].mean().reset_index()


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


def _scores(data: _Data, predicted: Float[np.ndarray, " rows"], reason: str) -> dict:
    base = float(max(data.y.mean(), 1 - data.y.mean())) if len(data.y) else np.nan
    row = {"base_rate": base, "num_rows": len(data.y), "num_conditions": data.num_conditions}
    if reason:
        return row | {"reason": reason}
    auc = clustered_auc(data.y, predicted, data.condition)
    row |= auc.pooled.columns("auc") | auc.within.columns("auc_within")
    return row | {"accuracy": float(((predicted >= 0.5) == data.y).mean()), "reason": auc.reason}


def _by_stated_sign(data: _Data) -> dict:
    """Nothing is fitted: the rarer, the better it survives, as the paper says; and what that has
    beyond `the nearer to the start, the better`."""
    row = {"evaluation": STATED, "features": "rate_sparsity", "num_rows": len(data.y)}
    rare, near = -data.x["log_rate"].to_numpy(), data.x["init_retention"].to_numpy()
    found = clustered_auc(data.y, rare, data.condition)
    beyond = clustered_auc(data.y, rare, data.condition, less=near)
    row |= found.within.columns("auc_within") | beyond.within.columns("gain")
    return row | {"num_conditions": data.num_conditions, "reason": found.reason}


def _clustered_fit(data: _Data) -> _ClusteredFit:
    """The paper's model on all rows, and without each condition where there are enough."""
    x = data.x[FEATURES["rate_sparsity"]]
    fit = fit_logistic(x, data.y)
    if fit.reason:
        return _ClusteredFit(fit, None, fit.reason)
    if data.num_conditions < FEWEST_CONDITIONS:
        few = f"{data.num_conditions} conditions; intervals of coefficients need 4 or more"
        return _ClusteredFit(fit, None, few)
    kept = [data.condition != condition for condition in np.unique(data.condition)]
    fits = [fit_logistic(x[rows], data.y[rows]) for rows in kept]
    reason = next((f"without one condition: {each.reason}" for each in fits if each.reason), "")
    without = None if reason else np.array([each.coefficients for each in fits])
    return _ClusteredFit(fit, without, reason)


def _coefficients(fit: _ClusteredFit, data: _Data, reason: str) -> dict:
    """The coefficient columns of the table."""
    row: dict = {"reason": "; ".join(dict.fromkeys(r for r in (reason, fit.reason) if r))}
    for i, name in enumerate(FEATURES["rate_sparsity"], start=1):
        value = float(fit.fit.coefficients[i])
        found = no_estimate(value, fit.reason)
        if fit.without is not None:
            found = jackknifed(value, fit.without[:, i], "conditions", fewest=FEWEST_CONDITIONS)
        row |= found.columns(f"coef_{name}")
        row[f"standardised_{name}"] = value * float(data.x[name].std(ddof=0))
    return row


def _model(fit: _ClusteredFit, data: _Data) -> dict:
    names = ("intercept", *FEATURES["rate_sparsity"])
    fitted = not fit.fit.reason
    sparsity, covariance = data.x["sparsity"], None
    if fit.without is not None:  # the jackknife's
        count = len(fit.without)
        covariance = (count - 1) / count * (count - 1) * np.cov(fit.without.T)
    return {
        "coefficients": dict(zip(names, fit.fit.coefficients.tolist(), strict=True))
        if fitted
        else None,
        "covariance": None if covariance is None else covariance.tolist(),
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
