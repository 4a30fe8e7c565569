"""The eleven claims: judged by intervals, on tables where the answer is known."""

import numpy as np
import pandas as pd
import pytest

from prunelens.analyses.claims import CLAIMS, COLUMNS, judge_claims, verdicts_of
from prunelens.analyses.contrast import Contrast
from prunelens.analyses.statistics import (
    Estimate,
    interval_over_windows,
    jackknife_over_seeds,
    jackknifed,
    t_quantile,
)
from prunelens.columns import meanings_of

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


NAN = float("nan")
GROUPS = 20  # of documents


def estimate(low, high, df=19.0):
    """One whose 95 % interval is that, and which no single document moves."""
    middle = (low + high) / 2
    return Estimate(middle, (high - low) / 2 / t_quantile(df), df, "documents", middle, middle)


def contrast(low, high, side="above", limit=0.0, **null):
    return Contrast("c", estimate(low, high), side, limit, **null)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (contrast(0.1, 0.2), "holds"),
        (contrast(-0.2, -0.1), "fails"),
        (contrast(-0.1, 0.1), "undecided"),
        (contrast(-0.001, 0.1), "undecided"),
        (contrast(-0.2, -0.1, "below"), "holds"),
        (contrast(0.1, 0.2, "below"), "fails"),
        (contrast(-0.1, 0.1, "within", 0.2), "holds"),
        (contrast(0.1, 0.3, "within", 0.2), "undecided"),
        (contrast(0.3, 0.4, "within", 0.2), "fails"),
        (contrast(-0.4, -0.3, "within", 0.2), "fails"),
        (contrast(NAN, NAN), "undecided"),
        (contrast(NAN, NAN, "within", NAN), "undecided"),
    ],
)
def test_a_contrast_is_decided_by_the_side_its_interval_is_on(given, expected):
    assert verdicts_of([given]) == [expected]


def test_several_contrasts_are_adjusted_in_both_directions():
    barely = contrast(0.0001, 0.2)  # by itself just beyond its limit
    assert verdicts_of([barely]) == ["holds"]
    assert verdicts_of([barely] * 4) == ["undecided"] * 4
    turned = contrast(-0.2, -0.0001)
    assert verdicts_of([turned]) == ["fails"]
    assert verdicts_of([turned, *[contrast(-0.1, 0.1)] * 3])[0] == "undecided"
    clear = contrast(0.5, 0.6)
    assert verdicts_of([clear] * 4) == ["holds"] * 4
    assert verdicts_of([clear, clear, contrast(-0.6, -0.5)]) == ["holds", "holds", "fails"]


def test_what_speaks_on_the_null_decides_nothing():
    spoken = contrast(0.5, 0.6, null=estimate(0.1, 0.2))
    assert spoken.speaks_on_null
    assert verdicts_of([spoken]) == ["undecided"]
    silent = contrast(0.5, 0.6, null=estimate(-0.1, 0.2))
    assert verdicts_of([silent]) == ["holds"]
    unknown = contrast(0.5, 0.6, null=estimate(NAN, NAN))
    assert verdicts_of([unknown]) == ["undecided"]
    of_ratio = contrast(1.5, 1.6, limit=1.0, null=estimate(0.9, 1.1), nothing=1.0)
    assert verdicts_of([of_ratio]) == ["holds"]


def test_a_level_that_noise_misses_too_is_not_missed_by_pruning():
    missed = {"limit": 0.7, "nothing": None}
    assert verdicts_of([contrast(0.3, 0.4, null=estimate(0.35, 0.45), **missed)]) == ["undecided"]
    assert verdicts_of([contrast(0.3, 0.4, null=estimate(0.75, 0.85), **missed)]) == ["fails"]
    assert verdicts_of([contrast(0.8, 0.9, null=estimate(0.75, 0.85), **missed)]) == ["holds"]


def test_a_verdict_that_hangs_on_one_document_is_none():
    steady = estimate(0.1, 0.3)
    assert verdicts_of([Contrast("c", steady, "above", 0.0)]) == ["holds"]
    hangs = steady._replace(least=0.05)  # without one document the interval reaches the limit
    assert verdicts_of([Contrast("c", hangs, "above", 0.0)]) == ["undecided"]
    turned = estimate(-0.3, -0.1)._replace(most=-0.05)
    assert verdicts_of([Contrast("c", turned, "above", 0.0)]) == ["undecided"]


def test_a_verdict_and_its_interval_agree():
    draws = np.random.default_rng(5).normal(size=(200, 2))
    for low, width in draws:
        found = estimate(low, low + abs(width) + 0.01)
        inside = found.low > 0 or found.high < 0
        assert (verdicts_of([Contrast("c", found, "above", 0.0)]) != ["undecided"]) == inside


def test_nothing_measured_is_undecided_and_says_so():
    table = judge_claims({})
    assert list(table.columns) == list(meanings_of(COLUMNS))
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
                    | {"source": "pruned"}
                    | {"survival_rate": rate, "firing_rate": quintile / 100}
                )
    return pd.DataFrame(rows)


def beyond_noise(value, group, measure="relative_shuffled", null=None, error=0.01):
    """fragility_contrasts of every condition: a value that 20 documents agree on but for an error,
    and the same on the null."""
    rows = []
    generator = np.random.default_rng(0)
    nothing = 0.0 if " - " in group else 1.0 if measure.startswith("relative") else value
    for method, sparsity in CONDITIONS:
        for source, middle in (("pruned", value), ("null", nothing if null is None else null)):
            steps = generator.normal(0, error, GROUPS)
            steps -= steps.mean()
            found = jackknifed(middle, middle + steps / GROUPS**0.5, "documents")
            rows.append(
                run_columns(method, sparsity)
                | {"measure": measure, "source": source, "group": group, "value": middle}
                | {name: getattr(found, name) for name in ("error", "df", "least", "most")}
                | {"low": found.low, "high": found.high, "resampled": "documents", "beyond": 0.0}
                | {"without": middle + steps / GROUPS**0.5, "by_seed": np.zeros(GROUPS)}
            )
    return pd.DataFrame(rows)


def verdicts(tables, number):
    row = judge_claims(tables).set_index("claim").loc[number]
    return row["paper_protocol"], row["controlled"], row["verdict"]


def test_rare_latents_can_survive_as_published_and_not_beyond_noise():
    paper = fragility(-0.3, "shared_init", 0.7)
    controlled = beyond_noise(-0.3, "Q1 - Q5")
    tables = {"fragility_by_seed": paper, "fragility_contrasts": controlled}
    assert verdicts(tables, 1) == ("holds", "fails", "fails")
    assert verdicts({"fragility_by_seed": paper}, 1) == ("holds", "undecided", "undecided")
    nothing = fragility(0.0, "shared_init", 0.7)
    assert verdicts({"fragility_by_seed": nothing}, 1)[0] == "undecided"
    value = judge_claims(tables).set_index("claim").loc[1, "paper_contrasts"]
    difference = paper.pivot_table(
        index=["run", "seed"], columns="quintile", values="survival_rate"
    )
    assert f"{(difference[1] - difference[5]).mean():.4g}" in value


def test_a_claim_says_what_its_measure_finds_on_the_null():
    tables = {"fragility_contrasts": beyond_noise(-0.3, "Q1 - Q5", null=-0.2)}
    row = judge_claims(tables).set_index("claim").loc[1]
    assert row["verdict"] == "undecided"
    assert "speaks on the null and decides nothing: -0.2" in row["why"]


def test_wanda_persists_better_only_if_its_noise_does_not():
    rows = beyond_noise(0.8, "all", "persistence")
    magnitude = rows["method"] == "magnitude"
    for column in ("value", "without", "least", "most"):
        rows.loc[magnitude, column] -= 0.2
    same_noise = rows.copy()
    null = same_noise["source"] == "null"
    for column in ("value", "without"):
        same_noise.loc[null & magnitude, column] += 0.2
    assert verdicts({"fragility_contrasts": same_noise}, 2)[2] == "holds"
    assert verdicts({"fragility_contrasts": rows}, 2)[2] == "undecided"
    found = judge_claims({"fragility_contrasts": same_noise}).set_index("claim").loc[2]
    assert found["controlled_contrasts"].count("Wanda - magnitude") == 2  # equal sparsities


def test_another_tau_does_not_enter():
    paper = pd.concat([fragility(-0.3, "shared_init", 0.7), fragility(+0.9, "shared_init", 0.5)])
    assert verdicts({"fragility_by_seed": paper}, 1)[0] == "holds"


def survival(rates, arm="shared_init"):
    """{(method, sparsity): mean MNN} -> rows of survival.csv with spread over seeds."""
    return pd.DataFrame(
        [
            run_columns(*condition)
            | {"arm": arm, "coordinates": "normalised", "tau": 0.7, "init_a": s, "init_b": s}
            | {"mnn": rate + 0.001 * s * (1 + condition[1]) * len(condition[0])}
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


def transfer(fvu_raw, ratio, ce_drop, error=0.001):
    rows = []
    for seed in SEEDS:
        for positions in ("all", "norm_filtered"):
            row = run_columns("wanda", 0.5) | {"sae": f"seed {seed}", "refit": "none"}
            row |= {"positions": positions, "source": "pruned", "fvu_raw": fvu_raw + seed / 1e4}
            for name, value in (
                ("fvu_dense_var_ratio", ratio), ("fvu_raw_ratio", ratio), ("ce_drop", ce_drop),
            ):  # fmt: skip
                numbers = (value, error, 19.0, value, value)
                tails = ("", "_error", "_df", "_least", "_most")
                row |= {f"{name}{tail}": n for tail, n in zip(tails, numbers, strict=True)}
            rows.append(row)
    return {"transfer": pd.DataFrame(rows)}


def test_a_small_fvu_is_not_yet_usable():
    assert verdicts(transfer(0.02, 1.1, 0.0), 4) == ("holds", "holds", "holds")
    assert verdicts(transfer(0.02, 1.5, 0.0), 4) == ("holds", "fails", "fails")
    assert verdicts(transfer(0.02, 1.1, 0.1), 4) == ("holds", "fails", "fails")
    assert verdicts(transfer(0.3, 1.1, 0.0), 4) == ("fails", "holds", "holds")
    assert verdicts(transfer(0.02, 1.2, 0.0, error=0.1), 4)[2] == "undecided"


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
                | {"error": (numbers[2] - numbers[1]) / 2 / t_quantile(19), "df": 19.0}
                | {"resampled": "documents", "least": numbers[0], "most": numbers[0]}
                for key, numbers in rows.items()
            ]
        )
    }


def test_equivalence_is_measured_against_the_isolated_effect():
    both = ("cosine", "robust_and_fragile", "isolated", "final")
    gap = ("cosine", "robust_minus_fragile", "paper", "final")
    scale = {("dense", *both): (0.01, 0.009, 0.011), ("pruned", *both): (0.01, 0.009, 0.011)}
    within = {("dense", *gap): (0.0, -6e-4, 6e-4), ("pruned", *gap): (0.0, -6e-4, 6e-4)}
    assert verdicts(causal(scale | within), 5)[0] == "holds"
    wide = {("dense", *gap): (0.0, -0.01, 0.01), ("pruned", *gap): (0.0, -6e-4, 6e-4)}
    assert verdicts(causal(scale | wide), 5)[0] == "undecided"
    apart = {("dense", *gap): (0.02, 0.01, 0.03), ("pruned", *gap): (0.0, -6e-4, 6e-4)}
    assert verdicts(causal(scale | apart), 5)[0] == "fails"


def test_ablations_after_pruning():
    key = ("pruned_minus_dense", "cosine", "robust_and_fragile")
    weaker = {(*key, "paper", "final"): (-0.2, -0.3, -0.1)}
    stronger = {(*key, "isolated", "firing"): (0.2, 0.1, 0.3)}
    tables = causal(weaker | stronger)
    assert verdicts(tables | trained(True), 9) == ("holds", "fails", "fails")
    assert verdicts(tables | trained(False), 9) == ("holds", "undecided", "undecided")
    assert verdicts(tables, 9) == ("holds", "undecided", "undecided")  # not known


def trained(*verdicts):
    """sufficiency.csv; None is a run of which nobody asked."""
    return {"sufficiency": pd.DataFrame({"trained_enough": pd.Series(verdicts, dtype=object)})}


def test_dictionaries_that_are_not_trained_enough_decide_nothing():
    tables = quality(0.8, 1.2, 0.8)
    assert verdicts(tables | trained(True, None), 10)[2] == "fails"
    for unknown in (trained(None), trained(True, False), {}):
        row = judge_claims(tables | unknown).set_index("claim").loc[10]
        assert (row["paper_protocol"], row["verdict"]) == ("holds", "undecided")
        assert "trained enough" in row["why"]
    measured_without_them = {"fragility_contrasts": beyond_noise(-0.3, "Q1 - Q5")}
    assert verdicts(measured_without_them | trained(False), 1)[2] == "fails"


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
    enough = trained(True)
    assert verdicts(quality(0.8, 0.8, 0.8) | enough, 10) == ("holds", "holds", "holds")
    assert verdicts(quality(0.8, 1.2, 0.8) | enough, 10) == ("holds", "fails", "fails")
    assert verdicts(quality(0.8, 0.8, 1.2) | enough, 10) == ("holds", "fails", "fails")


def test_the_seed_floor_and_the_floor_of_the_same_start():
    stability = pd.DataFrame(
        [run_columns("dense", 0.0) | {"tau": 0.7, "seed_a": 0, "seed_b": 1, "mnn": 0.02}]
    )
    floor = survival({("dense", 0.0): 0.4}, arm="floor_shared")
    rates = dict.fromkeys(CONDITIONS, 0.8)
    table = pd.concat([survival(rates), survival(rates, "shared_start"), floor])
    tables = {"stability": stability, "survival": table, **trained(True)}
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


def pattern(profile, *, shared, seed=0):
    """fragility_contrasts of Q1 to Q5 for three seeds, one condition: `profile` is there; `shared`
    is what every document adds by chance to the quintiles of all seeds alike."""
    generator = np.random.default_rng(seed)
    documents = generator.normal(0, shared, (5, GROUPS))
    own = generator.normal(0, 0.3 * shared + 0.01, (3, 5, GROUPS))
    values = 1 + np.asarray(profile)[None, :, None] + documents + own  # [seeds, quintiles, groups]
    total = values.sum(2, keepdims=True)
    without = (total - values) / (GROUPS - 1)
    rows = []
    for number in range(5):
        row = run_columns("wanda", 0.5) | {
            "measure": "relative_shuffled",
            "group": f"Q{number + 1}",
        }
        row |= {"without": without[:, number].mean(0), "by_seed": without[:, number].ravel()}
        rows += [row | {"source": source} for source in ("pruned", "null")]
    return pd.DataFrame(rows)


def test_a_pattern_that_seeds_share_with_their_documents_alone_is_none():
    held = []
    for seed in range(200):
        rows = pattern(np.zeros(5), shared=0.1, seed=seed)
        (_, found) = [c for c in CLAIMS[6].controlled(claim_6(rows)) if True][:2]
        held += verdicts_of([found._replace(null=None)])
    assert 1 - held.count("undecided") / len(held) <= 0.05 + 0.02  # 1.3 standard errors of 200


def test_a_pattern_of_all_seeds_is_found():
    rows = pattern(np.linspace(-0.3, 0.3, 5), shared=0.1)
    found = CLAIMS[6].controlled(claim_6(rows))[1]
    assert verdicts_of([found._replace(null=None)]) == ["holds"]
    assert found.estimate.value > 0.9


def claim_6(contrasts):
    arms = [survival({("dense", 0.0): rate}, arm) for arm, rate in
            (("ceiling_cross", 0.1), ("chance", 0.0))]  # fmt: skip
    table = pd.concat(arms)
    return {"survival": table.assign(init_b=table["init_a"] + 1), "fragility_contrasts": contrasts}


def test_rare_quintiles_near_half_are_judged_one_by_one():
    assert verdicts({"fragility_by_seed": fragility(-0.1, "shared_init", 0.7)}, 8)[0] == "holds"
    assert verdicts({"fragility_by_seed": fragility(+0.8, "shared_init", 0.7)}, 8)[0] == "fails"

    def rare(persistence, relative, noise):
        parts = [
            beyond_noise(value, group, measure, null)
            for group in ("Q1", "Q2")
            for measure, value, null in (
                ("persistence", persistence, noise), ("relative_shuffled", relative, 1.0),
            )
        ]  # fmt: skip
        return {"fragility_contrasts": pd.concat(parts, ignore_index=True)}

    assert verdicts(rare(0.9, 1.1, 0.8), 8)[2] == "holds"
    assert verdicts(rare(0.9, 0.8, 0.95), 8)[2] == "fails"  # harmed beyond noise
    assert verdicts(rare(0.4, 1.1, 0.9), 8)[2] == "fails"  # below the level, noise is not
    assert verdicts(rare(0.4, 1.1, 0.4), 8)[2] == "undecided"  # noise of that size is too


def predictor(auc, gain, null_auc=0.5, target="beyond_noise"):
    rows = []
    for source, values in (("pruned", (auc, gain)), ("null", (null_auc, 0.0))):
        row = {"target": target, "tau": NAN, "evaluation": "stated_sign", "source": source}
        row |= {"features": "rate_sparsity", "reason": ""}
        for name, value in zip(("auc_within", "gain"), values, strict=True):
            numbers = (value, 0.01, 3.0, value, value)
            tails = ("", "_error", "_df", "_least", "_most")
            row |= {f"{name}{tail}": number for tail, number in zip(tails, numbers, strict=True)}
        rows.append(row)
    return {"predictor": pd.DataFrame(rows)}


def test_firing_rate_predicts_only_by_the_stated_sign_and_beyond_the_start():
    assert verdicts(predictor(0.7, 0.1), 7)[1:] == ("holds", "holds")
    assert verdicts(predictor(0.3, 0.1), 7)[2] == "fails"  # the frequent survive
    assert verdicts(predictor(0.7, -0.1), 7)[2] == "fails"  # the start tells more
    assert verdicts(predictor(0.7, 0.1, null_auc=0.7), 7)[2] == "undecided"
    assert verdicts(predictor(0.9, 0.2, target="persistence"), 7)[2] == "undecided"
    nothing = predictor(NAN, 0.1)
    nothing["predictor"]["reason"] = "one class"
    table = judge_claims(nothing).set_index("claim")
    assert table.loc[7, "controlled"] == "undecided"
    assert "one class" in table.loc[7, "why"]


def test_one_value_per_seed_gives_the_t_interval_of_a_mean():
    from scipy import stats

    values = [1.0, 2.5, 2.0, 4.0]
    rows = pd.DataFrame({"value": values, "condition": "a", "seeds": [(s,) for s in range(4)]})
    found = jackknife_over_seeds(rows)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_conditions_count_alike_whatever_their_seeds():
    rows = pd.DataFrame(
        {
            "value": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0],
            "condition": [*"aaaabb"],
            "seeds": [(0,), (1,), (2,), (3,), (0,), (1,)],
        }
    )
    assert jackknife_over_seeds(rows).value == 0.5


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
    assert found.value == 1.5
    assert np.isnan(found.low)
    assert "fewer than 2" in found.resampled
    pair = pd.DataFrame({"value": [1.0], "condition": "a", "seeds": [(0, 1)]})
    assert np.isnan(jackknife_over_seeds(pair).low)
    assert np.isnan(jackknife_over_seeds(one.assign(value=np.nan)).value)


def test_an_interval_over_windows_leaves_out_stretches():
    values = np.random.default_rng(3).normal(size=200)
    found = interval_over_windows(values)
    means = values.reshape(20, 10).mean(1)
    half = t_quantile(19) * means.std(ddof=1) / np.sqrt(20)
    expected = (values.mean() - half, values.mean() + half)
    assert (found.low, found.high) == pytest.approx(expected)
    assert np.isnan(interval_over_windows(values[:4]).low)


def test_a_quintile_without_any_value_is_undecided_not_an_error():
    table = fragility(-0.3, "shared_init", 0.7)
    assert verdicts({"fragility_by_seed": table[table["quintile"] > 1]}, 1)[0] == "undecided"


def test_survival_of_zero_counts_against_claim_11():
    floor = survival({("dense", 0.0): 0.02}, arm="floor_shared")
    rates = survival({("wanda", 0.3): 0.9, ("magnitude", 0.3): 0.9}, "shared_start")
    assert verdicts({"survival": pd.concat([rates, floor]), **trained(True)}, 11)[1] == "holds"
    rates.loc[rates.index[:2], "mnn"] = 0.0
    assert verdicts({"survival": pd.concat([rates, floor]), **trained(True)}, 11)[1] == "undecided"


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
