"""The eleven claims: judged by intervals, on tables where the answer is known."""

import numpy as np
import pandas as pd
import pytest

from prunelens.analyses.claims import CLAIMS, COLUMNS, judge_claims, verdict_of
from prunelens.analyses.contrast import Contrast
from prunelens.analyses.statistics import interval_over_windows, jackknife_over_seeds

SEEDS = (0, 1, 2)
CAUSAL_KEY = ("ablated_in", "grouping", "group", "protocol", "contexts")
CONDITIONS = [("magnitude", 0.3), ("magnitude", 0.5), ("wanda", 0.3), ("wanda", 0.5)]


def run_columns(method, sparsity):
    label = f"{method}-{sparsity:.2f}" if method != "dense" else "dense"
    scope = {"magnitude": "global", "wanda": "row"}.get(method, "")
    return {
        "run": f"m/L1/{label}", "model": "m", "layer": 1, "method": method, "scope": scope,
        "sparsity": sparsity,
    }  # fmt: skip


def contrast(low, high, side="above", limit=0.0):
    return Contrast("c", (low + high) / 2, low, high, side, limit, "seeds")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (contrast(0.1, 0.2), "holds"),
        (contrast(-0.2, -0.1), "fails"),
        (contrast(-0.1, 0.1), "undecided"),
        (contrast(0.0, 0.1), "undecided"),
        (contrast(-0.2, -0.1, "below"), "holds"),
        (contrast(0.1, 0.2, "below"), "fails"),
        (contrast(-0.1, 0.1, "within", 0.2), "holds"),
        (contrast(0.1, 0.3, "within", 0.2), "undecided"),
        (contrast(0.3, 0.4, "within", 0.2), "fails"),
        (contrast(-0.4, -0.3, "within", 0.2), "fails"),
        (contrast(float("nan"), float("nan")), "undecided"),
        (contrast(float("nan"), float("nan"), "within", float("nan")), "undecided"),
    ],
)
def test_a_contrast_is_decided_by_the_side_its_interval_is_on(given, expected):
    assert verdict_of(given) == expected


def test_nothing_measured_is_undecided_and_says_so():
    table = judge_claims({})
    assert list(table.columns) == COLUMNS
    assert list(table["claim"]) == list(range(1, 12)) == list(CLAIMS)
    for column in ("paper_protocol", "controlled", "verdict"):
        assert set(table[column]) == {"undecided"}
    assert table["why"].str.contains("not measured").all()


def fragility(slope, measure, tau):
    """Survival by quintile that changes by `slope` from Q1 to Q5, with a little noise per seed."""
    rows = []
    generator = np.random.default_rng(0)
    for method, sparsity in CONDITIONS:
        for seed in SEEDS:
            for quintile in range(1, 6):
                rate = 0.6 + slope * (quintile - 3) / 4 + 0.01 * generator.standard_normal()
                rows.append(
                    run_columns(method, sparsity)
                    | {"measure": measure, "tau": tau, "seed": seed, "quintile": quintile}
                    | {"survival_rate": rate, "firing_rate": quintile / 100}
                )
    return pd.DataFrame(rows)


def verdicts(tables, number):
    row = judge_claims(tables).set_index("claim").loc[number]
    return row["paper_protocol"], row["controlled"], row["verdict"]


def test_rare_latents_can_survive_as_published_and_not_beyond_noise():
    paper = fragility(-0.3, "shared_init", 0.7)
    controlled = fragility(+0.3, "relative_shuffled", np.nan)
    tables = {"fragility_by_seed": pd.concat([paper, controlled])}
    assert verdicts(tables, 1) == ("holds", "fails", "fails")
    assert verdicts({"fragility_by_seed": paper}, 1) == ("holds", "undecided", "undecided")
    nothing = fragility(0.0, "shared_init", 0.7)
    assert verdicts({"fragility_by_seed": nothing}, 1)[0] == "undecided"
    value = judge_claims(tables).set_index("claim").loc[1, "paper_contrasts"]
    difference = paper.pivot_table(
        index=["run", "seed"], columns="quintile", values="survival_rate"
    )
    assert f"{(difference[1] - difference[5]).mean():.4g}" in value


def test_another_tau_does_not_enter():
    paper = pd.concat([fragility(-0.3, "shared_init", 0.7), fragility(+0.9, "shared_init", 0.5)])
    assert verdicts({"fragility_by_seed": paper}, 1)[0] == "holds"


def survival(rates, arm="shared_init"):
    """{(method, sparsity): mean MNN} -> rows of survival.csv with spread over seeds."""
    return pd.DataFrame(
        [
            run_columns(*condition)
            | {"arm": arm, "coordinates": "normalised", "tau": 0.7, "init_a": s, "init_b": s}
            | {"mnn": rate + 0.001 * s}
            for condition, rate in rates.items()
            for s in SEEDS
        ]
    )


def test_wanda_against_magnitude_compares_equal_sparsities_only():
    better = {("magnitude", 0.3): 0.5, ("wanda", 0.3): 0.7, ("wanda", 0.6): 0.1}
    assert verdicts({"survival": survival(better)}, 2)[0] == "holds"
    worse = {("magnitude", 0.3): 0.7, ("wanda", 0.3): 0.5, ("wanda", 0.6): 0.99}
    assert verdicts({"survival": survival(worse)}, 2)[0] == "fails"
    alone = judge_claims({"survival": survival({("wanda", 0.3): 0.5})}).set_index("claim").loc[2]
    assert alone["paper_protocol"] == "undecided"
    assert "both Wanda and magnitude" in alone["why"]


def windows(gaps):
    """Per sparsity, nats per token of Wanda minus magnitude on 40 paired windows."""
    rows = []
    generator = np.random.default_rng(1)
    for sparsity, gap in gaps.items():
        hard = generator.normal(3, 1, 40)  # windows differ much more than the two models do
        for method, shift in (("magnitude", 0.0), ("wanda", gap)):
            noise = 0.02 * generator.standard_normal(40)
            part = pd.DataFrame({"window": range(40), "nll": hard + shift + noise})
            rows.append(part.assign(**run_columns(method, sparsity), context_tokens=256))
    return pd.concat(rows)


def test_perplexity_is_compared_window_by_window_and_everywhere():
    assert verdicts({"perplexity_windows": windows({0.3: -0.1, 0.5: -0.2})}, 3)[0] == "holds"
    mixed = windows({0.3: +0.1, 0.5: -0.2})
    assert verdicts({"perplexity_windows": mixed}, 3)[0] == "fails"
    unclear = windows({0.3: 0.0005, 0.5: -0.2})
    assert verdicts({"perplexity_windows": unclear}, 3)[0] == "undecided"


def transfer(fvu, ratio, ce_drop):
    rows = []
    for s in SEEDS:
        common = {"sae": f"seed {s}", "refit": "none"}
        for positions in ("all", "norm_filtered"):
            dense = {"fvu": 0.01, "fvu_dense_var": 0.1, "ce_recovered": 0.95}
            rows.append(run_columns("dense", 0.0) | common | {"positions": positions} | dense)
            pruned = {"fvu": fvu + s / 1e4, "fvu_dense_var": 0.1 * ratio + s / 1e4}
            pruned["ce_recovered"] = 0.95 - ce_drop - s / 1e4
            rows.append(run_columns("wanda", 0.5) | common | {"positions": positions} | pruned)
    return {"transfer": pd.DataFrame(rows)}


def test_a_small_fvu_is_not_yet_usable():
    assert verdicts(transfer(0.02, 1.1, 0.0), 4) == ("holds", "holds", "holds")
    assert verdicts(transfer(0.02, 1.5, 0.0), 4) == ("holds", "fails", "fails")
    assert verdicts(transfer(0.02, 1.1, 0.1), 4) == ("holds", "fails", "fails")
    assert verdicts(transfer(0.3, 1.1, 0.0), 4) == ("fails", "holds", "holds")


def causal(rows):
    return {
        "causal": pd.DataFrame(
            [
                run_columns("wanda", 0.3)
                | dict(
                    zip(
                        ("ablated_in", "grouping", "group", "protocol", "contexts"),
                        key,
                        strict=True,
                    )
                )
                | dict(zip(("kl_mean", "ci_low", "ci_high"), numbers, strict=True))
                for key, numbers in rows.items()
            ]
        )
    }


def test_equivalence_is_measured_against_the_isolated_effect():
    both = ("cosine", "robust_and_fragile", "isolated", "final")
    gap = ("cosine", "robust_minus_fragile", "paper", "final")
    scale = {("dense", *both): (0.01, 0.009, 0.011), ("pruned", *both): (0.01, 0.009, 0.011)}
    within = {("dense", *gap): (0.0, -9e-4, 9e-4), ("pruned", *gap): (0.0, -9e-4, 9e-4)}
    assert verdicts(causal(scale | within), 5)[0] == "holds"
    wide = {("dense", *gap): (0.0, -0.01, 0.01), ("pruned", *gap): (0.0, -9e-4, 9e-4)}
    assert verdicts(causal(scale | wide), 5)[0] == "undecided"
    apart = {("dense", *gap): (0.02, 0.01, 0.03), ("pruned", *gap): (0.0, -9e-4, 9e-4)}
    assert verdicts(causal(scale | apart), 5)[0] == "fails"


def test_ablations_after_pruning():
    key = ("pruned_minus_dense", "cosine", "robust_and_fragile")
    weaker = {(*key, "paper", "final"): (-0.2, -0.3, -0.1)}
    stronger = {(*key, "isolated", "firing"): (0.2, 0.1, 0.3)}
    assert verdicts(causal(weaker | stronger), 9) == ("holds", "fails", "fails")


def quality(fvu, fvu_dense_var, ratio):
    rows = []
    for number, condition in enumerate([("dense", 0.0), *CONDITIONS]):
        for s in SEEDS:
            factors = (1, 1, 1) if number == 0 else (fvu, fvu_dense_var, ratio)
            values = [0.3 * factors[0], 0.3 * factors[1], 20 * factors[2]]
            values = [v * (1 + 0.001 * (s + number)) for v in values]
            rows.append(
                run_columns(*condition)
                | {"seed": s}
                | dict(zip(("fvu", "fvu_dense_var", "participation_ratio"), values, strict=True))
            )
    return {"sae_quality": pd.DataFrame(rows)}


def test_a_falling_fvu_needs_simpler_activations():
    assert verdicts(quality(0.8, 0.8, 0.8), 10) == ("holds", "holds", "holds")
    assert verdicts(quality(0.8, 1.2, 0.8), 10) == ("holds", "fails", "fails")
    assert verdicts(quality(0.8, 0.8, 1.2), 10) == ("holds", "fails", "fails")


def test_the_seed_floor_and_the_floor_of_the_same_start():
    stability = pd.DataFrame(
        [run_columns("dense", 0.0) | {"tau": 0.7, "seed_a": 0, "seed_b": 1, "mnn": 0.02}]
    )
    floor = survival({("dense", 0.0): 0.4}, arm="floor_shared")
    rates = dict.fromkeys(CONDITIONS, 0.8)
    table = pd.concat([survival(rates), survival(rates, "shared_start"), floor])
    tables = {"stability": stability, "survival": table}
    assert verdicts(tables, 11) == ("holds", "fails", "fails")
    assert verdicts({**tables, "survival": survival({("wanda", 0.3): 0.2})}, 11)[0] == "fails"


def test_seeds_disagree_in_features_and_agree_in_the_pattern():
    pairs = [(0, 1), (0, 2), (1, 2)]
    stability = pd.DataFrame(
        [
            run_columns("dense", 0.0)
            | {"tau": 0.7, "seed_a": a, "seed_b": b, "mnn": 0.02 + a / 1000}
            for a, b in pairs
        ]
    )
    tables = {"stability": stability, "fragility_by_seed": fragility(-0.3, "shared_init", 0.7)}
    assert verdicts(tables, 6)[0] == "holds"
    tables["stability"] = stability.assign(mnn=stability["mnn"] + 0.9)
    assert verdicts(tables, 6)[0] == "fails"


def test_rare_quintiles_near_half_are_judged_one_by_one():
    assert verdicts({"fragility_by_seed": fragility(-0.1, "shared_init", 0.7)}, 8)[0] == "holds"
    assert verdicts({"fragility_by_seed": fragility(+0.8, "shared_init", 0.7)}, 8)[0] == "fails"


def test_predictor_uses_its_own_interval():
    row = {
        "run": "all", "target": "persistence", "tau": np.nan, "evaluation": "held_out_condition",
        "features": "rate_sparsity", "auc_within": 0.7, "auc_within_low": 0.6,
        "auc_within_high": 0.8, "reason": "",
    }  # fmt: skip
    assert verdicts({"predictor": pd.DataFrame([row])}, 7)[1:] == ("holds", "holds")
    nothing = row | {"auc_within": np.nan, "auc_within_low": np.nan, "reason": "one class"}
    table = judge_claims({"predictor": pd.DataFrame([nothing])}).set_index("claim")
    assert table.loc[7, "controlled"] == "undecided"
    assert "one class" in table.loc[7, "why"]


def test_one_value_per_seed_gives_the_t_interval_of_a_mean():
    from scipy import stats

    values = [1.0, 2.5, 2.0, 4.0]
    rows = pd.DataFrame({"value": values, "condition": "a", "seeds": [(s,) for s in range(4)]})
    found = jackknife_over_seeds(rows)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found[:3] == pytest.approx((np.mean(values), low, high))


def test_conditions_count_alike_whatever_their_seeds():
    rows = pd.DataFrame(
        {
            "value": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0],
            "condition": [*"aaaabb"],
            "seeds": [(0,), (1,), (2,), (3,), (0,), (1,)],
        }
    )
    assert jackknife_over_seeds(rows).mean == 0.5


def coverage(make, truth, repeats=400):
    generator = np.random.default_rng(11)
    found = [jackknife_over_seeds(make(generator)) for _ in range(repeats)]
    return np.mean([one.low <= truth <= one.high for one in found])


def test_the_interval_covers_with_three_seeds_in_two_conditions():
    """Seeds shift both conditions alike, so values are not independent."""

    def make(generator):
        shift = generator.normal(size=3)
        return pd.DataFrame(
            [
                {"value": c + shift[s] + 0.3 * generator.normal(), "condition": c, "seeds": (s,)}
                for c in (0.0, 2.0)
                for s in range(3)
            ]
        )

    assert 0.92 <= coverage(make, 1.0) <= 0.98


def test_the_interval_covers_with_pairs_of_seeds():
    def make(generator):
        shift = generator.normal(size=5)
        return pd.DataFrame(
            [
                {"value": (shift[a] + shift[b]) / 2, "condition": 0, "seeds": (a, b)}
                for a in range(5)
                for b in range(a)
            ]
        )

    assert 0.92 <= coverage(make, 0.0) <= 0.98


def test_too_few_seeds_have_no_interval():
    one = pd.DataFrame({"value": [1.0, 2.0], "condition": [*"ab"], "seeds": [(0,), (0,)]})
    found = jackknife_over_seeds(one)
    assert found.mean == 1.5
    assert np.isnan(found.low)
    assert "too few" in found.resampled
    pair = pd.DataFrame({"value": [1.0], "condition": "a", "seeds": [(0, 1)]})
    assert np.isnan(jackknife_over_seeds(pair).low)
    assert np.isnan(jackknife_over_seeds(one.assign(value=np.nan)).mean)


def test_an_interval_over_windows_agrees_with_its_formula():
    values = np.random.default_rng(3).normal(size=200)
    low, high = interval_over_windows(values, draws=20_000)
    half = 1.96 * values.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert np.isnan(interval_over_windows(values[:4])[0])


def test_a_quintile_without_any_value_is_undecided_not_an_error():
    table = fragility(-0.3, "relative_shuffled", np.nan)
    verdict = verdicts({"fragility_by_seed": table[table["quintile"] > 1]}, 1)
    assert verdict[1] == "undecided"


def test_survival_of_zero_counts_against_claim_11():
    floor = survival({("dense", 0.0): 0.02}, arm="floor_shared")
    rates = survival({("wanda", 0.3): 0.9, ("magnitude", 0.3): 0.9}, "shared_start")
    assert verdicts({"survival": pd.concat([rates, floor])}, 11)[1] == "holds"
    rates.loc[rates.index[:2], "mnn"] = 0.0
    assert verdicts({"survival": pd.concat([rates, floor])}, 11)[1] == "undecided"


def test_every_model_has_its_own_longest_window():
    long = windows({0.3: -0.1}).assign(context_tokens=2048, model="large")
    short = windows({0.3: +0.1}).assign(context_tokens=512, model="small")
    found = judge_claims({"perplexity_windows": pd.concat([long, short])}).set_index("claim")
    assert "large" in found.loc[3, "controlled_contrasts"]
    assert "small" in found.loc[3, "controlled_contrasts"]
    assert found.loc[3, "controlled"] == "fails"


def test_another_form_of_a_method_does_not_enter():
    table = survival({("magnitude", 0.3): 0.5, ("wanda", 0.3): 0.7})
    table["run"] = table["run"].str.replace("magnitude-", "magnitude-global-")
    table["run"] = table["run"].str.replace("wanda-", "wanda-row-")
    sequential = table[table["method"] == "wanda"].assign(mnn=0.0)
    sequential["run"] += "-sequential"
    assert verdicts({"survival": pd.concat([table, sequential])}, 2)[0] == "holds"
