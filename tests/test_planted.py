"""The planted world is what methods §9 says, and knows what became of every direction."""

import math
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from prunelens import planted
from prunelens.analyses import simulation
from prunelens.analyses.fragility import fragility_contrasts
from prunelens.errors import UserError
from prunelens.planted import dense_world, pruned_world, world_activations
from prunelens.study.plan import plan_study
from prunelens.study_file import read_study

CHOICES = ("independent", "by_rate")  # of which fates there are
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def dense():
    return dense_world()


@pytest.fixture(scope="module", params=CHOICES)
def pruned(request, dense):
    return pruned_world(dense, request.param)


@pytest.fixture(scope="module")
def sampled(dense):
    return world_activations(dense, 40_000, tokens_seed=5, noise_seed=6)


def where(truth, *fates):
    return [i for i, fate in enumerate(truth.fates) if fate in fates]


def degrees(a, b):
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return torch.rad2deg(cosine.clamp(-1, 1).arccos())


def only(world, directions):
    """The world in which all others are silent, without gains and noise of its own."""
    silenced = torch.zeros(len(world.scales))
    silenced[directions] = 1.0
    unity = torch.ones_like(world.gains)
    return world._replace(scales=silenced, gains=unity, own_noise=torch.tensor(0.0))


def rare_are_destroyed(dense, truth):
    """Rank correlation of firing rate with being destroyed, over latents of either clear fate."""
    clear = where(truth, *planted.SURVIVES, *planted.DESTROYED)
    gone = [truth.fates[i] in planted.DESTROYED for i in clear]
    return spearmanr(dense.firing_rates[clear], gone).statistic


# ---- the dense world ----


def test_sizes_are_those_of_the_methods(dense):
    assert dense.directions.shape == (256, 2, 64)
    assert torch.equal(dense.directions[:, 0], dense.directions[:, 1])
    lengths = torch.linalg.vector_norm(dense.directions, dim=-1)
    torch.testing.assert_close(lengths, torch.ones(256, 2))
    assert torch.equal(dense.scales, torch.ones(256))
    assert sum(planted.PER_BLOCK.values()) == planted.BLOCK
    destroyed = sum(planted.PER_BLOCK[fate] for fate in planted.DESTROYED) / planted.BLOCK
    assert destroyed == planted.SHARE_DESTROYED


def test_firing_rates_have_a_heavy_tail(dense):
    """Those of a Pareto distribution between two bounds; a few fire most of the time."""
    rates = dense.firing_rates.double()
    assert rates.min() >= 0.0015
    assert rates.max() <= 0.15
    share = (rates**-0.6 - 0.15**-0.6) / (0.0015**-0.6 - 0.15**-0.6)
    evenly = torch.arange(256, 0, -1) / 257
    assert (share - evenly[rates.argsort().argsort()]).abs().max() < 0.09  # p about 0.03
    often = rates.sort().values[-51:].sum() / rates.sum()
    assert often > 0.6  # a fifth of them fires most


def test_directions_are_isotropic(dense):
    covariance = dense.directions[:, 0].T @ dense.directions[:, 0] / 256
    eigenvalues = torch.linalg.eigvalsh(covariance) * 64
    lowest, highest = (1 - 0.5) ** 2, (1 + 0.5) ** 2  # Marchenko-Pastur, with sqrt(64 / 256)
    assert 0.8 * lowest < eigenvalues.min() < eigenvalues.max() < 1.1 * highest


def test_tokens_fire_at_the_planted_rates_with_positive_strengths_that_spread(dense):
    """One direction at a time, the other 255 silenced and the noise taken away."""
    for index in dense.firing_rates.argsort()[[0, 128, 255]].tolist():
        x, noise = (
            world_activations(only(dense, chosen), 30_000, tokens_seed=1, noise_seed=2)
            for chosen in ([index], [])
        )
        strength = (x - noise) @ dense.directions[index, 0]
        fired = strength.abs() > 1e-5
        expected = float(dense.firing_rates[index])
        documents = 30_000 / planted.DOCUMENT_TOKENS
        bursts = math.exp(planted.BURSTS**2) - 1  # variance of what a document multiplies it by
        spread = math.sqrt(expected / 30_000 + expected**2 * bursts / documents)
        assert abs(float(fired.float().mean()) - expected) < 4 * spread
        assert (strength[fired] > 0).all()
        assert float(strength[fired].mean()) == pytest.approx(1.0, abs=0.25)
        assert 0.25 < float(strength[fired].std()) < 0.75


def test_noise_is_a_twentieth_of_the_variance_and_isotropic(dense, sampled):
    silent = only(dense, [])
    noise = world_activations(silent, 40_000, tokens_seed=5, noise_seed=6)
    signal = sampled - noise
    assert float(noise.var(0).sum() / signal.var(0).sum()) == pytest.approx(0.05, rel=0.02)
    deviations = noise.std(0)
    assert float(deviations.max() / deviations.min()) < 1.05


def test_a_document_fires_a_direction_more_or_less_often_than_others_do(dense):
    """Tokens of a document are dependent: counts vary far more than chance within one would."""
    index = int(dense.firing_rates.argsort()[200])
    x, noise = (
        world_activations(only(dense, chosen), 51_200, tokens_seed=1, noise_seed=2)
        for chosen in ([index], [])
    )
    fired = ((x - noise).norm(dim=1) > 1e-5).view(-1, planted.DOCUMENT_TOKENS).sum(1).double()
    assert fired.var() > 2 * fired.mean()  # of a Poisson number it would be the mean
    halves = ((x - noise).norm(dim=1) > 1e-5).view(-1, 2, 128).sum(2).double()
    assert np.corrcoef(halves.T)[0, 1] > 0.3  # one half of a document tells of the other
    strangers = np.corrcoef(halves[:-1, 0], halves[1:, 1])[0, 1]
    assert abs(strangers) < 0.25


def test_documents_are_numbered_from_0():
    documents = planted.document_of(1000)
    assert documents.tolist() == [token // 256 for token in range(1000)]


def test_directions_fire_independently(dense):
    """The variance of a sum of independent firings is the sum of theirs, but for bursts."""
    x = world_activations(dense, 40_000, tokens_seed=3, noise_seed=4)
    rates = dense.firing_rates
    variances = rates * 1.25 - rates**2
    rows = dense.directions[:, 0]
    expected = torch.einsum("i,ia,ib->ab", variances, rows, rows)
    found = torch.cov(x.T) - 0.05 * variances.sum() / 64 * torch.eye(64)
    assert float((found - expected).norm() / expected.norm()) < 0.12


def test_equal_seeds_give_equal_worlds_and_tokens(dense):
    again = dense_world()
    assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))
    assert not torch.equal(dense.directions, dense_world(seed=1).directions)
    for choice in CHOICES:
        (world, truth), (other, truth_again) = (
            pruned_world(dense, choice),
            pruned_world(dense, choice),
        )
        assert all(torch.equal(a, b) for a, b in zip(world, other, strict=True))
        assert truth.fates == truth_again.fates
    x, y = (world_activations(dense, 500, tokens_seed=1, noise_seed=1) for _ in range(2))
    assert torch.equal(x, y)


def test_the_world_draws_nothing_from_the_global_generator(dense):
    before = torch.random.get_rng_state()
    world, _ = pruned_world(dense_world(), "by_rate")
    world_activations(world, 100, tokens_seed=0, noise_seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- what pruning does ----


@pytest.mark.parametrize("seed", SEEDS)
def test_both_worlds_have_the_same_number_of_every_fate(seed):
    dense = dense_world(seed=seed)
    counts = [Counter(pruned_world(dense, choice, seed=seed)[1].fates) for choice in CHOICES]
    assert counts[0] == counts[1]
    assert counts[0]["merged"] % 2 == 0
    assert sum(counts[0].values()) == 256
    destroyed = counts[0]["removed"] + counts[0]["rotated"]
    assert destroyed / 256 == pytest.approx(planted.SHARE_DESTROYED, abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_fates_follow_firing_rate_in_one_world_alone(seed):
    dense = dense_world(seed=seed)
    _, independent = pruned_world(dense, "independent", seed=seed)
    _, by_rate = pruned_world(dense, "by_rate", seed=seed)
    assert abs(rare_are_destroyed(dense, independent)) < 0.06  # chance alone would give 0.07
    assert rare_are_destroyed(dense, by_rate) < -0.3


def test_kept_directions_hardly_turn_and_rotated_ones_turn_away(dense, pruned):
    world, truth = pruned
    turned = degrees(dense.directions[:, 0], world.directions[:, 0])
    kept, rotated = where(truth, "kept"), where(truth, "rotated")
    assert turned[kept].max() <= 15.01
    assert turned[rotated].min() >= 74.99
    assert turned[rotated].max() <= 90.01
    assert turned[kept].max() - turned[kept].min() > 10  # over all of the range
    torch.testing.assert_close(truth.angles[kept].double(), turned[kept], atol=0.05, rtol=0)
    torch.testing.assert_close(truth.angles[rotated].double(), turned[rotated], atol=0.05, rtol=0)


def test_rescaled_directions_keep_their_place(dense, pruned):
    world, truth = pruned
    rescaled = where(truth, "rescaled")
    assert torch.equal(world.directions[rescaled], dense.directions[rescaled])
    assert (truth.angles[rescaled] == 0).all()
    scales = world.scales[rescaled]
    assert 0.7 <= scales.min() < 0.9
    assert 1.1 < scales.max() <= 2.0
    changed = ("rescaled", "weakened", "removed")
    others = [i for i in range(256) if truth.fates[i] not in changed]
    assert (world.scales[others] == 1).all()


def test_of_some_directions_a_part_survives(dense, pruned):
    world, truth = pruned
    weakened, turned = where(truth, "weakened"), where(truth, "turned")
    assert torch.equal(world.directions[weakened], dense.directions[weakened])
    assert 0.1 <= world.scales[weakened].min() < 0.25
    assert 0.55 < world.scales[weakened].max() <= 0.7
    angles = degrees(dense.directions[:, 0], world.directions[:, 0])[turned]
    assert 14.99 <= angles.min() < 25
    assert 65 < angles.max() <= 75.01


def test_the_share_that_survives_is_what_a_regression_finds(dense, pruned):
    """Of the strength along the earlier direction, at most all of it."""
    world, truth = pruned
    strength = torch.rand(100, generator=torch.Generator().manual_seed(0)).double() + 0.1
    for fate in ("kept", "rescaled", "weakened", "turned", "removed", "rotated"):
        index = truth.fates.index(fate)
        after = strength[:, None] * world.scales[index] * world.directions[index, 0].double()
        left = (after @ dense.directions[index, 0].double()) @ strength / (strength @ strength)
        expected = min(max(float(left), 0.0), 1.0)
        assert float(truth.shares[index]) == pytest.approx(expected, abs=1e-5), fate
    assert (truth.shares[where(truth, "split", "merged")] == 0.5).all()
    assert truth.shares[where(truth, *planted.SURVIVES)].min() > 0.69
    assert truth.shares[where(truth, *planted.DESTROYED)].max() < 0.26


@pytest.mark.parametrize("choice", planted.CHOICES)
def test_pruned_activations_have_a_gain_and_every_dimension_one_of_its_own(dense, choice):
    """Where no direction changes (`none`), a regression finds the gains and nothing else."""
    world, _ = pruned_world(dense, choice)
    spread = world.gains.log() - math.log(1.3)
    assert abs(float(spread.mean())) < 4 * 0.15 / 8
    assert 0.1 < float(spread.std()) < 0.2
    if choice == "none":
        x = world_activations(dense, 20_000, tokens_seed=1, noise_seed=1)
        y = world_activations(world, 20_000, tokens_seed=1, noise_seed=2)
        x, y = x - x.mean(0), y - y.mean(0)
        slopes = (x * y).sum(0) / x.square().sum(0)
        torch.testing.assert_close(slopes, world.gains, atol=0.05, rtol=0)
        rest = y - x * world.gains
        along = rest @ dense.directions[:, 0].T
        fires = x @ dense.directions[:, 0].T
        related = (along * fires).mean(0) / (along.std(0) * fires.std(0))
        assert related.abs().max() < 5 / math.sqrt(20_000)  # of 256: nothing of any feature


def test_where_nothing_happens_every_direction_is_kept(dense):
    world, truth = pruned_world(dense, "none")
    assert torch.equal(world.directions, dense.directions)
    assert torch.equal(world.scales, dense.scales)
    assert set(truth.fates) == {"kept"}
    assert (truth.angles == 0).all()
    assert (truth.shares == 1).all()
    noise = (
        world_activations(
            only(w, [])._replace(own_noise=w.own_noise), 5000, tokens_seed=1, noise_seed=3
        )
        for w in (dense, world)
    )
    quiet, loud = (float(each.var(0).sum()) for each in noise)
    assert loud / quiet == pytest.approx(0.55 / 0.05, rel=0.05)


def test_by_lot_the_number_of_a_fate_varies():
    dense = dense_world()
    counts = [
        Counter(pruned_world(dense, "independent", seed=seed, by_lot=True)[1].fates)
        for seed in range(12)
    ]
    removed = [count["removed"] for count in counts]
    assert len(set(removed)) > 5
    assert abs(np.mean(removed) - 256 * 3 / 20) < 4 * math.sqrt(256 * 0.15 * 0.85 / 12)
    assert all(count["merged"] % 2 == 0 for count in counts)


def test_other_sizes_make_a_world_as_well():
    world = dense_world(num_directions=30, d_model=8, firing_rates=(0.01, 0.1))
    changed, truth = pruned_world(world, "by_rate")
    assert changed.directions.shape == (30, 2, 8)
    assert len(truth.fates) == 30
    assert world_activations(changed, 300, tokens_seed=0, noise_seed=0).shape == (300, 8)


def test_split_halves_lie_on_either_side_of_what_they_were(dense, pruned):
    world, truth = pruned
    split = where(truth, "split")
    before, (one, other) = dense.directions[split, 0], world.directions[split].unbind(1)
    for half in (one, other):
        torch.testing.assert_close(
            degrees(before, half), torch.full((len(split),), 30.0).double(), atol=0.01, rtol=0
        )
    torch.testing.assert_close(
        degrees(one, other), torch.full((len(split),), 60.0).double(), atol=0.01, rtol=0
    )
    assert truth.angles[split].isnan().all()
    whole = [i for i in range(256) if truth.fates[i] != "split"]
    assert torch.equal(world.directions[whole, 0], world.directions[whole, 1])


def test_merged_directions_are_pairs_that_share_one_between_them(dense, pruned):
    world, truth = pruned
    merged = where(truth, "merged")
    rows = world.directions[merged, 0]
    partners = [torch.nonzero((rows == row).all(1)).flatten().tolist() for row in rows]
    assert all(len(pair) == 2 for pair in partners)
    for index, pair in enumerate(partners):
        a, b = (dense.directions[merged[i], 0] for i in pair)
        torch.testing.assert_close(
            degrees(rows[index], a), degrees(rows[index], b), atol=0.01, rtol=0
        )
        assert torch.linalg.matrix_rank(torch.stack([rows[index], a, b]), rtol=1e-4) == 2
    assert truth.angles[merged].isnan().all()


def test_removed_directions_contribute_nothing(dense, pruned):
    world, truth = pruned
    removed = where(truth, "removed")
    assert (world.scales[removed] == 0).all()
    assert truth.angles[removed].isnan().all()
    elsewhere = world.directions.clone()
    elsewhere[removed] = -elsewhere[removed]
    x, y = (
        world_activations(w, 2000, tokens_seed=1, noise_seed=1)
        for w in (world, world._replace(directions=elsewhere))
    )
    assert torch.equal(x, y)


# ---- paired tokens ----


def test_the_same_tokens_fire_before_and_after(dense, pruned):
    """A kept direction is read as before; a removed one is not, but for what overlaps with it."""
    world, truth = pruned
    x = world_activations(dense, 20_000, tokens_seed=1, noise_seed=1)
    y = world_activations(world, 20_000, tokens_seed=1, noise_seed=1001)
    often = dense.firing_rates > 0.02
    kept = [i for i in where(truth, "kept") if often[i]]
    removed = [i for i in where(truth, "removed") if often[i]]

    def correlations(before, after, chosen):
        """Of what is read along each direction, in the dense world's and its own place."""
        a = (before @ dense.directions[chosen, 0].T).numpy()
        b = (after @ world.directions[chosen, 0].T).numpy()
        return np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(len(chosen))])

    assert correlations(x, y, kept).min() > 0.5
    assert correlations(x, y, removed).mean() < correlations(x, y, kept).mean() - 0.15
    unpaired = world_activations(world, 20_000, tokens_seed=2, noise_seed=1001)
    assert np.abs(correlations(x, unpaired, kept)).max() < 0.05


def test_a_token_is_the_same_before_and_after_but_for_noise_of_the_conditions_own(dense):
    x, y = (world_activations(dense, 3000, tokens_seed=1, noise_seed=n) for n in (1, 1001))
    assert torch.equal(x, y)  # the dense world has none
    noisy = dense._replace(own_noise=torch.tensor(0.5))
    p, q = (world_activations(noisy, 3000, tokens_seed=1, noise_seed=n) - x for n in (1, 1001))
    assert abs(np.corrcoef(p.flatten(), q.flatten())[0, 1]) < 0.01
    assert abs(np.corrcoef(p.flatten(), x.flatten())[0, 1]) < 0.01
    assert float(p.var(0).max() / p.var(0).min()) < 1.3


def test_a_split_direction_fires_in_one_half_or_the_other(dense, pruned):
    world, truth = pruned
    index = max(where(truth, "split"), key=lambda i: float(dense.firing_rates[i]))
    x, noise = (
        world_activations(only(world, chosen), 20_000, tokens_seed=1, noise_seed=1)
        for chosen in ([index], [])
    )
    signal = x - noise
    fired = signal[signal.norm(dim=1) > 1e-5]
    cosines = torch.nn.functional.normalize(fired) @ world.directions[index].T
    halves = (cosines > 0.999).sum(0)
    assert halves.sum() == len(fired)  # every firing points along exactly one half
    assert 0.35 < float(halves[0] / len(fired)) < 0.65


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sae.k", "9999", "sae.k: 9999 is more than the 256 latents"),
        ("sae.batch_tokens", "999999", "sae.batch_tokens: 999999 is more than"),
        ("activations.skip_first", "3", "activations.skip_first: 3 means nothing in the planted"),
        ("activations.storage", "bfloat16", "activations.storage: 'bfloat16' means nothing"),
        ("models", "[{name: planted, layers: [1]}]", "the planted world has only [0]"),
        (
            "prunings",
            "[{criterion: planted, scope: by_rate, sparsities: [0.5]}]",
            "0.5 is not the share of directions that the planted world loses; give [0.3]",
        ),
    ],
)
def test_a_study_of_the_planted_world_refuses_what_means_nothing_there(field, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_study(read_study("selftest", {field: value}))


# ---- small studies of it ----


@pytest.fixture(scope="module")
def simulated():
    """Two sets without an effect: condition -> fates, set by set."""
    return list(simulation.simulated_fates("none", [4, 5]))


def test_equal_numbers_give_equal_sets_whatever_lies_beside_them(simulated):
    """But for what shuffles tokens, which is drawn for all sets of a pass together."""
    drawn = ["seed", "latent", "firing_rate", "firing_rate_first_half", "persistence"]
    alone, again = (next(simulation.simulated_fates("none", [5])) for _ in range(2))
    for name in simulation.CONDITIONS:
        pd.testing.assert_frame_equal(alone[name], again[name])
        found = alone[name][drawn].reset_index(drop=True)
        known = simulated[1][name][drawn].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, known, rtol=1e-3, atol=1e-4)
    assert not alone["wanda"]["persistence"].equals(simulated[0]["wanda"]["persistence"])


def test_a_simulated_set_has_both_seeds_with_most_of_the_directions(simulated):
    for fates in simulated[0].values():
        assert list(fates.groupby("seed").size()) == [simulation.NUM_LATENTS] * 2
        assert (fates["firing_rate"] > 0).mean() > 0.9
        assert fates["persistence_null"].notna().mean() > 0.9


def test_where_nothing_happened_a_simulated_study_finds_no_contrast(simulated):
    """And where rare directions are destroyed more often it finds that they are."""
    destroyed = simulation.simulated_fates("by_rate", [4, 5])
    for sets, expected in ((simulated, 0.0), (destroyed, -0.41)):
        tables = [fragility_contrasts(fates) for each in sets for fates in each.values()]
        rows = pd.concat(tables)
        rows = rows[(rows["measure"] == "relative_shuffled") & (rows["group"] == "Q1 - Q5")]
        mean = rows.groupby("source")["value"].mean()
        assert mean["pruned"] == pytest.approx(expected, abs=0.15)
        assert mean["null"] == pytest.approx(0.0, abs=0.05)
