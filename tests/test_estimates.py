"""Every interval from its formula by another way, and on samples whose truth is known."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.independent import statistics as slow

from prunelens.analyses.statistics import (
    Estimate,
    LatentSample,
    RankSample,
    difference,
    fisher_z,
    interval_over_windows,
    jackknife_over_seeds,
    jackknifed,
    mean_over,
    no_estimate,
    rank_correlation,
    ratio_of_means,
    t_quantile,
)
from prunelens.analyses.statistics import crossed as crossed_of_many
from prunelens.analyses.statistics.estimates import FEWEST_LATENTS

SEEDS, LATENTS, GROUPS = 3, 12, 7
crossed = functools.partial(crossed_of_many, fewest=2)  # few enough to count by hand


# --- one estimate ---------------------------------------------------------------------------------


def test_ends_are_those_of_students_t():
    for df in (1.0, 2.0, 7.3, math.inf):
        found = Estimate(2.0, 0.3, df, "documents")
        assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, df, 2.0, 0.3))
        assert found.bounds() == (found.low, found.high)
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df))


def test_a_correlation_has_its_ends_on_fishers_scale_and_never_beyond_one():
    found = Estimate(0.9, 0.5, 4.0, "documents", scale="fisher")
    ends = stats.t.interval(0.95, 4, math.atanh(0.9), 0.5)
    assert found.bounds() == pytest.approx(tuple(math.tanh(end) for end in ends))
    assert found.high < 1
    assert 0.9 - found.low > found.high - 0.9


def test_a_share_has_its_ends_at_its_log_odds():
    found = Estimate(0.9, 0.5, 4.0, "conditions", scale="logit")
    ends = stats.t.interval(0.95, 4, math.log(0.9 / 0.1), 0.5)
    assert found.bounds() == pytest.approx(tuple(1 / (1 + math.exp(-end)) for end in ends))
    without = np.array([0.9, 0.95, 0.8, 0.99, 0.97])
    error = jackknifed(0.93, without, "conditions", scale="logit").error
    assert error**2 == pytest.approx(slow.jackknife([math.log(v / (1 - v)) for v in without]))
    assert jackknifed(1.0, without, "conditions", scale="logit").high <= 1


@pytest.mark.parametrize("scale", ["plain", "fisher"])
def test_one_sided_p_agrees_with_the_ends(scale):
    found = Estimate(0.4, 0.2, 6.0, "documents", scale=scale)
    assert found.p_above(found.low) == pytest.approx(0.025)
    assert found.p_below(found.high) == pytest.approx(0.025)
    assert found.p_above(0.4) == pytest.approx(0.5)
    assert found.p_above(-0.9) < 0.01 < 0.9 < found.p_above(0.9)
    away = math.atanh(0.4) - math.atanh(0.1) if scale == "fisher" else 0.3
    assert found.p_above(0.1) == pytest.approx(stats.t.sf(away / 0.2, 6))
    assert found.p_below(0.1) == pytest.approx(1 - stats.t.sf(away / 0.2, 6))


def test_without_an_error_nothing_is_claimed():
    found = no_estimate(0.4, "one seed")
    assert found.value == 0.4 and found.resampled == "one seed"
    assert np.isnan([found.low, found.high, found.p_above(0), found.p_below(0)]).all()


def test_shifting_moves_everything_but_the_error():
    found = Estimate(0.4, 0.2, 6.0, "documents", least=0.3, most=0.6)
    moved = found.shifted(-1)
    assert (moved.value, moved.least, moved.most) == pytest.approx((-0.6, -0.7, -0.4))
    assert (moved.low, moved.high) == pytest.approx((found.low - 1, found.high - 1))
    assert moved.p_above(-1) == pytest.approx(found.p_above(0))


def test_fisher_z_stays_finite():
    assert np.isfinite(fisher_z(np.array([-1.0, 0.0, 1.0]))).all()
    assert fisher_z(np.array([0.5])) == pytest.approx(math.atanh(0.5))


# --- leaving units out ----------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_the_t_interval_of_a_mean():
    values = np.array([1.0, 2.5, 2.0, 4.0, 3.0, 3.3])
    without = np.array([np.delete(values, i).mean() for i in range(6)])
    found = jackknifed(values.mean(), without, "documents")
    expected = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert found.bounds() == pytest.approx(expected)
    assert (found.least, found.most) == (without.min(), without.max())
    assert (found.df, found.added, found.resampled) == (pytest.approx(5), 0.0, "documents")


def test_the_jackknife_of_a_ratio_is_that_of_its_linearisation():
    """In large samples: the two ways to the error of a ratio, neither of which knows the other."""
    generator = np.random.default_rng(0)
    a, b = 3 + generator.normal(size=(2, 400))
    ratio = a.mean() / b.mean()
    without = np.array([np.delete(a, i).mean() / np.delete(b, i).mean() for i in range(400)])
    found = jackknifed(ratio, without, "documents")
    assert found.error**2 == pytest.approx(slow.jackknife(without))
    linear = (a - ratio * b) / b.mean()
    assert found.error == pytest.approx(stats.sem(linear), rel=0.02)


def test_variance_from_elsewhere_is_added_with_the_degrees_of_freedom_of_both():
    without = np.array([1.0, 1.2, 0.9, 1.1, 0.8])
    own = slow.jackknife(without)
    found = jackknifed(1.0, without, "documents", added=0.04, added_df=30)
    assert found.error**2 == pytest.approx(own + 0.04)
    assert found.df == pytest.approx((own + 0.04) ** 2 / (own**2 / 4 + 0.04**2 / 30))
    assert found.added == 0.04
    alone = jackknifed(1.0, np.ones(5), "documents", added=0.04)
    assert (alone.error, alone.df) == (pytest.approx(0.2), math.inf)


def test_a_correlation_is_left_out_on_fishers_scale():
    without = np.array([0.9, 0.95, 0.8, 0.99, 0.97])
    found = jackknifed(0.93, without, "documents", scale="fisher")
    assert found.error**2 == pytest.approx(slow.jackknife([math.atanh(r) for r in without]))
    assert -1 < found.low < 0.93 < found.high < 1


def test_few_units_or_an_undefined_replicate_have_no_interval_but_a_reason():
    for without, value, reason in (
        (np.arange(4.0), 1.0, "4 documents, fewer than 5"),
        (np.array([1, 2, np.nan, 4, 5]), 1.0, "undefined without some"),
        (np.arange(6.0), np.nan, "undefined"),
        (np.array([]), 1.0, "0 documents"),
    ):
        found = jackknifed(value, without, "documents")
        assert np.isnan([found.error, found.low, found.high]).all()
        assert reason in found.resampled
    assert jackknifed(1.0, np.array([1.0, 2.0]), "seeds", fewest=2).error > 0


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1.0, 0.0])
@pytest.mark.parametrize("count", [5, 6, 7, 60])
def test_no_interval_has_no_width(value, count):
    """Sums of equal numbers differ in their last bits, which is no spread."""
    same = np.full(count, value)
    rows = pd.DataFrame({"value": same, "condition": "a", "seeds": [(s,) for s in range(count)]})
    order = np.arange(float(count))
    rank = RankSample(order, order, np.empty((count, 0)), same)
    measured = rank._replace(y_without=np.repeat(order[:, None], 6, axis=1))
    for found in (
        jackknifed(value, same, "documents"),
        mean_over(list(same), "seeds"),
        mean_over(list(same), "seeds", scale="fisher"),
        interval_over_windows(same),
        jackknife_over_seeds(rows),
        jackknife_over_seeds(pd.concat([rows, rows.assign(condition="b", value=value / 7)])),
        crossed([_sample(np.full((count, 6), value), np.ones((count, 6)))] * 2),
        rank_correlation([rank]),
        rank_correlation([measured, measured]),
    ):
        assert math.isnan(found.error) and math.isnan(found.low), found
        assert "no interval" in found.resampled


def test_a_mean_over_seeds_is_students():
    values = [0.2, 0.5, 0.3]
    found = mean_over([0.2, math.nan, 0.5, 0.3], "seeds")
    assert found.bounds() == pytest.approx(
        stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    )
    z = np.arctanh(values)
    ends = mean_over(values, "seeds", scale="fisher").bounds()
    half = stats.t.ppf(0.975, 2) * math.sqrt(
        slow.jackknife([math.atanh(np.mean(np.delete(values, i))) for i in range(3)])
    )
    middle = math.atanh(np.mean(values))
    assert ends == pytest.approx((math.tanh(middle - half), math.tanh(middle + half)))
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(z), rel=0.1)
    one = mean_over([0.4], "seeds")
    assert one.value == 0.4 and math.isnan(one.error) and "1 seeds" in one.resampled
    assert math.isnan(mean_over([math.nan], "seeds").value)


# --- latents and documents ------------------------------------------------------------------------


def _cells(seed, *, shared=0.0, own=1.0, documents=0.5, seeds=SEEDS, latents=LATENTS):
    """[seeds, latents, groups] around 3, by latents, documents and what is left."""
    generator = np.random.default_rng(seed)
    of_latents = shared * generator.normal(size=(1, latents, 1))
    of_latents = of_latents + own * generator.normal(size=(seeds, latents, 1))
    of_documents = documents * generator.normal(size=(1, 1, GROUPS))
    return 3 + of_latents + of_documents + generator.normal(size=(seeds, latents, GROUPS))


def _without(cells):
    """The mean over all groups but one: [latents, groups]."""
    return np.stack([np.delete(cells, g, axis=1).mean(1) for g in range(cells.shape[1])], axis=1)


def _sample(above, below):
    return ratio_of_means(above.mean(1), _without(above), below.mean(1), _without(below))


def _ratio(above, below):
    """The same ratio as a function of weights and of the groups that are left."""

    def statistic(weights, groups):
        return weights @ above[:, groups].mean(1) / (weights @ below[:, groups].mean(1))

    return statistic


def test_a_ratio_of_means_leaves_out_what_is_undefined():
    above, below = _cells(0)[0], _cells(1)[0]
    values, others = above.mean(1), below.mean(1)
    above_without, below_without = _without(above), _without(below)
    values[3], others[5] = np.nan, np.nan
    above_without[7, 2], below_without[8, 4] = np.nan, np.nan
    found = ratio_of_means(values, above_without, others, below_without)
    kept = [i for i in range(LATENTS) if i not in (3, 5)]
    ratio = sum(values[kept]) / sum(others[kept])
    assert found.value == pytest.approx(ratio)
    for group in range(GROUPS):
        dropped = {2: 7, 4: 8}.get(group)
        left = [i for i in kept if i != dropped]
        rest = above_without[left, group].sum() / below_without[left, group].sum()
        assert found.without[group] == pytest.approx(rest)
        parts = (above_without[:, group] - rest * below_without[:, group])[kept]
        expected = parts / below_without[left, group].sum()
        np.testing.assert_allclose(found.parts_without[group], expected)
    np.testing.assert_allclose(found.parts, (values - ratio * others)[kept] / others[kept].sum())
    assert found.parts.sum() == pytest.approx(0, abs=1e-12)
    nothing = ratio_of_means(np.full(3, np.nan), np.ones((3, 6)), np.ones(3), np.ones((3, 6)))
    assert math.isnan(nothing.value) and math.isnan(crossed([nothing]).error)


def test_parts_are_how_a_ratio_moves_with_each_latents_weight():
    above, below = _cells(0)[0], _cells(1)[0]
    found, every = _sample(above, below), list(range(GROUPS))
    own = slow.influence(_ratio(above, below), LATENTS, every)
    np.testing.assert_allclose(found.parts, own, atol=1e-8)
    second = slow.influence(_ratio(above, below), LATENTS, [g for g in every if g != 2])
    np.testing.assert_allclose(found.parts_without[2], second, atol=1e-8)


@pytest.mark.parametrize("seeds", [1, SEEDS])
@pytest.mark.parametrize("shared", [0.0, 1.5])
def test_the_error_over_latents_and_documents_is_its_formula(seeds, shared):
    above, below = _cells(2, shared=shared, seeds=seeds), _cells(3, seeds=seeds)
    found = crossed([_sample(a, b) for a, b in zip(above, below, strict=True)])
    statistics = [_ratio(a, b) for a, b in zip(above, below, strict=True)]
    value, documents, latents = slow.crossed(statistics, LATENTS, GROUPS)
    assert documents > 0 and latents > 0
    assert found.value == pytest.approx(value)
    assert found.added == pytest.approx(latents, rel=1e-5)
    assert found.error**2 == pytest.approx(documents + latents, rel=1e-5)
    shares = documents**2 / (GROUPS - 1) + latents**2 / (LATENTS - 1)
    assert found.df == pytest.approx((documents + latents) ** 2 / shares, rel=1e-4)
    which = "of one seed" if seeds == 1 else "of every seed"
    assert found.resampled == f"documents and latents {which}"
    assert "windows and" in crossed([_sample(above[0], below[0])], units="windows").resampled


def test_a_difference_of_two_groups_is_one_statistic_of_both():
    above, below = _cells(4, own=2.0)[0], _cells(5)[0]
    first, second = slice(0, 5), slice(5, LATENTS)
    samples = [_sample(above[part], below[part]) for part in (first, second)]

    def statistic(weights, groups):
        left, right = (_ratio(above[p], below[p])(weights[p], groups) for p in (first, second))
        return left - right

    found = crossed([difference(*samples)])
    value, documents, latents = slow.crossed([statistic], LATENTS, GROUPS)
    assert found.value == pytest.approx(value)
    assert found.error**2 == pytest.approx(documents + latents, rel=1e-5)


def test_without_documents_only_latents_vary():
    values = np.random.default_rng(6).normal(3, 1, size=(SEEDS, LATENTS))
    nothing = np.empty((LATENTS, 0))
    ones = np.ones(LATENTS)
    found = crossed([ratio_of_means(values[0], nothing, ones, nothing)])
    expected = stats.t.interval(0.95, LATENTS - 1, values[0].mean(), stats.sem(values[0]))
    assert found.bounds() == pytest.approx(expected)
    assert found.resampled == "latents of one seed"
    every = crossed([ratio_of_means(v, nothing, ones, nothing) for v in values])
    statistics = [lambda weights, groups, v=v: weights @ v / weights.sum() for v in values]
    assert every.error**2 == pytest.approx(slow.crossed(statistics, LATENTS, 0)[2], rel=1e-5)
    assert (every.least, every.most) == (values.mean(1).min(), values.mean(1).max())


def test_few_latents_have_a_value_and_no_interval():
    few = [_sample(cells, np.ones_like(cells)) for cells in _cells(1, latents=13)]
    enough = [_sample(cells, np.ones_like(cells)) for cells in _cells(1, latents=14)]
    assert len(few) * 13 < FEWEST_LATENTS <= len(enough) * 14
    assert math.isfinite(crossed_of_many(enough).error)
    for samples in (few, [difference(*both) for both in zip(enough, few, strict=True)]):
        found = crossed_of_many(samples)
        assert math.isfinite(found.value) and math.isnan(found.low)
        assert found.resampled == "no interval: 39 latents of all seeds, fewer than 40"


def test_latents_that_do_not_fire_without_some_documents_have_no_part_there():
    parts_without = np.array([[0.1, -0.2, np.nan], [0.3, np.nan, -0.1], [0.2, -0.3, 0.2]] * 2)
    sample = LatentSample(1.0, np.arange(6.0), np.array([0.5, -0.8, 0.3]), parts_without, 3)
    explained = 0.0
    for column in parts_without.T:
        known = column[~np.isnan(column)]
        explained += 5 / 6 * sum((value - known.mean()) ** 2 for value in known)
    latents = 1.5 * (0.25 + 0.64 + 0.09) - explained
    assert crossed([sample]).added == pytest.approx(latents)


def test_seeds_that_are_copies_count_once_and_independent_ones_as_many():
    one = _sample(_cells(7, own=3.0)[0], np.ones((LATENTS, GROUPS)))
    copies, alone = crossed([one] * 4), crossed([one])
    assert copies.added == pytest.approx(alone.added)
    many = _cells(8, own=3.0, documents=0.0, seeds=300)
    samples = [_sample(cells, np.ones_like(cells)) for cells in many]
    each = np.mean([crossed([sample]).added for sample in samples])
    assert crossed(samples).added < 0.2 * each


def test_the_interval_over_latents_and_documents_covers():
    """A simulation of one seed; the self-test has the others."""
    covered = 0
    for seed in range(400):
        cells = _cells(seed, documents=1.0, seeds=1, latents=30)[0]
        found = crossed([_sample(cells, np.ones_like(cells))])
        covered += found.low <= 3 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


# --- seeds and windows ----------------------------------------------------------------------------


def test_pairs_of_seeds_are_left_out_by_seed():
    values = {(0, 1): 0.3, (0, 2): 0.5, (1, 2): 0.8, (0, 3): 0.1, (1, 3): 0.9, (2, 3): 0.4}
    rows = pd.DataFrame({"value": values.values(), "condition": "a", "seeds": list(values)})
    found = jackknife_over_seeds(rows)
    without = [np.mean([v for pair, v in values.items() if s not in pair]) for s in range(4)]
    assert found.value == pytest.approx(np.mean(list(values.values())))
    assert found.error**2 == pytest.approx(slow.jackknife(without))
    assert found.df == pytest.approx(3)
    naive = stats.sem(list(values.values()))
    assert found.error > 1.2 * naive  # pairs that share a seed are not independent


def test_conditions_count_alike_and_are_not_a_sample():
    generator = np.random.default_rng(9)
    table = generator.normal(size=(2, 4))
    rows = pd.DataFrame(
        [(table[c, s], c, (s,)) for c in range(2) for s in range(4) if (c, s) != (1, 3)]
        + [(math.nan, 1, (3,))],
        columns=["value", "condition", "seeds"],
    )
    found = jackknife_over_seeds(rows)
    first, second = list(table[0]), list(table[1][:3])
    assert found.value == pytest.approx((np.mean(first) + np.mean(second)) / 2)
    without = [
        (np.mean(np.delete(first, s)) + np.mean([v for i, v in enumerate(second) if i != s])) / 2
        for s in range(4)
    ]
    assert found.error**2 == pytest.approx(slow.jackknife(without))


def test_one_seed_or_a_condition_of_one_seed_has_no_interval():
    one = pd.DataFrame({"value": [1.0, 2.0], "condition": [*"ab"], "seeds": [(0,), (0,)]})
    found = jackknife_over_seeds(one)
    assert found.value == 1.5 and math.isnan(found.error) and "no interval" in found.resampled
    rests = pd.DataFrame({"value": [1.0, 2, 3], "condition": [*"aab"], "seeds": [(0,), (1,), (0,)]})
    assert math.isnan(jackknife_over_seeds(rests).error)
    nothing = jackknife_over_seeds(one.assign(value=math.nan))
    assert math.isnan(nothing.value) and "no value" in nothing.resampled


def test_windows_are_left_out_in_stretches():
    generator = np.random.default_rng(10)
    values = generator.normal(1.0, 1.0, 120)
    found = interval_over_windows(values)
    stretches = values.reshape(20, 6).mean(1)
    expected = stats.t.interval(0.95, 19, values.mean(), stats.sem(stretches))
    assert found.bounds() == pytest.approx(expected)
    few = interval_over_windows(values[:7])
    expected = stats.t.interval(0.95, 6, values[:7].mean(), stats.sem(values[:7]))
    assert few.bounds() == pytest.approx(expected)
    uneven = interval_over_windows(values[:45])
    parts = np.array_split(np.arange(45), 20)
    without = [np.delete(values[:45], part).mean() for part in parts]
    assert uneven.error**2 == pytest.approx(slow.jackknife(without))
    assert math.isnan(interval_over_windows(values[:4]).error)
    assert math.isnan(interval_over_windows(values[:0]).value)


def test_neighbouring_windows_that_are_alike_widen_the_interval():
    generator = np.random.default_rng(11)
    values = np.repeat(generator.normal(size=30), 4)
    assert interval_over_windows(values).error > 1.5 * stats.sem(values)


# --- rank correlations ----------------------------------------------------------------------------


def _ranked(seed, latents=40, groups=GROUPS):
    """x, and y measured on documents, of which some latents are tied."""
    generator = np.random.default_rng(seed)
    x, given = np.round(generator.normal(size=(2, latents)), 1)
    y = 0.5 * x + 0.3 * given + generator.normal(size=latents)
    cells = np.round(y[:, None] + 0.5 * generator.normal(size=(latents, groups)), 1)
    if groups:  # means of equal numbers differ in their last bits, which would be an order
        return RankSample(x, cells.mean(1).round(9), _without(cells).round(9), given), cells
    return RankSample(x, np.round(y, 1), cells, given), cells


def _rank_statistic(sample, cells, partial):
    """As a function of weights and of the groups that are left; ranks are those of all latents."""

    def statistic(weights, groups):
        y = cells[:, groups].mean(1) if groups else sample.y
        a, b, c = (slow.ranks(np.round(v, 9)) for v in (sample.x, y, sample.given))
        if partial:
            return slow.weighted_partial_pearson(a, b, c, weights)
        return slow.weighted_pearson(a, b, weights)

    return statistic


@pytest.mark.parametrize("groups", [0, GROUPS])
def test_a_rank_correlation_is_spearmans(groups):
    samples = [_ranked(seed, groups=groups)[0] for seed in range(3)]
    found = rank_correlation(samples)
    expected = [stats.spearmanr(s.x, s.y).statistic for s in samples]
    assert found.value == pytest.approx(np.mean(expected))
    partial = rank_correlation(samples, partial=True)
    expected = [slow.partial_spearman(s.x, s.y, s.given) for s in samples]
    assert partial.value == pytest.approx(np.mean(expected))
    first = samples[0]
    r = stats.spearmanr(np.column_stack([first.x, first.y, first.given])).statistic
    explained = math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    formula = (r[0, 1] - r[0, 2] * r[1, 2]) / explained
    assert rank_correlation([first], partial=True).value == pytest.approx(formula)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("seeds", "groups"), [(1, 0), (1, GROUPS), (2, GROUPS)])
def test_its_error_is_that_over_latents_and_documents(seeds, groups, partial):
    made = [_ranked(seed, latents=40, groups=groups) for seed in range(seeds)]
    found = rank_correlation([sample for sample, _ in made], partial=partial)
    statistics = [_rank_statistic(sample, cells, partial) for sample, cells in made]
    value, documents, latents = slow.crossed(statistics, 40, groups, fisher=True)
    assert found.value == pytest.approx(value)
    assert found.scale == "fisher"
    assert found.error**2 == pytest.approx(documents + latents, rel=1e-4)
    assert ("documents" in found.resampled) == bool(groups)


@pytest.mark.parametrize("partial", [False, True])
def test_its_error_is_that_of_a_bootstrap_over_latents(partial):
    sample, _ = _ranked(3, latents=300, groups=0)
    rows = np.random.default_rng(0).integers(300, size=(600, 300))
    drawn_ranks = [stats.rankdata(v[rows], axis=1) for v in (sample.x, sample.y, sample.given)]
    drawn = [
        slow.partial_pearson(a, b, c) if partial else slow.pearson(a, b)
        for a, b, c in zip(*drawn_ranks, strict=True)
    ]
    found = rank_correlation([sample], partial=partial)
    assert found.error == pytest.approx(np.std(np.arctanh(drawn)), rel=0.15)


def test_what_the_third_explains_is_gone_from_the_partial_correlation():
    generator = np.random.default_rng(1)
    given = generator.normal(size=2000)
    x, y = given + generator.normal(size=(2, 2000))
    sample = RankSample(x, y, np.empty((2000, 0)), given)
    assert rank_correlation([sample]).low > 0.4
    partial = rank_correlation([sample], partial=True)
    assert partial.low < 0 < partial.high and partial.high - partial.low < 0.1


def test_a_rank_correlation_of_nothing_is_undefined_with_a_reason():
    good = _ranked(0)[0]
    nothing = np.empty((5, 0))
    constant = RankSample(np.arange(5.0), np.ones(5), nothing, np.arange(5.0))
    short = RankSample(np.arange(2.0), np.arange(2.0), nothing[:2], np.arange(2.0))
    for samples in ([], [constant], [short], [good, constant]):
        found = rank_correlation(samples)
        assert math.isnan(found.value) and "never varies, or too few" in found.resampled
    explained = RankSample(*([np.arange(9.0)] * 2), np.empty((9, 0)), np.arange(9.0))
    assert math.isnan(rank_correlation([explained], partial=True).value)


def test_a_latent_that_fires_in_one_group_alone_is_left_out_without_it():
    sample, _ = _ranked(5)
    without = sample.y_without.copy()
    without[4, 2] = math.nan
    found = rank_correlation([sample._replace(y_without=without)])
    kept = np.arange(40) != 4
    replicates = [stats.spearmanr(sample.x, column).statistic for column in sample.y_without.T]
    replicates[2] = stats.spearmanr(sample.x[kept], sample.y_without[kept, 2]).statistic
    documents = slow.jackknife([math.atanh(rho) for rho in replicates])
    assert found.error**2 - found.added == pytest.approx(documents)
