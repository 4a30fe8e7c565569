import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.independent import matching
from torch.nn.functional import normalize

from prunelens import match as module
from prunelens.match import match_dictionaries, match_rates, match_similarities

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9)


def exact_rows(number: int, seed: int, width: int = 8) -> torch.Tensor:
    """Rows with four entries of +-1: every cosine is a multiple of 1/4, exactly, with many ties."""
    generator = np.random.default_rng(seed)
    rows = np.zeros((number, width), dtype=np.float32)
    for row in rows:
        row[generator.choice(width, 4, replace=False)] = generator.choice([-1.0, 1.0], 4)
    return torch.from_numpy(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "limit"), [(1024, 10**6), (5, 10**6), (5, 7)])
def test_equals_brute_force_ties_included(monkeypatch, seed, block, limit):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    monkeypatch.setattr(module, "MAX_PAIRS", limit)
    a, b = exact_rows(23, seed), exact_rows(31, seed + 100)
    c = matching.cosines(a.numpy(), b.numpy())
    found = match_dictionaries(a, b)
    for tau in TAUS:
        rates = match_rates(found, tau)
        assert rates.one_way == matching.one_way(c, tau)
        assert rates.mnn == matching.mnn(c, tau)
        assert rates.greedy == len(matching.greedy_pairs(c, tau)) / len(a)
        assert rates.one_way_reverse == matching.one_way(c.T, tau)
    pairs = matching.greedy_pairs(c, 0.5)
    expected = np.array([c[i, pairs[i]] if i in pairs else np.nan for i in range(len(a))])
    np.testing.assert_array_equal(found.greedy_similarity_a, expected.astype(np.float32))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 3, 16]))
@settings(max_examples=60, deadline=None)
def test_rates_are_ordered_and_fall_with_tau(seed, num_a, num_b, width):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_a, width, generator=generator)
    b = torch.cat([torch.randn(num_b, width, generator=generator), a[: num_a // 2]])
    rows = [match_rates(match_dictionaries(a, b), tau) for tau in TAUS]
    for row in rows:
        assert row.mnn <= row.greedy <= row.one_way
    for lower, higher in itertools.pairwise(rows):
        assert all(high <= low for low, high in zip(lower[1:], higher[1:], strict=True))


def test_a_permuted_and_rescaled_copy_matches_perfectly():
    a = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(300, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    found = match_dictionaries(a, (a * scale)[order])
    assert (order[torch.from_numpy(found.best_in_b)] == torch.arange(300)).all()
    assert set(match_rates(found, 0.9)[1:]) == {1.0}
    assert set(match_rates(match_dictionaries(a, a), 0.9)[1:]) == {1.0}


def test_many_candidates_are_visited_in_bands_with_the_same_result(monkeypatch):
    a = torch.randn(200, 4, generator=torch.Generator().manual_seed(3))
    b = torch.randn(180, 4, generator=torch.Generator().manual_seed(4))
    cosines = normalize(a) @ normalize(b).T
    asked = []

    def similarities(first, last):
        asked.append((first, last))
        return cosines[first:last]

    whole = match_similarities(similarities, 200, 180, lowest_tau=0.5)
    assert asked == [(0, 200)]
    monkeypatch.setattr(module, "MAX_PAIRS", 500)
    monkeypatch.setattr(module, "BLOCK_ROWS", 70)
    banded = match_similarities(similarities, 200, 180, lowest_tau=0.5)
    assert asked.count((140, 200)) > 3, "the test wants several bands"
    for one, other in zip(whole, banded, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_the_rows_looked_at_in_one_go_change_nothing(monkeypatch, tile):
    a, b = exact_rows(50, 0), exact_rows(40, 1)
    whole = match_dictionaries(a, b)
    monkeypatch.setattr(module, "TILE_ROWS", tile)
    for one, other in zip(whole, match_dictionaries(a, b), strict=True):
        np.testing.assert_array_equal(one, other)


def test_clusters_with_many_pairs_above_tau_equal_brute_force(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 24, generator=generator)
    a, b = (
        centres[torch.randint(4, (n,), generator=generator)]
        + 0.5 * torch.randn(n, 24, generator=generator)
        for n in (60, 70)
    )
    c = matching.cosines(a.double().numpy(), b.double().numpy())
    assert (c > 0.5).sum() > 600
    for limit in (10**6, 100):
        monkeypatch.setattr(module, "MAX_PAIRS", limit)
        found = match_dictionaries(a, b)
        pairs = matching.greedy_pairs(c, 0.5)
        expected = [c[i, pairs[i]] if i in pairs else np.nan for i in range(60)]
        np.testing.assert_allclose(found.greedy_similarity_a, expected, atol=1e-6)
        np.testing.assert_array_equal(found.best_in_b, c.argmax(1))
        np.testing.assert_array_equal(found.best_in_a, c.argmax(0))


def test_a_row_of_zeros_matches_nothing():
    a = torch.zeros(3, 5)
    b = torch.eye(5)
    assert set(match_rates(match_dictionaries(a, b), 0.5)[1:]) == {0.0}


def test_a_tau_below_what_was_sought_is_our_bug():
    found = match_dictionaries(torch.eye(3), torch.eye(3), lowest_tau=0.7)
    with pytest.raises(AssertionError, match="not sought"):
        match_rates(found, 0.6)


@pytest.mark.parametrize(("block", "limit"), [(1024, 10**6), (5, 7)])
def test_any_similarity_can_be_matched(monkeypatch, block, limit):
    """Not symmetric, negative values, many ties; asked for block by block, again where need be."""
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    monkeypatch.setattr(module, "MAX_PAIRS", limit)
    c = np.random.default_rng(0).integers(-4, 5, (23, 31)) / 4
    table = torch.from_numpy(c.astype(np.float32))
    found = match_similarities(lambda first, last: table[first:last], 23, 31, lowest_tau=0.5)
    np.testing.assert_array_equal(found.best_in_b, c.argmax(1))
    np.testing.assert_array_equal(found.similarity_a, c.max(1))
    np.testing.assert_array_equal(found.best_in_a, c.argmax(0))
    np.testing.assert_array_equal(found.similarity_b, c.max(0))
    for tau in TAUS:
        rates = match_rates(found, tau)
        assert rates.mnn == matching.mnn(c, tau)
        assert rates.greedy == len(matching.greedy_pairs(c, tau)) / 23
