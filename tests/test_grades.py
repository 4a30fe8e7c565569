"""Grades against a slow second opinion, and against measures whose worth is known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tests.independent import grades as slow

from prunelens import planted
from prunelens.analyses import coverage as simulated
from prunelens.analyses.grades import (
    COLUMNS,
    DECIDES,
    FOLLOWS_RATE,
    MEASURES,
    NULL_COLUMNS,
    SEPARATES,
    WITH_RATE,
    grades,
    latent_truth,
    null_grades,
    undertrained_grades,
)
from prunelens.analyses.statistics import Estimate
from prunelens.columns import meanings_of

ARMS = ("shared_init", "shared_start", "cross_init", "warm_start")
NOISES = ("isotropic", "shuffled")
NUMBERS = (
    "num_latents", "share_defined", "auc", "precision", "recall", "false_survival", "bias",
    "bias_rotated", "rate_rho", "truth_rho", "share_rho",
)  # fmt: skip
FACTS = (
    "seed", "latent", "fate", "firing_rate", "firing_rate_first_half", "init_retention",
    "true_cosine", "true_scale", "true_share",
)  # fmt: skip
SHARES = {
    "kept": 0.3,
    "rescaled": 0.1,
    "split": 0.1,
    "merged": 0.1,
    "weakened": 0.05,
    "turned": 0.05,
    "removed": 0.15,
    "rotated": 0.15,
}
THRESHOLDS = {"persistence_jaccard": 0.5, "scaling": 0.5}  # 0.7 for the others
THRESHOLDS |= {"excess_isotropic": 0.0, "excess_shuffled": 0.0}
PLANTED_AS = {**dict.fromkeys(ARMS, "true_cosine"), "scaling": "true_scale"}
AMOUNT = {
    "kept": 1.0,
    "rescaled": 1.0,
    "split": 0.5,
    "merged": 0.5,
    "weakened": 0.4,
    "turned": 0.6,
    "removed": 0.0,
    "rotated": 0.0,
}


def latents(num_latents=60, seeds=(0, 1), seed=0):
    """Fates with every measure at random; some latents dead, some without a value."""
    generator = np.random.default_rng(seed)
    parts = []
    for s in seeds:
        fate = generator.choice(list(SHARES), num_latents, p=list(SHARES.values()))
        rate = np.round(generator.uniform(0, 0.1, num_latents), 3)  # ties
        rate[generator.random(num_latents) < 0.05] = 0.0
        cosine = generator.uniform(0.9, 1.0, num_latents)
        cosine[fate == "rotated"] = generator.uniform(0, 0.26, (fate == "rotated").sum())
        cosine[np.isin(fate, ("split", "merged", "removed"))] = np.nan
        scale = np.where(fate == "rescaled", 1.5, 1.0) * cosine
        columns = {
            "seed": s,
            "latent": np.arange(num_latents),
            "alive": rate > 0,
            "firing_rate": rate,
            "firing_rate_first_half": rate * generator.choice([0, 0.8, 1.1], num_latents),
            "init_retention": generator.uniform(0, 1, num_latents),
            "fate": fate,
            "true_cosine": cosine,
            "true_scale": np.where(fate == "removed", 0.0, scale),
            "true_share": pd.Series(fate).map(AMOUNT).to_numpy(),
        }
        for column in value_columns():
            columns[column] = generator.uniform(-0.2, 0.99, num_latents).round(2)
        for arm in ARMS:
            absent = arm in ("shared_start", "warm_start") and s != 0
            mutual = (generator.random(num_latents) < 0.7).astype(float)
            for name in (f"mutual_{arm}", f"activation_mutual_{arm}"):
                columns[name] = np.nan if absent else mutual
            if absent:
                columns[f"cosine_{arm}"] = np.nan
        for column in ("persistence", "scaling", "activation_correlation_cross_init"):
            columns[column] = np.where(generator.random(num_latents) < 0.1, np.nan, columns[column])
        columns["persistence_z"] = np.arctanh(columns["persistence"])
        parts.append(pd.DataFrame(columns))
    return with_documents(pd.concat(parts, ignore_index=True))


def with_documents(fates, num_groups=4):
    """Correlations without each group of documents: the same, as if documents were all alike."""
    names = ["persistence", *(f"persistence_noise_{noise}" for noise in NOISES)]
    alike = {f"{name}_without": [np.full(num_groups, v) for v in fates[name]] for name in names}
    return fates.assign(**alike)


def value_columns():
    """Of `fates`, where measures of latents are read."""
    names = [f"{kind}_{arm}" for arm in ARMS for kind in ("cosine", "subspace")]
    names += [f"activation_correlation_{arm}" for arm in ARMS]
    noises = [f"persistence_noise_{noise}{end}" for end in ("", "_z") for noise in NOISES]
    return [*names, *noises, "persistence", "persistence_jaccard", "scaling"]


def value_of(row, name):
    """From the definitions: (value, mutual or None, the rate that may sort it)."""
    halved = row["firing_rate_first_half"]
    if name.startswith("activation_"):
        arm = name.removeprefix("activation_")
        mutual = row[f"activation_mutual_{arm}"] == 1
        return row[f"activation_correlation_{arm}"], mutual, halved
    if name in ARMS:
        return row[f"cosine_{name}"], row[f"mutual_{name}"] == 1, row["firing_rate"]
    if name.startswith("subspace_"):
        return row[name], None, row["firing_rate"]
    if name.startswith("excess_"):
        noise = row[f"persistence_noise_{name.removeprefix('excess_')}_z"]
        return row["persistence_z"] - noise, None, halved
    if name.startswith("relative_"):
        noise = row[f"persistence_noise_{name.removeprefix('relative_')}"]
        return row["persistence"] / noise if noise >= 0.3 else math.nan, None, halved
    return row[name], None, halved


def slow_rows(fates, name):
    rows = []
    for row in fates.to_dict("records"):
        value, mutual, rate = value_of(row, name)
        known = row[PLANTED_AS[name]] if name in PLANTED_AS else math.nan
        kept = {key: row[key] for key in ("seed", "alive", "fate")} | {"share": row["true_share"]}
        rows.append({**kept, "value": value, "mutual": mutual, "rate": rate, "planted": known})
    return rows


def graded(fates, choice="independent"):
    return grades(fates, choice=choice).set_index("measure")


def alone(fates, value):
    """`scaling` with these values, and no other measure; every latent is alive."""
    return fates[[name for name in fates if name in FACTS]].assign(scaling=value, alive=True)


# ---- equal to the slow definitions ----


@pytest.mark.parametrize("seed", range(2))
def test_every_number_of_every_measure_equals_the_slow_definition(seed):
    fates = latents(seed=seed)
    found = graded(fates)
    assert set(found.index) == set(MEASURES)
    for name, row in found.iterrows():
        expected = slow.grade(
            slow_rows(fates, name),
            THRESHOLDS.get(name, 0.7),
            rotated_survives=name.startswith("activation_"),
        )
        for column in NUMBERS:
            assert row[column] == pytest.approx(expected[column], abs=1e-9, nan_ok=True), (
                name,
                column,
            )


def test_ties_count_half_and_the_threshold_itself_is_survival():
    fates = latents()
    fates = fates[fates["fate"].isin(["kept", "removed"])].reset_index(drop=True)
    row = graded(alone(fates, 0.5)).loc["scaling"]
    assert row["auc"] == 0.5
    assert row["recall"] == row["false_survival"] == 1.0
    below = graded(alone(fates, np.nextafter(0.5, 0))).loc["scaling"]
    assert below["recall"] == below["false_survival"] == 0.0
    assert math.isnan(below["precision"])  # nothing is said to survive


def test_a_match_that_is_not_mutual_is_none():
    fates = latents()
    cosine = np.where(fates["fate"].isin(["kept", "rescaled"]), 0.95, 0.1)
    fates = alone(fates, 0.0).assign(cosine_shared_init=cosine, mutual_shared_init=1.0)
    mutual = graded(fates).loc["shared_init"]
    assert (mutual["recall"], mutual["auc"]) == (1.0, 1.0)
    one_way = graded(fates.assign(mutual_shared_init=0.0)).loc["shared_init"]
    assert (one_way["recall"], one_way["auc"]) == (0.0, 1.0)


# ---- measures whose worth is known ----


def test_a_perfect_measure_gets_everything_right():
    fates = latents()
    truth = fates["fate"].map(AMOUNT)
    row = graded(alone(fates, truth)).loc["scaling"]
    assert (row["auc"], row["precision"], row["recall"]) == (1.0, 1.0, 1.0)
    assert row["false_survival"] == 0.0
    assert row["rate_rho"] == pytest.approx(row["truth_rho"])
    wrong = graded(alone(fates, -truth)).loc["scaling"]
    assert wrong["auc"] == 0.0
    assert wrong["rate_rho"] == pytest.approx(-wrong["truth_rho"])


def test_a_random_measure_gets_half():
    fates = latents(num_latents=3000, seeds=(0,))
    noise = np.random.default_rng(1).uniform(0, 1, len(fates))
    row = graded(alone(fates, noise)).loc["scaling"]
    assert row["auc"] == pytest.approx(0.5, abs=0.04)
    assert row["recall"] == pytest.approx(row["false_survival"], abs=0.05)
    assert row["rate_low"] <= 0 <= row["rate_high"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_measure_of_firing_rate_alone_is_found_out(sign):
    fates = latents()
    off = np.random.default_rng(1).normal(0, 0.003, len(fates))
    row = graded(alone(fates, sign * (fates["firing_rate_first_half"] + off))).loc["scaling"]
    assert row["rate_rho"] == pytest.approx(sign, abs=0.05)
    assert min(abs(row["rate_low"]), abs(row["rate_high"])) > 0.9
    assert not row["passed"]
    assert "covers 0" in row["reason"]


def test_bias_is_measure_minus_what_was_planted():
    fates = latents()
    for arm in ARMS:
        fates[f"cosine_{arm}"] = fates["true_cosine"].fillna(0.3) + 0.02
    fates["scaling"] = fates["true_scale"].fillna(0.3) - 0.1
    found = graded(fates)
    for arm in ARMS:
        assert found.loc[arm, "bias"] == pytest.approx(0.02)
        assert found.loc[arm, "bias_rotated"] == pytest.approx(0.02)
    assert found.loc["scaling", "bias"] == pytest.approx(-0.1)
    assert math.isnan(found.loc["persistence", "bias"])  # equals no angle, by design


def test_matching_by_activation_may_call_a_rotated_direction_survived():
    fates = latents()
    fires_as_before = np.where(fates["fate"] == "removed", 0.1, 0.9)
    fates = alone(fates, fires_as_before)
    fates["activation_correlation_cross_init"] = fires_as_before
    found = graded(fates.assign(activation_mutual_cross_init=1.0))
    assert found.loc["activation_cross_init", "auc"] == 1.0
    assert found.loc["activation_cross_init", "false_survival"] == 0.0
    assert found.loc["scaling", "auc"] < 1.0  # reads directions, so a rotated one is gone
    assert found.loc["scaling", "false_survival"] > 0.3


def test_the_truth_of_matching_by_activation_counts_rotated_ones_as_survived():
    """Where only rotated ones are rare, the amount left rises with rate, and where it fires not."""
    fate = np.array(["rotated"] * 20 + ["kept", "removed"] * 20)
    rate = np.linspace(0.01, 0.1, len(fate))
    fates = pd.DataFrame({"seed": 0, "latent": range(len(fate)), "fate": fate, "alive": True})
    fates = fates.assign(firing_rate=rate, firing_rate_first_half=rate, init_retention=rate)
    kept = (fate == "kept").astype(float)
    fates = fates.assign(true_cosine=1.0, true_scale=1.0, true_share=kept, scaling=kept)
    fates["activation_correlation_cross_init"] = (fate != "removed").astype(float)
    found = graded(fates.assign(activation_mutual_cross_init=1.0))
    assert found.loc["scaling", "truth_rho"] > 0.3
    assert found.loc["activation_cross_init", "truth_rho"] < -0.3
    for name in ("scaling", "activation_cross_init"):
        assert found.loc[name, "rate_rho"] == pytest.approx(found.loc[name, "truth_rho"])


def test_share_defined_is_of_alive_latents_that_are_graded():
    fates = alone(latents(), 0.5)
    fates["alive"] = np.arange(len(fates)) % 4 > 0
    asked = fates["alive"] & fates["fate"].isin(["kept", "rescaled", "removed", "rotated"])
    assert graded(fates).loc["scaling", "share_defined"] == 1.0
    fates.loc[fates.index[asked][:7], "scaling"] = np.nan
    fates.loc[fates["fate"] == "split", "scaling"] = np.nan  # neither asked nor missing
    row = graded(fates).loc["scaling"]
    assert row["share_defined"] == pytest.approx(1 - 7 / asked.sum())
    assert row["num_latents"] == asked.sum() - 7


def test_only_alive_latents_with_a_value_count():
    fates = latents()
    truth = fates["fate"].map(AMOUNT)
    misleading = alone(fates, truth).assign(alive=fates["alive"])
    misleading.loc[~misleading["alive"], "scaling"] = 1 - truth
    assert graded(misleading).loc["scaling", "auc"] == 1.0
    unknown = alone(fates, truth.where(np.arange(len(truth)) % 3 > 0))
    fewer = graded(unknown).loc["scaling"]
    assert fewer["auc"] == 1.0
    assert fewer["num_latents"] < graded(alone(fates, truth)).loc["scaling", "num_latents"]


def test_a_measure_without_values_is_undefined_and_misses():
    row = graded(alone(latents(), np.nan)).loc["scaling"]
    assert row["num_latents"] == 0
    assert row["share_defined"] == 0
    for column in ("auc", "precision", "recall", "false_survival", "rate_rho", "rate_low"):
        assert math.isnan(row[column])
    assert not row["passed"]
    assert not row["follows_rate"]


def test_what_was_not_asked_has_no_row():
    found = grades(alone(latents(), 0.5).assign(subspace_cross_init=0.5), choice="independent")
    assert list(found["measure"]) == ["scaling", "subspace_cross_init"]
    assert list(found.columns) == list(meanings_of(COLUMNS))


# ---- marks ----


def flawless(fates):
    """Every measure says the truth, with a little noise of its own between equals."""
    truth = fates["fate"].map(AMOUNT) + np.random.default_rng(3).normal(0, 0.02, len(fates))
    where_it_fires = np.where(fates["fate"] == "rotated", 1.0, truth)
    changed = {"alive": True, "persistence": truth, "persistence_z": truth, "scaling": truth}
    for noise in NOISES:
        changed |= {f"persistence_noise_{noise}": 1.1, f"persistence_noise_{noise}_z": 0.0}
    changed["activation_correlation_cross_init"] = where_it_fires
    changed["activation_mutual_cross_init"] = 1.0
    return with_documents(fates[[name for name in fates if name in FACTS]].assign(**changed))


def with_rare_ones_destroyed(fates):
    """The same fates, dealt so that rare latents are mostly destroyed."""
    generator = np.random.default_rng(2)
    order = sorted(AMOUNT, key=AMOUNT.get)
    parts = []
    for _, part in fates.groupby("seed"):
        fate = sorted(part["fate"], key=order.index)
        part = part.assign(
            lot=part["firing_rate_first_half"] + generator.normal(0, 0.02, len(part))
        )
        part = part.sort_values("lot", kind="stable").drop(columns="lot")
        parts.append(part.assign(fate=fate, true_share=[AMOUNT[name] for name in fate]))
    return pd.concat(parts, ignore_index=True)


def test_marks_are_on_what_carries_conclusions_and_a_flawless_measure_reaches_them():
    even = flawless(latents(num_latents=200))
    rare = flawless(with_rare_ones_destroyed(latents(num_latents=200)))
    for fates, choice in ((even, "independent"), (rare, "by_rate")):
        found = graded(fates, choice)
        marked = found[found["mark"].notna()]
        assert set(marked.index) == {*SEPARATES, *FOLLOWS_RATE}
        assert marked["passed"].eq(True).all(), marked[["auc", "rate_low", "rate_high", "reason"]]
        assert marked["reason"].eq("").all()
        assert found.loc[found["mark"].isna(), "passed"].isna().all()


def test_a_mark_of_one_world_is_missed_in_the_other():
    """What follows the truth in either world is wrong about the other world."""
    even = flawless(latents(num_latents=200))
    rare = flawless(with_rare_ones_destroyed(latents(num_latents=200)))
    for fates, choice, word in ((even, "by_rate", "above 0"), (rare, "independent", "covers 0")):
        found = graded(fates, choice)
        for name in FOLLOWS_RATE:
            assert not found.loc[name, "passed"]
            assert word in found.loc[name, "reason"]
            assert "AUC" not in found.loc[name, "reason"]
        assert found["passed"].eq(True)["persistence"]


def leaking(fates, rho):
    """The truth with so much of firing rate in it that its rank correlation with it is off by rho.

    One seed; latents that never fire are not correlated.
    """
    rate = fates["firing_rate_first_half"].where(fates["firing_rate_first_half"] > 0)
    truth = fates["fate"].map(AMOUNT)
    aim = truth[rate.notna()].corr(rate, method="spearman") + rho
    noisy = truth + np.random.default_rng(3).normal(0, 0.1, len(fates))
    leaks = [noisy + weight * rate.rank(pct=True).fillna(0) for weight in np.linspace(-1, 3, 401)]
    return min(leaks, key=lambda v: abs(v[rate.notna()].corr(rate, method="spearman") - aim))


@pytest.mark.parametrize("choice", ["independent", "by_rate"])
def test_a_rank_correlation_far_from_the_truth_misses_whatever_its_interval(choice):
    """Few latents make wide intervals, and what leaks is above 0 as well."""
    fates = latents(num_latents=80, seeds=(0,))
    fates = with_rare_ones_destroyed(fates) if choice == "by_rate" else fates
    if choice == "by_rate":  # a third dealt at random: the truth is no staircase of rates
        mixed = fates.index[::3]
        fates.loc[mixed, "fate"] = np.random.default_rng(0).permutation(fates.loc[mixed, "fate"])
        fates["true_share"] = fates["fate"].map(AMOUNT)
    near = graded(alone(fates, leaking(fates, 0.0)), choice).loc["scaling"]
    far = graded(alone(fates, leaking(fates, 0.12)), choice).loc["scaling"]
    covers = far["rate_low"] <= 0 <= far["rate_high"]
    assert covers if choice == "independent" else far["rate_low"] > 0
    assert far["rate_rho"] - far["truth_rho"] > 0.1
    assert near["follows_rate"]
    assert near["passed"]
    assert not far["follows_rate"]
    assert not far["passed"]
    assert "within 0.1 of the truth's" in far["reason"]
    assert "within 0.1 of the truth's" in near["mark"]


def test_follows_rate_is_said_of_every_measure_marked_or_not():
    fates = latents(num_latents=200)
    truth = fates["fate"].map(AMOUNT)
    good = graded(alone(fates, truth).assign(subspace_cross_init=truth))
    assert list(good["follows_rate"]) == [True, True]
    leaks = alone(fates, truth).assign(subspace_cross_init=fates["firing_rate"])
    assert not graded(leaks).loc["subspace_cross_init", "follows_rate"]
    rare = with_rare_ones_destroyed(fates)
    truth = rare["fate"].map(AMOUNT)
    found = graded(alone(rare, truth).assign(subspace_cross_init=-truth), "by_rate")
    assert found.loc["scaling", "follows_rate"]
    assert not found.loc["subspace_cross_init", "follows_rate"]


@pytest.mark.parametrize("name", SEPARATES)
def test_a_measure_that_does_not_separate_misses_its_mark(name):
    fates = flawless(latents(num_latents=200))
    columns = {"activation_cross_init": "activation_correlation_cross_init"}
    columns["relative_shuffled"] = "persistence"
    column = columns.get(name, name)
    shuffled = np.random.default_rng(0).permutation(fates[column])
    row = graded(fates.assign(**{column: shuffled})).loc[name]
    assert row["auc"] < 0.6
    assert not row["passed"]
    assert row["reason"].startswith("misses: AUC")


# ---- where nothing is ----


def with_null(fates, *, leak=0.0, level=1.0, num_groups=10):
    """Correlations on the null that equal those under noise but for chance, or for what leaks in.

    `leak`: of the rank of firing rate; `level`: of what noise leaves, so many times.
    """
    generator = np.random.default_rng(4)
    noise = generator.uniform(0.5, 0.8, len(fates))
    rank = fates["firing_rate_first_half"].rank(pct=True).to_numpy() - 0.5
    columns = {}
    by_document = {"persistence_noise_isotropic": noise, "persistence_noise_shuffled": noise}
    by_document["persistence_null"] = level * noise + leak * rank
    by_document["persistence"] = 0.4 * noise + 0.2 * rank  # what pruning did
    for name, mean in by_document.items():
        parts = mean[:, None] + generator.normal(0, 0.05, (len(fates), num_groups))
        columns[name], sums = parts.mean(1), parts.sum(1, keepdims=True)
        columns[f"{name}_z"] = np.arctanh(columns[name])
        columns[f"{name}_without"] = list((sums - parts) / (num_groups - 1))
    draws = noise[:, None] + generator.normal(0, 0.05 / np.sqrt(num_groups), (len(fates), 5))
    columns["persistence_noise_shuffled_draws"] = list(draws)
    columns["scaling_null"] = generator.normal(1, 0.1, len(fates)) + leak * rank
    columns["scaling"] = 0.4 + rank
    return fates.assign(**columns)


def nothing_found(fates, choice="independent"):
    found = null_grades(fates, choice=choice)
    assert list(found.columns) == list(meanings_of(NULL_COLUMNS))
    return found.set_index(["source", "measure", "statistic"])


def many(seed=0):
    return latents(num_latents=200, seed=seed).assign(alive=True)


def test_where_nothing_is_nothing_is_found_and_all_that_decides_is_marked():
    found = nothing_found(with_null(many()))
    assert set(found.index.get_level_values("source")) == {"null"}  # pruning did something
    marked = found[found["mark"].notna()]
    decides = {(name, what) for name, several in DECIDES.items() for what in several}
    assert {(measure, what) for _, measure, what in marked.index} == decides
    assert marked["passed"].eq(True).all(), marked
    assert found.loc[("null", "relative_shuffled", "all"), "nothing"] == 1
    assert found.loc[("null", "relative_shuffled", WITH_RATE), "nothing"] == 0


def test_a_leak_of_firing_rate_is_found_on_the_null():
    found = nothing_found(with_null(many(), leak=0.3))
    rows = [("relative_shuffled", "Q1 - Q5"), ("scaling", WITH_RATE), ("beyond_noise", WITH_RATE)]
    for measure, statistic in rows:
        row = found.loc[("null", measure, statistic)]
        assert not row["passed"] and not row["says_nothing"]
        assert row["reason"].startswith("misses: nothing is found where nothing is")
    assert found.loc[("null", "relative_shuffled", "Q1 - Q5"), "high"] < 0
    assert found.loc[("null", "scaling", WITH_RATE), "low"] > 0


def test_harm_that_noise_does_not_do_is_found_on_the_null_whatever_the_rate():
    found = nothing_found(with_null(many(), level=0.9))
    assert found.loc[("null", "relative_shuffled", "all"), "value"] == pytest.approx(0.9, abs=0.01)
    assert not found.loc[("null", "relative_shuffled", "all"), "passed"]
    assert found.loc[("null", "relative_shuffled", "Q1 - Q5"), "passed"]


def test_where_nothing_happened_the_pruned_activations_are_asked_as_well():
    found = nothing_found(with_null(many()), choice="none")
    assert set(found.index.get_level_values("source")) == {"pruned", "null"}
    assert not found.loc[("pruned", "relative_shuffled", "all"), "passed"]
    assert not found.loc[("pruned", "scaling", WITH_RATE), "passed"]
    null = found.xs("null")
    assert null.loc[null["mark"].notna(), "passed"].eq(True).all()


# ---- intervals and verdicts by simulation ----


def drawn_at(error):
    """Numbers around 0.7 that scatter by 1, each with an interval that says `error`."""

    def draw(generator):
        return Estimate(generator.normal(0.7, 1.0), error, math.inf, "nothing"), 0.7

    return draw


def test_an_interval_that_is_too_narrow_or_too_wide_is_reported(monkeypatch):
    kinds = {"right": 1.0, "narrow": 0.5, "wide": 3.0}
    monkeypatch.setattr(simulated, "SYNTHETIC", {name: drawn_at(e) for name, e in kinds.items()})
    found = simulated.coverage("synthetic", 400)
    assert list(found.columns) == list(meanings_of(simulated.COLUMNS))
    found = found.set_index("name")
    assert list(found["passed"]) == [True, False, False]
    assert list(found["measured"]) == pytest.approx([0.95, 0.673, 1.0], abs=0.03)
    assert found.loc["narrow", "reason"] == "misses: holds the truth in 92% to 98%"
    again = simulated.coverage("synthetic", 400).set_index("name")
    pd.testing.assert_frame_equal(found, again)


def test_the_share_of_intervals_that_hold_the_truth_is_counted(monkeypatch):
    """Also without the sets that have none; against counting by hand."""
    held = [Estimate(value, 1.0, math.inf, "") for value in (0.0, 1.9, -1.9, 2.1, -5.0)]
    sets = iter([*held, Estimate(0.0, math.nan, math.nan, "")])
    monkeypatch.setattr(simulated, "SYNTHETIC", {"some": lambda _: (next(sets), 0.0)})
    row = simulated.coverage("synthetic", 6).iloc[0]
    assert (row["measured"], row["num_sets"], row["num_undefined"]) == (3 / 5, 6, 1)
    assert (row["low"], row["high"]) == pytest.approx(slow.share_between(3, 5))


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 40), (190, 200), (1, 1)])
def test_the_bounds_of_a_share_are_clopper_and_pearson_s(hits, count):
    found = simulated.share_between(hits, count)
    assert found == pytest.approx(slow.share_between(hits, count), abs=1e-6)


@pytest.fixture
def one_set(small_set, monkeypatch):
    """One simulated set, again and again: what is asked here is what becomes of its numbers."""
    conditions, contrasts = small_set
    known = {id(fates): contrasts[name] for name, fates in conditions.items()}
    monkeypatch.setattr(simulated, "fragility_contrasts", lambda fates: known[id(fates)])
    monkeypatch.setattr(simulated, "simulated_fates", lambda _, some: [conditions] * len(some))


@pytest.fixture(scope="module")
def small_set():
    fates = next(simulated.simulated_fates("none", [3]))["wanda"]
    conditions = {"wanda": fates, "magnitude": fates}
    return conditions, dict.fromkeys(conditions, simulated.fragility_contrasts(fates))


@pytest.mark.parametrize(("world", "wrong"), [("none", (1, 2, 6, 8)), ("by_rate", (1, 2, 8))])
@pytest.mark.usefixtures("one_set")
def test_a_verdict_that_is_always_reached_is_reported(monkeypatch, world, wrong):
    monkeypatch.setattr(simulated, "verdicts_of", lambda _: ["holds"])
    monkeypatch.setattr(simulated, "PREDICTED", 1000)
    monkeypatch.setitem(simulated.TRUTHS, "by_rate", (5.0,) * 8)
    found = simulated.coverage(world, 2).set_index("name")
    verdicts = found[found["kind"] == "verdict"]
    reached = verdicts.index[verdicts["passed"].eq(False)]
    assert list(reached) == [f"claim {claim} holds" for claim in wrong]
    assert (verdicts.loc[reached, "measured"] == 1).all()
    fails = [name for name in verdicts.index if name.endswith("fails")]
    assert (verdicts.loc[fails, "measured"] == 0).all()
    intervals = found[(found["kind"] == "interval") & ~found.index.str.endswith("(null)")]
    if world == "by_rate":  # far from what was said to be the truth
        assert (intervals["measured"] == 0).all()


# ---- SAEs that hardly learnt ----


def matches_by_step(survived_at):
    """step -> share of the destroyed latents that the shared start calls survived."""
    rows = []
    for step, share in survived_at.items():
        for number in range(20):
            cosine = 0.95 if number < 20 * share else 0.2
            rows.append({"step": step, "cosine": cosine, "mutual": True, "fate": "removed"})
        rows.append({"step": step, "cosine": 0.99, "mutual": True, "fate": "kept"})
    return pd.DataFrame(rows)


def test_false_survival_by_step_and_its_mark_on_the_first():
    found = undertrained_grades(matches_by_step({600: 0.1, 5: 0.9, 300: 0.25}))
    assert list(found["step"]) == [5, 300, 600]
    assert list(found["false_survival"]) == [0.9, 0.25, 0.1]
    assert list(found["passed"].fillna("")) == [True, "", ""]
    assert list(found.columns) == list(meanings_of(COLUMNS))
    assert (found["num_latents"] == 21).all()
    assert list(found["reason"].fillna("none")) == ["", "none", "none"]
    honest = undertrained_grades(matches_by_step({5: 0.4, 300: 0.1}))
    assert not honest["passed"].iloc[0]
    assert honest["reason"].iloc[0] == "misses: false survival of hardly trained SAEs >= 0.5"


def test_early_matches_must_be_mutual_and_above_tau():
    matches = matches_by_step({5: 1.0, 300: 0.0})
    one_way = undertrained_grades(matches.assign(mutual=False))
    assert (one_way["false_survival"] == 0).all()
    at_tau = undertrained_grades(matches.assign(cosine=0.7))
    assert (at_tau["false_survival"] == 1).all()


def test_a_single_step_says_nothing_about_early_training():
    assert len(undertrained_grades(matches_by_step({600: 0.1}))) == 0


# ---- the truth of a latent ----


@pytest.fixture(scope="module", params=("independent", "by_rate"))
def worlds(request):
    before = planted.dense_world()
    return before, *planted.pruned_world(before, request.param)


@pytest.fixture(scope="module")
def sigma():
    return torch.rand(planted.D_MODEL, generator=torch.Generator().manual_seed(0)) + 0.5


def test_a_decoder_of_the_planted_directions_gets_their_truth(worlds, sigma):
    before, after, truth = worlds
    found = latent_truth(before.directions[:, 0] / sigma, sigma, *worlds)
    assert list(found["direction"]) == list(range(256)) == list(found["latent"])
    assert list(found["fate"]) == truth.fates
    np.testing.assert_allclose(found["recovered"], 1.0, atol=1e-5)
    clear = found["fate"].isin(["kept", "rescaled", "weakened", "turned", "rotated"])
    assert found.loc[~clear, "true_cosine"].isna().all()
    for index in found.index[clear][:40]:
        pair = [(world.directions[index, 0] / sigma).tolist() for world in (before, after)]
        cosine = slow.angle_cosine(*pair)
        assert found.loc[index, "true_cosine"] == pytest.approx(cosine, abs=1e-5)
        later = [part * gain for part, gain in zip(pair[1], after.gains.tolist(), strict=True)]
        scale = slow.part_along(later, pair[0]) * float(after.scales[index])
        assert found.loc[index, "true_scale"] == pytest.approx(scale, abs=1e-5)
    assert (found.loc[found["fate"] == "removed", "true_scale"] == 0).all()
    assert found.loc[found["fate"].isin(["split", "merged"]), "true_scale"].isna().all()


def test_in_raw_space_the_planted_angle_is_the_true_cosine(worlds):
    """Without gains, the true scale is its cosine times the direction's own factor."""
    before, after, truth = worlds
    after = after._replace(gains=torch.ones(64))
    found = latent_truth(before.directions[:, 0], torch.ones(64), before, after, truth)
    angles = truth.angles[~truth.angles.isnan()]
    expected = torch.cos(torch.deg2rad(angles)).numpy()
    np.testing.assert_allclose(found["true_cosine"].dropna(), expected, atol=1e-5)
    clear = found["true_cosine"].notna()
    factors = after.scales.numpy()[clear]
    np.testing.assert_allclose(found.loc[clear, "true_scale"], expected * factors, atol=1e-5)
    np.testing.assert_allclose(found["true_share"], truth.shares, atol=1e-6)


def test_the_true_scale_is_what_a_regression_on_the_old_direction_finds(worlds, sigma):
    """Activations along one direction, before and after, in normalised coordinates."""
    before, after, truth = worlds
    decoder = 3.0 * before.directions[:, 0] / sigma
    found = latent_truth(decoder, sigma, *worlds)
    strength = torch.rand(200, generator=torch.Generator().manual_seed(4)) + 0.1
    for fate in ("kept", "rescaled", "weakened", "turned", "rotated", "removed"):
        index = truth.fates.index(fate)
        rows = strength[:, None] * after.scales[index] * after.directions[index, 0]
        rows = rows * after.gains / sigma
        latent = strength / 3.0  # times the decoder row, it is the earlier activation
        row = decoder[index]
        projected = (rows @ row) / (row @ row)
        slope = float((latent @ projected) / (latent @ latent))
        assert found.loc[index, "true_scale"] == pytest.approx(slope, abs=1e-5), fate


def test_the_order_and_the_length_of_decoder_rows_do_not_matter(worlds, sigma):
    rows = worlds[0].directions[:, 0] / sigma
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(256, 1, generator=torch.Generator().manual_seed(2)) * 10 + 0.1
    plain = latent_truth(rows, sigma, *worlds)
    found = latent_truth(lengths * rows[order], sigma, *worlds)
    expected = plain.iloc[order.numpy()].reset_index(drop=True).assign(latent=range(256))
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)


def test_any_decoder_row_is_given_its_nearest_direction(worlds, sigma):
    generator = torch.Generator().manual_seed(3)
    decoder = torch.randn(12, planted.D_MODEL, generator=generator)
    decoder[0] = -worlds[0].directions[7, 0] / sigma  # the opposite is not the direction
    found = latent_truth(decoder, sigma, *worlds)
    directions = worlds[0].directions[:, 0].tolist()
    for row, (latent, decoder_row) in zip(found.itertuples(), enumerate(decoder), strict=True):
        nearest, cosine = slow.nearest_direction(decoder_row.tolist(), directions, sigma.tolist())
        assert (row.latent, row.direction) == (latent, nearest)
        assert row.recovered == pytest.approx(cosine, abs=1e-5)
    assert found["direction"].iloc[0] != 7
