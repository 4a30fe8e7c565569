"""Training sufficiency: planted data, planted curves, and the definitions in plain numbers."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from independent import matching
from prunelens.analyses.sufficiency import (
    FALL_LIMIT,
    NOT_ENOUGH,
    RETENTION_LIMIT,
    sufficiency,
    survival_by_step,
)
from prunelens.config import SaeConfig
from prunelens.config.features import SufficiencyConfig
from prunelens.errors import UserError
from prunelens.sae import evaluate_sae, train_sae
from test_sae import InMemory

TAUS = (0.5, 0.7, 0.9)


# ---- trainings on data with known directions ----


def planted():
    """Sparse sums of 16 orthogonal directions in 16 dimensions, with noise that no SAE explains."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    on = torch.rand(3000, 16, generator=generator) < 0.1
    signal = (on * (0.5 + torch.rand(3000, 16, generator=generator))) @ directions
    return InMemory(signal + 0.5 * signal.std() * torch.randn(3000, 16, generator=generator))


def curve_of_training(data, *, steps, restarts_every, learning_rate):
    """Train, and judge at the checkpoints and at the end, as a study does."""
    config = SaeConfig(
        expansion=1,
        k=3,
        steps=steps,
        batch_tokens=128,
        learning_rate=learning_rate,
        resample_every=restarts_every,
    )
    fvu = {}

    def judge(step, sae):
        fvu[step] = evaluate_sae(sae, data, dense_variance=1.0).fvu

    wanted = (*SufficiencyConfig().steps_at(steps), steps)
    trained = train_sae(
        data, config, init_seed=0, data_seed=0, observe=dict.fromkeys(wanted, judge)
    )
    retention = {entry.step: entry.mean_init_retention for entry in trained.log}
    rows = [(0, step, retention[step], fvu[step]) for step in wanted]
    return pd.DataFrame(rows, columns=["seed", "step", "mean_init_retention", "fvu"])


def verdict_on_training(*, steps, learning_rate):
    data, options = planted(), {"restarts_every": steps // 10, "learning_rate": learning_rate}
    own = curve_of_training(data, steps=steps, **options)
    return sufficiency(own, curve_of_training(data, steps=2 * steps, **options))


def test_a_training_cut_short_is_warned_by_what_more_steps_add():
    found = verdict_on_training(steps=40, learning_rate=8e-2)
    assert found.trained_enough is False
    assert found.mean_init_retention < RETENTION_LIMIT
    assert found.fvu_fall_beyond_schedule > 5 * FALL_LIMIT
    assert found.reason.startswith(NOT_ENOUGH)


def test_a_rate_too_small_to_leave_the_start_is_warned_by_the_start_alone():
    """Twice nearly nothing is nearly nothing: FVU cannot see it."""
    found = verdict_on_training(steps=40, learning_rate=2e-5)
    assert found.trained_enough is False
    assert found.mean_init_retention > 0.999
    assert found.fvu_fall_beyond_schedule < FALL_LIMIT


def test_a_long_training_is_not_warned_although_its_fvu_fell_with_the_rate():
    found = verdict_on_training(steps=160, learning_rate=8e-2)
    assert found.trained_enough is True
    assert found.mean_init_retention < RETENTION_LIMIT
    assert found.fvu_fall > FALL_LIMIT
    assert found.fvu_fall_schedule > FALL_LIMIT
    assert found.fvu_fall_beyond_schedule < FALL_LIMIT / 2
    assert found.reason.startswith("trained enough: ")


# ---- verdicts on planted curves ----


def curves(*, steps=(25, 50, 100), retention=0.7, fvus=None):
    """seed -> FVU at each step, as a table."""
    fvus = fvus or {0: (0.40, 0.30, 0.25), 1: (0.42, 0.31, 0.24)}
    rows = [
        (seed, step, retention + 0.01 * seed, fvu)
        for seed, of_seed in fvus.items()
        for step, fvu in zip(steps, of_seed, strict=True)
    ]
    return pd.DataFrame(rows, columns=["seed", "step", "mean_init_retention", "fvu"])


def doubled(*, half=0.27, end=0.248, seed=0, steps=(25, 50, 100, 200)):
    return curves(steps=steps, fvus={seed: (0.4, 0.3, half, end)})


def test_the_falls_are_what_the_definitions_say():
    generator = np.random.default_rng(0)
    for _ in range(20):
        fvus = {seed: tuple(generator.uniform(0.1, 0.5, 3)) for seed in (3, 5, 8)}
        half, end = generator.uniform(0.1, 0.5, 2)
        found = sufficiency(curves(fvus=fvus), doubled(half=half, end=end, seed=5))
        fall = None
        for _before, last_but_one, last in fvus.values():
            of_seed = (last_but_one - last) / last_but_one
            fall = of_seed if fall is None or of_seed > fall else fall
        own = fvus[5][2]
        assert found.fvu_fall == pytest.approx(fall)
        assert found.fvu_fall_schedule == pytest.approx((half - own) / half)
        assert found.fvu_fall_beyond_schedule == pytest.approx((own - end) / own)
        assert found.mean_init_retention == pytest.approx(0.78)
        assert found.trained_enough is not (own - end > 0.02 * own)


def test_order_of_rows_and_of_seeds_does_not_matter():
    own = curves()
    shuffled = own.sample(frac=1, random_state=1)[own.columns[::-1]].assign(extra="x")
    longer = doubled()
    assert sufficiency(shuffled, longer[::-1]) == sufficiency(own, longer)


def test_each_limit_alone_decides_and_is_itself_allowed():
    assert sufficiency(curves(retention=0.89), doubled()).trained_enough is True  # 0.90 exactly
    assert sufficiency(curves(retention=0.891), doubled()).trained_enough is False
    exact = curves(fvus={0: (0.4, 0.3, 0.25)})
    assert sufficiency(exact, doubled(end=0.25 * 0.9801)).trained_enough is True
    assert sufficiency(exact, doubled(end=0.25 * 0.9799)).trained_enough is False
    assert sufficiency(exact, doubled(end=0.30)).trained_enough is True  # longer is worse


def test_reasons_have_the_numbers_and_are_one_line():
    warned = sufficiency(curves(retention=0.95), doubled(end=0.20)).reason
    assert warned.startswith("these dictionaries are not trained enough to compare: ")
    assert "0.960 (limit 0.9)" in warned
    assert "20.0 % (limit 2 %)" in warned
    assert "0.710 (limit 0.9)" in sufficiency(curves(), doubled()).reason
    assert "\n" not in warned


def test_a_reason_begins_with_what_is_violated_and_brackets_what_is_not():
    start = "their mean cosine to the start is {} (limit 0.9)".format
    fall = "twice the steps lower their FVU by {} % (limit 2 %)".format
    for retention, end, words in (
        (0.70, 0.20, f"{NOT_ENOUGH}: {fall('20.0')} [within its limit: {start('0.710')}]"),
        (0.95, 0.248, f"{NOT_ENOUGH}: {start('0.960')} [within its limit: {fall('0.8')}]"),
        (0.95, 0.20, f"{NOT_ENOUGH}: {start('0.960')}; {fall('20.0')}"),
        (0.70, 0.248, f"trained enough: {start('0.710')}; {fall('0.8')}"),
    ):
        assert sufficiency(curves(retention=retention), doubled(end=end)).reason == words


def test_without_a_doubled_training_only_a_warning_is_possible():
    found = sufficiency(curves())
    assert found.trained_enough is None
    assert math.isnan(found.fvu_fall_schedule)
    assert math.isnan(found.fvu_fall_beyond_schedule)
    assert found.fvu_fall == pytest.approx(1 - 0.24 / 0.31)
    assert found.reason.startswith("only the distance from the start was looked at: ")
    assert "no training twice as long" in found.reason
    warned = sufficiency(curves(retention=0.95))
    assert warned.trained_enough is False
    assert warned.reason.startswith(NOT_ENOUGH)


@pytest.mark.parametrize("fvu", [0.0, math.nan])
def test_an_fvu_that_cannot_be_divided_by_is_nan_with_a_reason(fvu):
    found = sufficiency(curves(fvus={0: (0.4, 0.3, fvu)}), doubled())
    assert found.trained_enough is None
    assert math.isnan(found.fvu_fall_beyond_schedule)
    assert "fvu_fall_beyond_schedule" in found.reason
    one_of_two = sufficiency(curves(fvus={0: (0.4, fvu, 0.25), 1: (0.4, 0.3, 0.25)}), doubled())
    assert math.isnan(one_of_two.fvu_fall)
    assert one_of_two.reason.endswith("to compare: fvu_fall")
    assert one_of_two.trained_enough is True


def test_a_training_without_a_checkpoint_has_no_fall():
    own = curves(steps=(100,), fvus={0: (0.25,)})
    found = sufficiency(own, doubled())
    assert math.isnan(found.fvu_fall)
    assert found.trained_enough is True
    assert "they were not judged before their end" in found.reason
    assert "undefined" not in found.reason


@pytest.mark.parametrize(
    ("own", "longer", "message"),
    [
        (curves().drop(columns="fvu"), None, "curves: the table has no column 'fvu'"),
        (curves()[:0], None, "curves: 0 rows"),
        (curves()[:-1], None, "curves: 5 rows for 2 seeds at 3 steps"),
        (pd.concat([curves(), curves()]), None, "curves: 12 rows"),
        (curves(), doubled(seed=7), r"doubled: of seeds \[7\]"),
        (curves(), curves(), r"doubled: of seeds \[0, 1\]"),
        (curves(), doubled(steps=(25, 50, 100, 199)), "must end at step 200"),
        (curves(), doubled(steps=(25, 50, 99, 200)), "have a row at 100"),
    ],
)
def test_wrong_tables_are_one_line(own, longer, message):
    with pytest.raises(UserError, match=message) as error:
        sufficiency(own, longer)
    assert "\n" not in str(error.value)


# ---- survival as a function of steps ----


def random_rows(seed, latents=20, d_model=6):
    rows = torch.randn(latents, d_model, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def leaving(start, end, steps=(0, 10, 100)):
    """step -> decoder on the way from `start` to `end`."""
    return {
        step: torch.nn.functional.normalize((1 - share) * start + share * end, dim=1)
        for step, share in zip(steps, (0.0, 0.4, 1.0), strict=True)
    }


def test_a_shared_start_alone_survives_and_is_left_step_by_step():
    """Two spaces with nothing in common: what the arm reports is the start, and it fades."""
    dense = {seed: leaving(random_rows(seed), random_rows(seed + 10)) for seed in (0, 1)}
    pruned = {seed: leaving(random_rows(seed), random_rows(seed + 20)) for seed in (0, 1)}
    rates = survival_by_step(dense, pruned, TAUS)
    shared = rates[(rates["arm"] == "shared_init") & (rates["tau"] == 0.7)]
    by_step = shared.groupby("step")["mnn"].mean()
    assert by_step[0] == 1.0
    assert by_step[0] > by_step[10] > by_step[100]
    cross = rates[(rates["arm"] == "cross_init") & (rates["tau"] == 0.7)]
    assert cross.groupby("step")["mnn"].mean()[0] < 0.5


def test_every_row_is_the_brute_force_comparison_at_its_step():
    dense = {seed: leaving(random_rows(seed), random_rows(seed + 10)) for seed in (2, 0, 1)}
    pruned = {seed: leaving(random_rows(seed + 30), random_rows(seed + 10)) for seed in (0, 1)}
    rates = survival_by_step(dense, pruned, TAUS)
    columns = ["step", "tau", "arm", "init_a", "init_b", "mnn", "one_way", "greedy"]
    assert list(rates.columns) == columns
    assert len(rates) == 3 * len(TAUS) * (2 + 4)
    assert not rates.duplicated(["step", "tau", "init_a", "init_b"]).any()
    for row in rates.itertuples():
        assert row.arm == ("shared_init" if row.init_a == row.init_b else "cross_init")
        cosines = matching.cosines(
            dense[row.init_a][row.step].numpy(), pruned[row.init_b][row.step].numpy()
        )
        assert row.mnn == pytest.approx(matching.mnn(cosines, row.tau))
        assert row.one_way == pytest.approx(matching.one_way(cosines, row.tau))
        assert row.greedy == pytest.approx(len(matching.greedy_pairs(cosines, row.tau)) / 20)


def test_steps_that_differ_are_refused_and_no_pairs_are_no_rows():
    early = leaving(random_rows(0), random_rows(1))
    late = leaving(random_rows(0), random_rows(1), steps=(0, 10, 200))
    with pytest.raises(UserError, match="pruned seed 0: has decoders at the steps"):
        survival_by_step({0: early}, {0: late}, TAUS)
    assert survival_by_step({0: early}, {}, TAUS).empty
    assert "mnn" in survival_by_step({}, {}, TAUS)


# ---- where checkpoints lie ----


def test_checkpoints_are_exact_shares_before_the_end():
    config = SufficiencyConfig()
    assert config.steps_at(500) == (62, 125, 250)
    assert config.steps_at(20_000) == (2500, 5000, 10_000)
    assert SufficiencyConfig(checkpoints=(0.29, 0.57)).steps_at(100) == (29, 57)  # not 28, 56
    assert (config.steps_at(3), config.steps_at(2), config.steps_at(1)) == ((1,), (1,), ())


@pytest.mark.parametrize("shares", [(), (0.5, 0.25), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0)])
def test_shares_that_do_not_rise_inside_0_and_1_are_refused(shares):
    with pytest.raises(ValueError, match=r"must rise|at least 1 item"):
        SufficiencyConfig(checkpoints=shares)


def test_a_warm_start_takes_a_quarter_of_the_steps_unless_told():
    assert SaeConfig(steps=500).resolved_warm_steps == 125
    assert SaeConfig(steps=500, warm_steps=7).resolved_warm_steps == 7
    assert SaeConfig(steps=3).resolved_warm_steps == 1
    with pytest.raises(ValueError, match="warm_steps"):
        SaeConfig(warm_steps=0)
