import itertools
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from tests.independent import statistics as slow

from prunelens.analyses.predictor import fit_predictor, predict_survival
from prunelens.analyses.statistics import clustered_auc, fit_logistic
from prunelens.errors import UserError

INTERCEPT, LOG_RATE, SPARSITY = 0.5, -0.5, -4.0  # the planted truth
T_975_DF5 = 2.570581835636314  # Student's t with 5 degrees of freedom, from a printed table
KEYS = ["target", "tau", "evaluation", "features"]
HALVES = ("persistence", "beyond_noise")  # targets without a tau


def rows(num_latents=100, models=("a", "b"), sparsities=(0.2, 0.4, 0.6), seed=0):
    """Latents that survive at tau 0.7 with the planted probability; persistence likewise."""
    generator = np.random.default_rng(seed)
    parts = []
    for model, sparsity, s in itertools.product(models, sparsities, (0, 1)):
        rate = np.exp(generator.uniform(-7, -1, num_latents))
        chance = 1 / (1 + np.exp(-INTERCEPT - LOG_RATE * np.log(rate) - SPARSITY * sparsity))
        survives, persists = generator.random((2, num_latents)) < chance
        columns = {
            "model": model,
            "condition": f"{model}/L1/wanda-row-{sparsity}",
            "sparsity": sparsity,
            "seed": s,
            "latent": np.arange(num_latents),
            "firing_rate": rate,
            "firing_rate_first_half": rate,
            "init_retention": generator.uniform(0.5, 1, num_latents),
            "cosine_shared_init": np.where(survives, 0.75, 0.65),
            "mutual_shared_init": 1.0,
            "persistence": np.where(persists, 0.8, 0.6),
            "persistence_null": generator.uniform(0.6, 0.8, num_latents),
            "persistence_noise_shuffled_draws": list(generator.uniform(0.6, 0.8, (num_latents, 3))),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def table():
    """100 latents, 2 seeds, 2 models x 3 sparsities."""
    return rows()


@pytest.fixture(scope="module")
def result(table):
    return quiet_fit(table, (0.7, 0.9))


def row_of(
    result, target, evaluation="in_sample", features="rate_sparsity", tau=0.7, source="pruned"
):
    found = result.table[result.table["source"] == source].set_index(KEYS).sort_index()
    return found.loc[(target, np.nan if target in HALVES else tau, evaluation, features)]


def design(table, features="rate_sparsity"):
    if features == "rate_sparsity":
        return np.column_stack([np.log(table["firing_rate"]), table["sparsity"]])
    return table["init_retention"].to_numpy()[:, None]


def predicted(x, beta):
    return 1 / (1 + np.exp(-beta[0] - x @ beta[1:]))


def test_planted_coefficients_are_recovered():
    table = rows(num_latents=1000)
    result = fit_predictor(table, ())  # persistence alone; the targets share all code
    row = row_of(result, "persistence")
    assert row["coef_log_rate"] == pytest.approx(LOG_RATE, abs=0.05)
    assert row["coef_sparsity"] == pytest.approx(SPARSITY, abs=0.3)
    assert row["coef_log_rate_low"] < row["coef_log_rate"] < row["coef_log_rate_high"]
    best = auc_that_knows_the_truth(table)
    assert row["auc"] == pytest.approx(best, abs=0.015)
    assert row["auc_low"] < row["auc"] < row["auc_high"]
    assert row_of(result, "persistence", "held_out_condition")["auc"] == pytest.approx(
        best, abs=0.02
    )
    useless = row_of(result, "persistence", features="init_retention")
    assert useless["auc_within"] == pytest.approx(0.5, abs=0.03)
    with_sparsity = row_of(result, "persistence", features="init_retention_sparsity")
    assert useless["auc"] + 0.05 < with_sparsity["auc"] < row["auc"] - 0.05


def auc_that_knows_the_truth(table):
    """Expected AUC of the planted chances: pairs weighted by chance of positive, of negative."""
    linear = INTERCEPT + design(table) @ np.array([LOG_RATE, SPARSITY])
    chance = np.sort(1 / (1 + np.exp(-linear)))
    below = np.cumsum(1 - chance) - (1 - chance) / 2
    return (chance * below).sum() / (chance.sum() * (1 - chance).sum())


def test_the_fit_equals_plain_newton_and_its_errors_leave_conditions_out(table, result):
    x, y = design(table), (table["cosine_shared_init"] >= 0.7).to_numpy(dtype=float)
    beta = slow.logistic(x, y)
    covariance = slow.jackknife_covariance(x, y, table["condition"].to_numpy())
    [model] = [m for m in result.models if (m["target"], m["tau"]) == ("shared_init", 0.7)]
    found = [model["coefficients"][name] for name in ("intercept", "log_rate", "sparsity")]
    np.testing.assert_allclose(found, beta, atol=1e-6)
    np.testing.assert_allclose(model["covariance"], covariance, rtol=1e-4)
    row = row_of(result, "shared_init")
    half = T_975_DF5 * np.sqrt(np.diag(covariance))
    assert (row["coef_log_rate_low"], row["coef_log_rate_high"]) == pytest.approx(
        (beta[1] - half[1], beta[1] + half[1]), rel=1e-4
    )
    assert row["coef_sparsity_high"] == pytest.approx(beta[2] + half[2], rel=1e-4)
    assert row["standardised_log_rate"] == pytest.approx(beta[1] * np.std(x[:, 0]))
    assert row["standardised_sparsity"] == pytest.approx(beta[2] * np.std(x[:, 1]))
    p = predicted(x, beta)
    assert row["auc"] == pytest.approx(slow.auc(y, p))
    assert row["accuracy"] == np.mean((p >= 0.5) == y)
    assert row["base_rate"] == max(y.mean(), 1 - y.mean())
    assert (row["num_rows"], row["num_conditions"]) == (len(table), 6)


@pytest.mark.parametrize("evaluation", ["held_out_condition", "held_out_model"])
@pytest.mark.parametrize("features", ["rate_sparsity", "init_retention"])
def test_held_out_predictions_come_from_fits_that_never_saw_the_group(
    table, result, evaluation, features
):
    y = (table["persistence"] > 0.7).to_numpy(dtype=float)
    group = table["condition" if evaluation == "held_out_condition" else "model"].to_numpy()
    x, p = design(table, features), np.zeros(len(table))
    for name in set(group):
        p[group == name] = predicted(
            x[group == name], slow.logistic(x[group != name], y[group != name])
        )
    row = row_of(result, "persistence", evaluation, features)
    assert row["auc"] == pytest.approx(slow.auc(y, p), abs=1e-6)
    assert row["accuracy"] == np.mean((p >= 0.5) == y)
    condition = table["condition"].to_numpy()
    inside = [condition == name for name in set(condition)]
    pairs = [y[i].sum() * (1 - y[i]).sum() for i in inside]
    within = np.average([slow.auc(y[i], p[i]) for i in inside], weights=pairs)
    assert row["auc_within"] == pytest.approx(within, abs=1e-6)


def test_the_interval_of_the_auc_leaves_clusters_out():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(6), 20)
    y = generator.random(120) < 0.2 + 0.1 * clusters
    scores, less = (np.round(generator.normal(y + 0.3 * clusters, 1)) for _ in range(2))  # ties
    names = sorted(set(clusters))

    def within(rows, of):
        inside = [rows & (clusters == name) for name in names if (rows & (clusters == name)).any()]
        pairs = [y[i].sum() * (~y[i]).sum() for i in inside]
        return np.average([slow.auc(y[i], of[i]) for i in inside], weights=pairs)

    everything = np.ones(120, dtype=bool)
    found = clustered_auc(y, scores, clusters)
    for estimate, statistic in (
        (found.pooled, lambda rows: slow.auc(y[rows], scores[rows])),
        (found.within, lambda rows: within(rows, scores)),
    ):
        value, left = statistic(everything), [statistic(clusters != name) for name in names]
        assert estimate.value == pytest.approx(value)
        odds = np.log(np.array([value, *left]) / (1 - np.array([value, *left])))
        half = T_975_DF5 * np.sqrt(slow.jackknife(odds[1:].tolist()))
        ends = [1 / (1 + np.exp(-(odds[0] + side * half))) for side in (-1, 1)]
        assert estimate.bounds() == pytest.approx(ends)
    beyond = clustered_auc(y, scores, clusters, less=less).within
    gains = [
        within(rows, scores) - within(rows, less)
        for rows in (everything, *[clusters != name for name in names])
    ]
    assert beyond.value == pytest.approx(gains[0])
    assert beyond.error == pytest.approx(np.sqrt(slow.jackknife(gains[1:])))


def test_targets_are_what_methods_say():
    table = rows(num_latents=40, models=("a",))
    table.loc[::7, "persistence"] = np.nan
    table.loc[::5, "mutual_shared_init"] = 0.0
    result = fit_predictor(table, (0.5, 0.6, 0.7))
    targets = zip(result.table["target"], result.table["tau"], strict=True)
    tau = {(t, -1.0 if np.isnan(v) else v) for t, v in targets}
    matched = ("shared_init", "quintile", "index_mean")
    assert tau == {(t, v) for t in matched for v in (0.6, 0.7)} | {(t, -1.0) for t in HALVES}
    draws = np.sort(np.stack(table["persistence_noise_shuffled_draws"]), axis=1)
    for source, column in (("pruned", "persistence"), ("null", "persistence_null")):
        above = (table[column] > draws[:, 1])[table[column].notna()]
        base = row_of(result, "beyond_noise", source=source)["base_rate"]
        assert base == max(above.mean(), 1 - above.mean())
    y = (table["mutual_shared_init"] == 1) & (table["cosine_shared_init"] >= 0.7)
    assert row_of(result, "shared_init")["base_rate"] == max(y.mean(), 1 - y.mean())
    known = table["persistence"].dropna() > 0.7
    assert row_of(result, "persistence")["num_rows"] == len(known)
    assert row_of(result, "persistence")["base_rate"] == max(known.mean(), 1 - known.mean())
    sums = {}
    for record, matched in zip(table.to_dict("records"), y, strict=True):
        key = (record["condition"], record["latent"])
        sums.setdefault(key, []).append((matched, record["firing_rate"], record["sparsity"]))
    means = np.array([np.mean(found, axis=0) for found in sums.values()])
    row = row_of(result, "index_mean")
    majority = (means[:, 0] > 0.5).astype(float)
    assert row["num_rows"] == len(means) == len(table) / 2
    assert row["base_rate"] == max(majority.mean(), 1 - majority.mean())
    x = np.column_stack([np.log(means[:, 1]), means[:, 2]])
    assert row["coef_log_rate"] == pytest.approx(slow.logistic(x, majority)[1], abs=1e-6)


def test_calibration_bins_hold_equal_shares_and_average_to_the_observed_rate(table, result):
    for key, part in result.calibration.groupby(KEYS, dropna=False):
        rows_of_target = {"quintile": 5 * 6, "index_mean": len(table) // 2}
        assert part["num_rows"].sum() == rows_of_target.get(key[0], len(table))
        assert part["predicted"].is_monotonic_increasing
    part = result.calibration.query(
        "target == 'persistence' and evaluation == 'in_sample' and features == 'rate_sparsity'"
    )
    assert part["bin"].tolist() == list(range(1, 11))
    assert (part["num_rows"] == len(table) / 10).all()
    y = (table["persistence"] > 0.7).mean()  # a fit with an intercept meets the mean exactly
    assert np.average(part["predicted"], weights=part["num_rows"]) == pytest.approx(y, abs=1e-6)
    assert np.average(part["observed"], weights=part["num_rows"]) == pytest.approx(y)
    np.testing.assert_allclose(part["observed"], part["predicted"], atol=0.15)


def test_predictions_of_a_saved_model(table, result):
    models = json.loads(json.dumps(result.models, allow_nan=False))
    [model] = [m for m in models if m["target"] == "persistence"]
    assert model["tau"] is None
    assert model["sparsities"] == [0.2, 0.6]
    rates = np.array([0.0, 1e-3, 0.1])
    found = predict_survival(model, rates, 0.5)
    assert found.iloc[0][["probability", "low", "high"]].isna().all()
    x, y = design(table), (table["persistence"] > 0.7).to_numpy(dtype=float)
    beta = slow.logistic(x, y)
    covariance = slow.jackknife_covariance(x, y, table["condition"].to_numpy())
    for row in found.iloc[1:].itertuples():
        at = np.array([1, np.log(row.firing_rate), 0.5])
        linear, half = at @ beta, T_975_DF5 * np.sqrt(at @ covariance @ at)
        expected = [1 / (1 + np.exp(-v)) for v in (linear, linear - half, linear + half)]
        assert (row.probability, row.low, row.high) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"sparsity: 50 is outside \[0, 1\)"):
        predict_survival(model, rates, 50)


def test_one_condition_is_nan_with_a_reason_and_no_model():
    table = rows(models=("a",), sparsities=(0.5,))
    result = quiet_fit(table)
    assert result.table["reason"].ne("").all()
    assert len(result.table) == 10 * 4  # both halves' targets, pruned and null
    row = row_of(result, "persistence")
    assert np.isnan(row["auc"])
    assert row["reason"] == "sparsity is the same in every row"
    assert row["base_rate"] >= 0.5
    baseline = row_of(result, "persistence", features="init_retention")
    assert np.isfinite(baseline["auc"])
    assert np.isnan(baseline["auc_low"])
    assert "needs 4 conditions" in baseline["reason"]
    held_out = row_of(result, "persistence", "held_out_condition", "init_retention")
    assert held_out["reason"] == "nothing to hold out: fewer than two conditions"
    with pytest.raises(UserError, match=r"persistence has no predictor.*sparsity is the same"):
        predict_survival(result.models[0], np.array([0.1]), 0.5)


def test_few_conditions_have_coefficients_without_intervals():
    result = quiet_fit(rows(models=("a",)))
    row = row_of(result, "persistence")
    assert np.isfinite(row[["auc", "coef_log_rate"]].astype(float)).all()
    assert row[["auc_low", "coef_log_rate_low", "coef_sparsity_high"]].isna().all()
    assert "3 conditions; intervals of coefficients need 4" in row["reason"]
    prediction = predict_survival(result.models[0], np.array([0.1]), 0.5)
    assert np.isfinite(prediction["probability"][0])
    assert np.isnan(prediction["low"][0])
    held_out = row_of(result, "persistence", "held_out_model")
    assert held_out["reason"] == "nothing to hold out: fewer than two models"


def test_one_class_separation_and_no_rows_are_nan_with_a_reason(table):
    table = table.assign(persistence=0.9)
    assert row_of(quiet_fit(table), "persistence")["reason"] == "one class only"
    separated = table.assign(persistence=np.where(table["firing_rate"] < 0.02, 0.9, 0.1))
    result = quiet_fit(separated)
    row = row_of(result, "persistence")
    assert row["reason"] == "a line separates the two classes"
    assert row[["auc", "coef_log_rate", "accuracy"]].isna().all()
    held_out = row_of(result, "persistence", "held_out_condition")
    assert held_out["reason"].startswith("with one condition held out: a line")
    row = row_of(quiet_fit(table.assign(persistence=np.nan)), "persistence")
    assert (row["num_rows"], row["reason"]) == (0, "no rows")
    assert np.isnan(row["base_rate"])
    assert len(quiet_fit(table.iloc[:0], (0.7, 0.8)).table) == 10 * (2 * 3 + 4)


def test_separation_is_recognised_exactly():
    """Complete, quasi (a whole sparsity has one class), and neither but nearly."""
    generator = np.random.default_rng(0)
    x = pd.DataFrame({"log_rate": generator.normal(size=90), "sparsity": np.repeat([0, 1, 2], 30)})
    coin = generator.random(90) < 0.5
    assert fit_logistic(x, coin).reason == ""
    quasi = np.where(x["sparsity"] == 1, coin, x["sparsity"] == 2)
    assert fit_logistic(x, quasi).reason == "a line separates the two classes"
    quasi[[0, -1]] = [True, False]
    found = fit_logistic(x, quasi)
    assert found.reason == ""
    np.testing.assert_allclose(found.coefficients, slow.logistic(x.to_numpy(), quasi), rtol=1e-4)
    line = (x["log_rate"] + 0.3 * x["sparsity"] > 0.2).to_numpy()
    assert fit_logistic(x, line).reason == "a line separates the two classes"
    assert fit_logistic(x.assign(double=2 * x["sparsity"]), coin).reason.endswith("each other")


def quiet_fit(table, taus=()):
    """Degenerate input must not warn either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fit_predictor(table, taus)


def test_persistence_goes_by_the_first_half_and_the_arms_by_the_whole(table):
    """What latents are told apart by must not share the noise of what they are judged by."""
    useless = table.assign(firing_rate_first_half=0.1)
    found = quiet_fit(useless, (0.7,))
    assert "log_rate is the same" in row_of(found, "persistence")["reason"]
    expected = row_of(quiet_fit(table, (0.7,)), "shared_init")["auc"]
    assert row_of(found, "shared_init")["auc"] == expected
    silent = table.assign(firing_rate_first_half=table["firing_rate"].where(table["latent"] > 9, 0))
    assert row_of(quiet_fit(silent, (0.7,)), "persistence")["num_rows"] == 0.9 * len(table)


def test_nothing_is_predicted_of_the_null(table):
    """A further draw of the noise lies above the median of three with even odds, whatever the rate;
    how far it lies from a fixed 0.7 depends on the rate."""
    generator = np.random.default_rng(4)
    spread = 0.3 * np.abs(np.log(table["firing_rate"].to_numpy()))[:, None] / 7
    draws = 0.75 + spread * generator.normal(size=(len(table), 4))
    known = table.assign(
        persistence_null=draws[:, 0], persistence_noise_shuffled_draws=list(draws[:, 1:])
    )
    found = quiet_fit(known)
    honest = row_of(found, "beyond_noise", "stated_sign", source="null")
    assert honest["auc_within_low"] < 0.5 < honest["auc_within_high"]
    assert honest["gain_low"] < 0 < honest["gain_high"]
    fixed = row_of(found, "persistence", "stated_sign", source="null")
    assert fixed["auc_within_high"] < 0.5


def test_the_stated_sign_is_not_fitted(table):
    """Where the frequent survive, a fit turns round; what the paper states does not."""
    frequent = table.assign(persistence=np.where(table["firing_rate"] > 0.02, 0.9, 0.1))
    frequent.loc[::9, "persistence"] = 0.5
    found = quiet_fit(frequent)
    assert row_of(found, "persistence", "held_out_condition")["auc_within"] > 0.8
    assert row_of(found, "persistence", "stated_sign")["auc_within"] < 0.2


def test_a_quintile_of_the_first_seed_is_a_row_of_the_paper(table):
    """19 conditions of five quintiles: 95 rows."""
    many = rows(num_latents=23, models=("a",), sparsities=tuple(s / 40 for s in range(1, 20)))
    quintile = row_of(quiet_fit(many, (0.7,)), "quintile")
    assert quintile["num_rows"] == 95
    first = many[many["seed"] == 0]
    rates, shares, sparsities = [], [], []
    for _, part in first.groupby("condition"):
        ordered = part.sort_values("firing_rate").reset_index()
        for q in range(5):
            own = ordered[ordered.index * 5 // len(ordered) == q]
            rates.append(own["firing_rate"].mean())
            shares.append((own["cosine_shared_init"] >= 0.7).mean() > 0.5)
            sparsities.append(own["sparsity"].iloc[0])
    x = np.column_stack([np.log(rates), sparsities])
    expected = slow.logistic(x, np.array(shares, float))
    assert quintile["coef_log_rate"] == pytest.approx(expected[1], rel=1e-4)
