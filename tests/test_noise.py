"""What pruning does to all activations alike, and the null that is made of the rest."""

import numpy as np
import pytest
import torch
from tests.independent import noise as slow

from prunelens.analyses.noise import (
    KINDS,
    RANK,
    CommonChange,
    NullRows,
    common_change_table,
    fit_common_change,
    isotropic_noise_like,
    other_token,
    remainders,
)

WIDTH, TOKENS = 12, 400


class Rows:
    """Rows in memory."""

    def __init__(self, rows):
        self.all = rows

    def rows(self, index):
        return self.all[index]


class World:
    """y = m + A x + noise, of float32 rows; x's dimensions are correlated."""

    def __init__(self, kind="scalar", *, noise=0.3, seed=0, width=WIDTH):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        x = draw(TOKENS, width) @ (torch.eye(width) + 0.3 * draw(width, width)) + draw(width)
        self.m, gain = draw(width), torch.tensor(1.4)
        self.a = gain * torch.eye(width)
        if kind == "diagonal":
            self.a = torch.diag(gain + 0.2 * draw(width))
        if kind == "low_rank":
            self.a = self.a + 0.3 * draw(width, RANK) @ draw(RANK, width) / RANK**0.5
        y = x @ self.a.T + self.m + noise * draw(TOKENS, width)
        self.x, self.y = x.double().numpy(), y.double().numpy()
        self.dense, self.pruned = Rows(x), Rows(y)

    def fit(self, kind, tokens=None, **options):
        tokens = torch.arange(TOKENS) if tokens is None else tokens
        return fit_common_change(self.dense, self.pruned, tokens, kind=kind, **options)


def arrays(change):
    """(m, A) with A written out."""
    matrix = change.matrix.numpy()
    return change.shift.numpy(), np.diag(matrix) if matrix.ndim == 1 else matrix


# --- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("truth", KINDS)
def test_a_gain_is_that_of_least_squares(kind, truth, monkeypatch):
    monkeypatch.setattr("prunelens.analyses.noise.BATCH_TOKENS", 77)
    world, some = World(truth), torch.arange(TOKENS).flip(0)[30:333]
    found = arrays(world.fit(kind, some))
    expected = getattr(slow, kind)(world.x[some], world.y[some])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_a_dimension_that_never_varies_keeps_its_gain_of_one():
    world = World()
    world.dense.all[:, 3] = 2.0
    change = world.fit("diagonal")
    assert change.matrix[3] == 1
    assert torch.isfinite(change.matrix).all()
    mean = world.pruned.all[:, 3].double().mean()
    assert change.of(world.dense.all[:1])[0, 3] == pytest.approx(float(mean), rel=1e-5)
    low = world.fit("low_rank")
    assert torch.isfinite(low.matrix).all() and torch.isfinite(low.shift).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_that_kind_is_found_exactly(kind):
    world = World(kind, noise=0.0)
    shift, matrix = arrays(world.fit(kind))
    np.testing.assert_allclose(matrix, world.a.numpy(), atol=1e-4)
    np.testing.assert_allclose(shift, world.m.numpy(), atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_no_gain_plus_low_rank_leaves_less(seed):
    """Alternating regressions from a random start, and small changes of what was found."""
    world, some = World("low_rank", noise=1.0, seed=seed, width=10), torch.arange(120)
    generator = np.random.default_rng(seed)
    shift, matrix = arrays(world.fit("low_rank", some))
    x, y = world.x[some], world.y[some]
    left = slow.squared(slow.remainder(x, y, (shift, matrix)))
    other = slow.low_rank(x, y, RANK, generator, rounds=8)
    assert left <= slow.squared(slow.remainder(x, y, other)) * (1 + 1e-9)
    gain, (u, s, v) = _split(matrix)
    assert (s[RANK:] < 1e-6).all()
    for _ in range(20):
        size = 10.0 ** generator.uniform(-3, -1)
        du, dv = size * generator.normal(size=(2, len(u), RANK))
        factor = (u[:, :RANK] * s[:RANK] + du) @ (v[:RANK] + dv.T)
        nearby = (gain + size * generator.normal()) * np.eye(len(u)) + factor
        near = (y.mean(0) - nearby @ x.mean(0), nearby)
        assert left < slow.squared(slow.remainder(x, y, near))


def _split(matrix):
    """The gain that leaves the lowest rank, and the rest's singular vectors."""
    eigenvalues = np.linalg.eigvals(matrix)
    gain = min(
        eigenvalues.real,
        key=lambda g: np.linalg.svd(matrix - g * np.eye(len(matrix)))[1][RANK:].sum(),
    )
    return gain, np.linalg.svd(matrix - gain * np.eye(len(matrix)))


def test_a_finer_kind_leaves_no_more():
    world = World("low_rank", noise=0.5)
    left = {
        kind: slow.squared(slow.remainder(world.x, world.y, arrays(world.fit(kind))))
        for kind in KINDS
    }
    assert left["diagonal"] <= left["scalar"]
    assert left["low_rank"] <= left["scalar"]


# --- what it makes of activations -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_can_be_undone(kind):
    world = World(kind)
    change = world.fit(kind)
    assert change.can_be_undone
    found, x = change.of(world.dense.all), world.x
    shift, matrix = arrays(change)
    np.testing.assert_allclose(found, x @ matrix.T + shift, atol=1e-4)
    torch.testing.assert_close(change.undone(found), world.dense.all, atol=1e-4, rtol=1e-4)
    undone = change.undone(world.pruned.all)
    expected = slow.without_common_change(world.y, (shift, matrix))
    np.testing.assert_allclose(undone, expected, atol=1e-4)
    assert change.gain == pytest.approx(np.trace(matrix) / WIDTH)
    assert found.dtype == undone.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_that_leaves_nothing_of_a_direction_cannot_be_undone(kind):
    world = World(noise=0.01)
    direction = torch.eye(WIDTH)[0]
    kept = torch.zeros(()) if kind == "scalar" else 1 - direction
    world.pruned.all = world.dense.all * kept + 0.001 * world.pruned.all
    assert not world.fit(kind).can_be_undone


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_change_is_the_same(kind, tmp_path):
    change = World(kind).fit(kind, seed=7)
    change.save(tmp_path / "change.safetensors")
    again = CommonChange.load(tmp_path / "change.safetensors")
    assert all(torch.equal(*pair) for pair in zip(change, again, strict=True))
    assert int(again.seed) == 7


# --- the table ------------------------------------------------------------------------------------


def test_shares_equal_the_slow_sums_and_add_up_to_one(monkeypatch):
    monkeypatch.setattr("prunelens.analyses.noise.BATCH_TOKENS", 90)
    world = World("low_rank")
    first, second = torch.arange(250), torch.arange(250, TOKENS)
    changes = {kind: world.fit(kind, first) for kind in KINDS}
    table = common_change_table(world.dense, world.pruned, changes, second).set_index("kind")
    assert list(table.index) == list(KINDS)
    names = ["difference", "share_shift", "share_map", "share_remainder"]
    for kind, row in table.iterrows():
        expected = slow.shares(world.x[250:], world.y[250:], arrays(changes[kind]))
        np.testing.assert_allclose(row[names].astype(float), expected, rtol=1e-4, atol=1e-7)
        assert row[names[1:]].sum() == pytest.approx(1)
        assert row["gain"] == pytest.approx(changes[kind].gain)


def test_nothing_changed_has_no_shares():
    world = World()
    world.pruned = world.dense
    changes = {kind: world.fit(kind) for kind in KINDS}
    assert all(change.gain == pytest.approx(1) for change in changes.values())
    table = common_change_table(world.dense, world.dense, changes, torch.arange(100))
    assert (table["difference"] == 0).all()
    assert table[["share_shift", "share_map", "share_remainder"]].isna().all().all()


@pytest.mark.parametrize(("gain", "shift", "share"), [(1.7, 0.0, 1), (1.0, 3.0, 0)])
def test_a_gain_is_all_map_and_a_shift_is_no_map(gain, shift, share):
    world = World(noise=0.001)
    centred = world.dense.all - world.dense.all.mean(0)
    world.dense.all, world.pruned.all = centred, gain * centred + shift
    changes = {kind: world.fit(kind) for kind in KINDS}
    table = common_change_table(world.dense, world.pruned, changes, torch.arange(TOKENS))
    assert table["share_map"].to_numpy() == pytest.approx(share, abs=1e-6)
    assert table["share_shift"].to_numpy() == pytest.approx(1 - share, abs=1e-6)
    assert table["gain"].to_numpy() == pytest.approx(gain)


def test_what_is_particular_to_tokens_is_all_remainder():
    world = World()
    noise = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    world.pruned.all = world.dense.all + 0.5 * noise
    change = world.fit("scalar", torch.arange(200))
    table = common_change_table(
        world.dense, world.pruned, {"scalar": change}, torch.arange(200, TOKENS)
    )
    assert table["share_remainder"][0] == pytest.approx(1, abs=0.05)


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 10, 1001])
def test_every_token_gets_another_drawn_by_itself(number):
    generator = torch.Generator().manual_seed(0)
    partners = torch.stack([other_token(number, generator) for _ in range(200)])
    assert (partners != torch.arange(number)).all()
    assert partners.min() == 0
    assert partners.max() == number - 1
    used = torch.stack([each.bincount(minlength=number) for each in partners]).double()
    # Binomial: each of the others draws it with probability 1 / (number - 1).
    assert used.var(0).mean() == pytest.approx((number - 2) / (number - 1), abs=0.05)


def test_isotropic_noise_has_the_norm_of_each_difference_and_no_direction():
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(4000, 1, generator=generator) + 0.1
    difference = size * torch.eye(WIDTH)[0].expand(4000, -1)
    noise = isotropic_noise_like(difference, generator)
    torch.testing.assert_close(noise.norm(dim=1), size[:, 0])
    directions = noise / size
    assert directions.mean(0).abs().max() < 0.02
    torch.testing.assert_close(
        directions.T @ directions / 4000, torch.eye(WIDTH) / WIDTH, atol=0.01, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_gives_every_token_the_remainder_of_another(kind):
    world, tokens = World(kind), torch.arange(50, 350)
    change = world.fit(kind, seed=3)
    null = NullRows(world.dense, world.pruned, change, tokens)
    own = slow.remainder(world.x, world.y, arrays(change))[tokens]
    common = world.dense.all[tokens] @ torch.tensor(arrays(change)[1]).float().T
    found = null.rows(tokens) - (common + change.shift.float())
    distances = np.linalg.norm(found.numpy()[:, None] - own[None], axis=2)
    nearest = distances.argmin(1)
    assert distances.min(1).max() < 1e-4
    assert len(set(nearest)) > 150  # remainders of many tokens
    assert (nearest != np.arange(300)).all()  # and never a token's own
    torch.testing.assert_close(
        remainders(world.dense, world.pruned, change, tokens).double().numpy(),
        own,
        atol=1e-4,
        rtol=0,
    )


def test_the_null_knows_no_order_no_batch_and_no_sae():
    world, tokens = World(), torch.arange(50, 350)
    change = world.fit("scalar", seed=3)
    null = NullRows(world.dense, world.pruned, change, tokens)
    every = null.rows(tokens)
    some = torch.tensor([3, 299, 0, 17])
    torch.testing.assert_close(null.rows(tokens[some]), every[some])
    again = NullRows(world.dense, world.pruned, change, tokens)
    assert torch.equal(again.rows(tokens), every)


def test_two_conditions_have_different_nulls():
    """The same partners in both would make them agree where nothing is."""
    world, tokens = World(), torch.arange(300)
    first, second = (
        NullRows(world.dense, world.pruned, world.fit("scalar", seed=seed), tokens).rows(tokens)
        for seed in (1, 2)
    )
    assert (first - second).norm(dim=1).gt(1e-3).float().mean() > 0.98


def test_the_null_refuses_a_row_that_was_not_named():
    world = World()
    null = NullRows(world.dense, world.pruned, world.fit("scalar"), torch.arange(10, 20))
    with pytest.raises(AssertionError, match="not named"):
        null.rows(torch.tensor([12, 3]))
    with pytest.raises(IndexError):
        null.rows(torch.tensor([20]))


def test_what_is_left_of_a_pure_gain_is_nothing():
    world = World(noise=0.0)
    change = world.fit("scalar")
    assert change.gain == pytest.approx(1.4)
    tokens = torch.arange(TOKENS)
    null = NullRows(world.dense, world.pruned, change, tokens).rows(tokens)
    torch.testing.assert_close(null, world.pruned.all, atol=1e-4, rtol=1e-4)
