"""Same-dictionary persistence: every source from its definition, and what it says of nothing."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tests.independent import persistence as slow
from tests.independent import sae as slow_sae
from tests.independent import statistics as slow_statistics

from prunelens.analyses.noise import CommonChange, fit_common_change
from prunelens.analyses.persistence import (
    DRAWS,
    SOURCES,
    persistence,
    persistence_summary,
    ratio_to,
    relative_error,
    relative_to_noise,
)
from prunelens.analyses.statistics import crossed, difference
from prunelens.sae.topk import TopKSAE

WIDTH, TOKENS, GROUPS = 8, 320, 6
WORLDS = 16  # of nothing


class Rows:
    """Rows in memory."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, index):
        return self._rows[index]


def sae_of(width, num_latents, k, biases, *, seed=0):
    sae = TopKSAE.initialise(width, num_latents, k, init_seed=seed)
    with torch.no_grad():
        sae.encoder_bias.copy_(torch.as_tensor(biases, dtype=torch.float32))
    return sae


@pytest.fixture
def world():
    """Rare, frequent and dead latents; the first fires in one group of documents alone.

    All latents are kept, so that nothing hangs on which of two nearly equal ones is.
    """
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(TOKENS + 30, WIDTH, generator=generator)
    tokens = torch.arange(30, TOKENS + 30).flip(0)
    groups = torch.tensor([0] * 20 + [1] * 100 + [2] * 60 + [3] * 40 + [4] * 80 + [5] * 20)
    dense[tokens, 0] = torch.where(groups == 2, dense[tokens, 0].abs() + 2, -4.0)
    noise = torch.randn(TOKENS + 30, WIDTH, generator=generator)
    pruned = 1.3 * dense + 0.5 * noise + 0.2 * dense.roll(1, 1)
    sae = sae_of(WIDTH, 14, 14, [0, -9, *torch.linspace(0.3, -2.2, 12)])
    with torch.no_grad():
        sae.encoder_weight[0] = torch.eye(WIDTH)[0]
    return SimpleNamespace(
        sae=sae, x=dense, y=pruned, dense=Rows(dense), pruned=Rows(pruned), tokens=tokens,
        groups=groups,
    )  # fmt: skip


def measured(world, change=None, *, kind="scalar", seed=2, **changed):
    """The table, around a change that is fitted on all rows."""
    world = SimpleNamespace(**(vars(world) | changed))
    every = torch.arange(TOKENS + 30)
    change = change or fit_common_change(world.dense, world.pruned, every, kind=kind, seed=5)
    args = world.sae, world.dense, world.pruned, world.tokens
    return persistence(*args, change=change, groups=world.groups, seed=seed), change


def of(table, source):
    return table[table["source"] == source].reset_index(drop=True)


def series(sae, rows):
    encoder, bias = (w.detach().double().numpy() for w in sae.weights[:2])
    return slow_sae.encode(np.asarray(rows, dtype=float), encoder, bias, sae.k).T


# --- from the definitions -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalar", "low_rank"])
def test_every_source_equals_the_slow_definition(world, kind):
    table, change = measured(world, kind=kind)
    assert list(table["source"].unique()) == list(SOURCES) == list(DRAWS)
    matrix = change.matrix.numpy()
    common = change.shift.numpy(), np.diag(matrix) if matrix.ndim == 1 else matrix
    x, y = (rows[world.tokens].double().numpy() for rows in (world.x, world.y))
    groups = world.groups.numpy()
    before, expected = series(world.sae, x), {}
    disturbed = slow.disturbed(x, y, common, groups, change_seed=5, seed=2)
    assert {source: len(draws) for source, draws in disturbed.items()} == DRAWS
    for source, draws in disturbed.items():
        found, after = of(table, source), [series(world.sae, rows) for rows in draws]
        assert found["latent"].tolist() == list(range(14))
        assert found["dense_firings"].tolist() == (before > 0).sum(1).tolist()
        np.testing.assert_allclose(
            found["firings"], np.mean([(a > 0).sum(1) for a in after], axis=0)
        )
        for latent in range(14):
            parts = [slow.persistence(before[latent], a[latent]) for a in after]
            correlation, jaccard, silenced = (list(part) for part in zip(*parts, strict=True))
            row = found.loc[latent]
            np.testing.assert_allclose(row["draws"], correlation, atol=1e-5)
            assert row["correlation"] == pytest.approx(np.mean(correlation), abs=1e-5, nan_ok=True)
            z = np.mean(np.arctanh(correlation))
            assert row["fisher_z"] == pytest.approx(z, abs=1e-4, nan_ok=True)
            assert row["jaccard"] == pytest.approx(np.mean(jaccard), abs=1e-9, nan_ok=True)
            assert row["silenced"] == all(silenced)
            without = [slow.without(before[latent], a[latent], groups.tolist()) for a in after]
            np.testing.assert_allclose(row["without"], np.mean(without, axis=0), atol=1e-5)
            expected[source, latent] = row["without"]
    assert np.isnan(expected["pruned", 0]).tolist() == [g == 2 for g in range(GROUPS)]
    assert of(table, "pruned")["correlation"].isna().sum() == 2  # dead, or too few firings
    assert of(table, "undone")["correlation"].notna().sum() == 12


def test_batches_change_nothing_but_the_draws_of_isotropic_noise(world, monkeypatch):
    whole, _ = measured(world)
    monkeypatch.setattr("prunelens.analyses.persistence.BATCH_TOKENS", 17)
    batched, _ = measured(world)
    for source in SOURCES:
        a, b = (of(table, source)["correlation"] for table in (whole, batched))
        tolerance = 0.3 if source == "noise_isotropic" else 1e-6
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_without_a_group_is_what_the_other_documents_say_alone(world):
    """Re-encoded: the tokens that remain, on which nothing else was ever looked at."""
    table, change = measured(world)
    enough = of(table, "pruned")["dense_firings"] >= 10
    for group in range(GROUPS):
        rest = world.groups != group
        numbers = world.groups[rest] - (world.groups[rest] > group).long()
        other, _ = measured(world, change, tokens=world.tokens[rest], groups=numbers)
        for source in ("pruned", "undone"):
            own, again = of(table, source), of(other, source)
            both = enough & (again["dense_firings"] >= 10)
            assert both.sum() > 8
            left = np.stack(own["without"])[:, group]
            np.testing.assert_allclose(left[both], again["correlation"][both], atol=1e-9)


def test_the_summary_holds_pruned_and_null_against_noise(world):
    table, _ = measured(world)
    summary = persistence_summary(table).set_index("source")
    assert list(summary.index) == list(SOURCES)
    for source in SOURCES:
        rows = of(table, source)[["correlation", "jaccard", "silenced"]].to_numpy().tolist()
        for name, value in slow.summary(rows).items():
            assert summary.loc[source, name] == pytest.approx(value), name
    for source in ("pruned", "null"):
        own = of(table, source)
        for noise in ("isotropic", "shuffled"):
            other = of(table, f"noise_{noise}")
            ratio = own["correlation"].mean() / other["correlation"].mean()
            row, name = summary.loc[source], f"relative_{noise}"
            assert row[name] == pytest.approx(ratio)
            assert math.isnan(row[f"{name}_low"])  # too few latents
        z = own["fisher_z"] - of(table, "noise_shuffled")["fisher_z"]
        assert summary.loc[source, "excess_z"] == pytest.approx(z.mean())
    beside = summary.loc[["undone", "noise_isotropic", "noise_shuffled", "difference_shuffled"]]
    columns = ["excess_z", "relative_isotropic", "relative_shuffled", "relative_shuffled_low"]
    assert beside[columns].isna().all().all()


# --- what is undefined ----------------------------------------------------------------------------


def test_a_silenced_latent_counts_as_zero(world):
    direction = world.sae.encoder_weight.detach()[3]
    pruned = -5 * direction + 0.01 * world.x
    table, _ = measured(world, pruned=Rows(pruned), y=pruned)
    row = of(table, "pruned").loc[3]
    assert row["silenced"]
    assert row["correlation"] == 0.0
    assert (row["without"] == 0).all()
    assert persistence_summary(table).set_index("source").loc["pruned", "num_silenced"] >= 1


def test_few_firings_are_undefined_whatever_is_disturbed(world):
    table, _ = measured(world, tokens=world.tokens[:30], groups=world.groups[:30])
    few = table["dense_firings"] < 10
    assert few.any() and not few.all()
    assert table.loc[few, ["correlation", "fisher_z", "jaccard"]].isna().all().all()
    assert not table.loc[few, "silenced"].any()
    assert np.isnan(np.stack(table.loc[few, "without"])).all()
    assert table.loc[~few & (table["source"] == "pruned"), "correlation"].notna().all()
    summary = persistence_summary(table).set_index("source")
    count = few[table["source"] == "pruned"].sum()
    assert (summary["num_undefined"] == count).all()
    assert summary[["relative_shuffled_low", "relative_isotropic_high"]].isna().all().all()


def test_what_cannot_be_undone_is_undefined(world):
    nearly_nothing = torch.full((WIDTH,), 1.0, dtype=torch.float64)
    nearly_nothing[2] = 0.01
    change = CommonChange(
        torch.zeros(WIDTH, dtype=torch.float64), nearly_nothing, torch.tensor(0)
    )  # fmt: skip
    table, _ = measured(world, change)
    undone = of(table, "undone")
    assert undone[["correlation", "fisher_z", "jaccard"]].isna().all().all()
    assert not undone["silenced"].any()
    assert of(table, "pruned")["correlation"].notna().sum() == 12
    summary = persistence_summary(table).set_index("source")
    assert summary.loc["undone", "num_undefined"] == 14
    assert np.isfinite(summary.loc["pruned", "relative_shuffled"])


# --- the null and the noise -----------------------------------------------------------------------


def test_the_null_and_the_pruned_activations_are_the_same_for_every_sae(world):
    first, second = (measured(world, seed=seed)[0] for seed in (1, 2))
    for source in SOURCES:
        a, b = (of(table, source)["correlation"].dropna() for table in (first, second))
        same = np.array_equal(a, b)
        assert same == (source in ("pruned", "undone", "null")), source


def test_conditions_draw_their_own_noise_and_equal_seeds_the_same(world):
    change = measured(world)[1]
    first, again = (measured(world, change)[0] for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    other = measured(world, change._replace(seed=torch.tensor(6)))[0]
    for source in SOURCES:
        a, b = (of(table, source)["correlation"].dropna() for table in (first, other))
        assert np.array_equal(a, b) == (source in ("pruned", "undone")), source


def test_nothing_changed_is_persistence_of_one_everywhere(world):
    table, _ = measured(world, pruned=world.dense, y=world.x)
    known = table.dropna(subset="correlation")
    assert len(known) == 12 * len(SOURCES)
    np.testing.assert_allclose(known["correlation"], 1.0, atol=1e-6)
    np.testing.assert_allclose(known["jaccard"], 1.0, atol=0.02)
    assert not table["silenced"].any()


def test_a_pure_gain_is_told_from_noise_exactly():
    """On so coarse a grid that nothing is rounded: there is no remainder, so no noise at all."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randint(-16, 17, (1024, WIDTH), generator=generator) / 8
    shift = torch.randint(-8, 9, (WIDTH,), generator=generator) / 4
    pruned = 1.75 * dense + shift
    first, second = torch.arange(512), torch.arange(512, 1024)
    change = fit_common_change(Rows(dense), Rows(pruned), first)
    assert change.gain == 1.75
    assert torch.equal(change.shift, shift.double())
    sae = sae_of(WIDTH, 20, 20, torch.linspace(0.2, -1.5, 20))
    table = persistence(
        sae, Rows(dense), Rows(pruned), second, change=change,
        groups=torch.arange(512) // 64, seed=0,
    )  # fmt: skip
    own = of(table, "pruned")
    gained = [series(sae, rows[second]) for rows in (dense, pruned)]
    expected = [slow.persistence(a, b)[0] for a, b in zip(*gained, strict=True)]
    np.testing.assert_allclose(own["correlation"], expected, atol=1e-6)
    assert 0.5 < own["correlation"].mean() < 0.999  # the gain alone lowers it
    for source in ("null", "noise_shuffled", "noise_isotropic"):
        other = of(table, source)
        np.testing.assert_allclose(other["correlation"], own["correlation"], rtol=1e-14)
        assert (other["firings"] == own["firings"]).all()
    both = (of(table, source)["correlation"].to_numpy() for source in ("pruned", "noise_shuffled"))
    np.testing.assert_allclose(relative_to_noise(*both), 1.0, rtol=1e-12)
    summary = persistence_summary(table).set_index("source")
    assert summary.loc["pruned", "relative_shuffled"] == pytest.approx(1, abs=1e-12)
    assert summary.loc["undone", "mean_correlation"] == pytest.approx(1, abs=1e-9)
    difference_shuffled = summary.loc["difference_shuffled", "mean_correlation"]
    assert difference_shuffled < summary.loc["pruned", "mean_correlation"] - 0.1


def test_harm_along_a_latent_exceeds_the_noise():
    """Removing the features' own directions hurts more than noise of equal size."""
    dense = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    sae = sae_of(16, 30, 30, -0.5 * torch.ones(30))
    basis = torch.linalg.qr(sae.encoder_weight.detach()[:3].T).Q
    rows = Rows(dense), Rows(dense - dense @ basis @ basis.T), torch.arange(600)
    change = fit_common_change(*rows)
    table = persistence(sae, *rows, change=change, groups=torch.arange(600) // 100, seed=1)
    hit = table[table["latent"] < 3].groupby("source")["correlation"].mean()
    others = [hit[source] for source in ("null", "noise_isotropic", "noise_shuffled")]
    assert hit["pruned"] < min(others) - 0.2


@pytest.fixture(scope="module")
def nulls():
    """Tables of many worlds, in which firing rates are heavy-tailed."""
    tables = []
    for seed in range(WORLDS):
        generator = torch.Generator().manual_seed(seed)
        dense, noise = torch.randn(2, 1700, WIDTH, generator=generator)
        pruned = 1.4 * dense + 1.2 * noise + 0.3
        sae = sae_of(WIDTH, 60, 60, torch.linspace(0, -2, 60), seed=seed)
        first, second = torch.arange(500), torch.arange(500, 1700)
        change = fit_common_change(Rows(dense), Rows(pruned), first, seed=seed)
        rows = Rows(dense), Rows(pruned), second
        groups = torch.arange(1200) // 150
        tables.append(persistence(sae, *rows, change=change, groups=groups, seed=0))
    return tables


def test_the_summary_has_the_intervals_of_the_ratios(nulls):
    summary = persistence_summary(nulls[0]).set_index("source")
    for source, noise in itertools.product(("pruned", "null"), ("isotropic", "shuffled")):
        row, name = summary.loc[source], f"relative_{noise}"
        found = crossed([ratio_to(of(nulls[0], source), of(nulls[0], f"noise_{noise}"))])
        assert (row[f"{name}_low"], row[f"{name}_high"]) == found.bounds()
        assert found.low < row[name] < found.high


def rare_and_frequent(table, source):
    """The rarest and the most frequent fifth of the latents with a value."""
    own = of(table, source)
    order = own.sort_values("dense_firings", kind="stable")
    order = order[order["correlation"].notna()]
    fifth = len(order) // 5
    return own.loc[order.index[:fifth]], own.loc[order.index[-fifth:]]


def test_on_the_null_a_ratio_of_means_is_one_and_no_group_differs(nulls):
    """95 % intervals of 16 worlds: fewer than 13 that cover have a chance below 1 in 100."""
    whole, contrast, values = 0, 0, []
    for table in nulls:
        found = crossed([ratio_to(of(table, "null"), of(table, "noise_shuffled"))])
        whole += found.low <= 1 <= found.high
        groups = zip(
            rare_and_frequent(table, "null"),
            rare_and_frequent(table, "noise_shuffled"),
            strict=True,
        )
        found = crossed([difference(*(ratio_to(*pair) for pair in groups))], fewest=2)
        contrast += found.low <= 0 <= found.high
        values.append(found.value)
    assert whole >= 13
    assert contrast >= 13
    assert abs(np.mean(values)) < 2.5 * np.std(values) / math.sqrt(len(values))


def test_the_mean_of_clipped_ratios_finds_what_is_not_there(nulls):
    """The measure that was: on the null it says that rare latents survive worse."""
    found = []
    for table in nulls:
        groups = zip(
            rare_and_frequent(table, "null"),
            rare_and_frequent(table, "noise_shuffled"),
            strict=True,
        )
        rare, frequent = (
            np.nanmean(
                np.clip(relative_to_noise(*(p["correlation"].to_numpy() for p in pair)), 0, 1)
            )
            for pair in groups
        )
        found.append(rare - frequent)
    assert np.mean(found) < -5 * np.std(found) / math.sqrt(len(found))


# --- latent by latent -----------------------------------------------------------------------------


def test_relative_to_noise_is_not_clipped_and_undefined_where_noise_leaves_little():
    found = relative_to_noise(
        np.array([0.6, 0.9, -0.2, 0.5, np.nan, 0.3, 0.15]),
        np.array([0.5, 0.3, 0.4, 0.2999, 0.5, np.nan, 0.3]),
    )
    expected = [1.2, 3.0, -0.5, np.nan, np.nan, np.nan, 0.5]
    np.testing.assert_allclose(found, expected)


def test_its_error_is_a_plain_jackknife(world):
    table, _ = measured(world)
    pruned, noise = (np.stack(of(table, s)["without"]) for s in ("pruned", "noise_shuffled"))
    found = relative_error(pruned, noise)
    for latent in range(14):
        ratios = [
            a / b if b >= 0.3 else math.nan
            for a, b in zip(pruned[latent], noise[latent], strict=True)
        ]
        expected = math.nan if np.isnan(ratios).any() else slow_statistics.jackknife(ratios) ** 0.5
        assert found[latent] == pytest.approx(expected, nan_ok=True)
    assert np.isfinite(found).sum() > 6
    assert np.isnan(relative_error(np.full((2, 5), 0.5), np.full((2, 5), 0.5))).all()
    assert np.isnan(relative_error(np.ones((2, 1)), np.ones((2, 1)))).all()
