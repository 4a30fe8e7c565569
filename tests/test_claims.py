"""The eleven claims: judged by intervals, on tables where the answer is known."""

import numpy as np
import pandas as pd
import pytest

from prunelens.analyses.claims import CLAIMS, COLUMNS, judge_claims, verdict_of
from prunelens.analyses.contrast import Contrast
from prunelens.analyses.statistics import interval_over_conditions_and_seeds

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
    controlled = fragility(+0.3, "excess_isotropic", np.nan)
    tables = {"fragility_by_seed": pd.concat([paper, controlled])}
    assert verdicts(tables, 1) == ("holds", "fails", "fails")
    assert verdicts({"fragility_by_seed": paper}, 1) == ("holds", "undecided", "undecided")
    nothing = fragility(0.0, "shared_init", 0.7)
    assert verdicts({"fragility_by_seed": nothing}, 1)[0] in ("undecided", "holds", "fails")
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


def test_the_crossed_bootstrap_agrees_with_explicit_resampling():
    generator = np.random.default_rng(5)
    grid = generator.normal(size=(9, 7)) + generator.normal(size=(9, 1))
    conditions, seeds = np.divmod(np.arange(63), 7)
    found = interval_over_conditions_and_seeds(
        pd.DataFrame({"value": grid.ravel(), "condition": conditions, "seed": seeds}), draws=4000
    )
    slow = []
    for _ in range(4000):
        rows, columns = generator.integers(0, 9, 9), generator.integers(0, 7, 7)
        slow.append(grid[np.ix_(rows, columns)].mean())
    assert found.mean == pytest.approx(grid.mean())
    assert found.low == pytest.approx(np.percentile(slow, 2.5), abs=0.05)
    assert found.high == pytest.approx(np.percentile(slow, 97.5), abs=0.05)
    assert found.resampled == "conditions and seeds"


def test_too_few_values_have_no_interval():
    two = pd.DataFrame({"value": [1.0, 2.0], "condition": ["a", "b"], "seed": 0})
    found = interval_over_conditions_and_seeds(two)
    assert found.mean == 1.5
    assert np.isnan(found.low)
    assert "too few" in found.resampled
    empty = interval_over_conditions_and_seeds(two.assign(value=np.nan))
    assert np.isnan(empty.mean)
