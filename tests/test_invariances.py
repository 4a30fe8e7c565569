"""What must not change a result does not: names of latents, axes, units, dead weight, repetition.

Where float32 is exact (`exact_worlds`) the statement is one of equal bits. What is invariant only
in distribution, or not at all, is said where it is left out.
"""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import VOCABULARY
from exact_worlds import (
    exact_rotation,
    permuted,
    rotated,
    with_unused,
    worlds,
)
from prunelens.activations import (
    Activations,
    Statistics,
    capture,
    covariance,
    participation_ratio,
    random_rotation,
    statistics,
)
from prunelens.analyses.causal import ablate
from prunelens.analyses.fragility import fragility_tests, quintiles
from prunelens.analyses.transfer import transfer
from prunelens.config import ActivationConfig, PruningConfig
from prunelens.match import match_dictionaries, match_rates
from prunelens.model import as_language_model, logits, run_to_site
from prunelens.perplexity import measure_perplexity
from prunelens.prune import calibrate, input_norms, prune_model
from prunelens.sae import TopKSAE, evaluate_sae
from prunelens.sae.exchange.formats import given as given_sae
from prunelens.upper_blocks import UpperBlocks
from test_properties import SEEDS, exactly, examples, fates, persistence_of, rare_sae
from test_sae import InMemory

TAUS = (0.5, 0.7, 0.9)
NUMBERS = ("fvu", "fvu_raw", "fvu_dense_var", "l0", "alive")


def quality(sae, x_hat, dense_variance=7.0):
    return evaluate_sae(sae, exactly(x_hat), dense_variance=dense_variance)


def assert_same_numbers(found, expected, names=NUMBERS, **tolerance):
    for name in names:
        value = pytest.approx(getattr(expected, name), nan_ok=True, **tolerance or {"abs": 0})
        assert getattr(found, name) == value, name


def assert_same_latents(found, expected, order=slice(None)):
    """Latent i of `found` is latent order[i] of `expected`, bit for bit."""
    assert torch.equal(found.firing_rate, expected.firing_rate[order])
    own = expected.mean_activation[order].nan_to_num(-1)
    assert torch.equal(found.mean_activation.nan_to_num(-1), own)


def pruned_rows(sae, before, after, tokens=None):
    """Persistence on the pruned activations: the source that draws no noise."""
    table = persistence_of(sae, before, after, tokens)
    arrays = ["draws", "without"]
    return table[table["source"] == "pruned"].drop(columns=["source", "latent", *arrays])


def gaussian_rows(seed, num_a, num_b, width=6):
    """Two dictionaries, some rows of B near ones of A; no cosine ties, none at a tau."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_a, width, generator=generator)
    b = torch.randn(num_b, width, generator=generator)
    near = min(num_a, num_b) // 2
    b[:near] = a[:near] + 0.3 * b[:near]
    c = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2)
    close = [(c[:, :, None] - torch.tensor(TAUS)).abs().min()]
    close += [c.sort(dim).values.diff(dim=dim).min() for dim in (0, 1) if c.shape[dim] > 1]
    assume(min(close) > 1e-5)
    return a, b


two_dictionaries = st.builds(gaussian_rows, SEEDS, st.integers(1, 30), st.integers(1, 30))


def assert_same_rates(found, expected, factors=(1, 1, 1, 1)):
    for tau in TAUS:
        rates, before = match_rates(found, tau)[1:], match_rates(expected, tau)[1:]
        assert rates == pytest.approx([f * v for f, v in zip(factors, before, strict=True)])


# --- latents in another order ---------------------------------------------------------------------


def order_of(seed, number):
    return torch.from_numpy(np.random.default_rng(seed).permutation(number))


@given(worlds(), SEEDS)
@examples(25)
def test_permuting_latents_permutes_their_rows_and_nothing_else(world, seed):
    sae, before, after = world
    order = order_of(seed, sae.num_latents)
    other = permuted(sae, order)
    found, expected = quality(other, before), quality(sae, before)
    assert_same_numbers(found, expected)
    assert_same_latents(found, expected, order)
    rows, own = pruned_rows(other, before, after), pruned_rows(sae, before, after)
    own = own.iloc[order.numpy()].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, own, check_exact=True)


@given(worlds(widths=(3, 8), most_latents=12), SEEDS)
@examples(10)
def test_permuting_latents_permutes_the_noise_controls(world, seed):
    """Noise is drawn in the space, not per latent. With k of k kept nothing hangs on a near-tie."""
    sae, before, after = world
    sae.k = sae.num_latents
    order = order_of(seed, sae.num_latents)
    tables = [persistence_of(s, before, after, seed=3) for s in (sae, permuted(sae, order))]
    for source in ("null", "noise_isotropic", "noise_shuffled"):
        own, found = (t[t["source"] == source]["correlation"].to_numpy() for t in tables)
        np.testing.assert_allclose(found, own[order], atol=1e-4)


@given(two_dictionaries, SEEDS)
@examples(30)
def test_permuting_either_dictionary_permutes_its_matches(dictionaries, seed):
    a, b = dictionaries
    order_a, order_b = order_of(seed, len(a)), order_of(seed + 1, len(b))
    found, expected = match_dictionaries(a[order_a], b[order_b]), match_dictionaries(a, b)
    assert_same_rates(found, expected)
    order_a, order_b = order_a.numpy(), order_b.numpy()
    assert np.array_equal(order_b[found.best_in_b], expected.best_in_b[order_a])
    assert np.array_equal(order_a[found.best_in_a], expected.best_in_a[order_b])
    assert np.array_equal(found.mutual, expected.mutual[order_a])


def relabelled(table, seed):
    """The latents of every seed under other numbers, the rows in another order."""
    generator = np.random.default_rng(seed)
    names = {
        s: dict(zip(part["latent"], generator.permutation(part["latent"]), strict=True))
        for s, part in table.groupby("seed")
    }
    renamed = [names[s][latent] for s, latent in zip(table["seed"], table["latent"], strict=True)]
    return table.assign(latent=renamed).sample(frac=1, random_state=seed, ignore_index=True)


@given(fates, SEEDS)
@examples(4)
def test_survival_by_quintile_does_not_know_the_numbers_of_latents(table, seed):
    """Where rates are distinct; the intervals as well, which no random draw enters."""
    generator = np.random.default_rng(seed)
    for column in ("firing_rate", "firing_rate_first_half"):
        distinct = generator.permutation(len(table)) / len(table)
        table[column] = np.where(table[column] > 0, distinct, 0.0)
    other = relabelled(table, seed)
    pd.testing.assert_frame_equal(quintiles(other, (0.7,)), quintiles(table, (0.7,)))
    found, expected = (fragility_tests(t, (0.7,)) for t in (other, table))
    pd.testing.assert_frame_equal(found, expected)


@given(fates, SEEDS)
@examples(4)
def test_among_equal_rates_only_the_number_decides(table, seed):
    """Which of them survive may move between quintiles; how many do, and all rates, may not."""
    table = table.dropna(subset=["persistence"])
    assume(len(table))
    undefined = [name for name in table if name.startswith("cosine_") and table[name].isna().any()]
    table = table.drop(columns=undefined).assign(
        persistence_noise_isotropic=0.9, persistence_noise_shuffled=0.9
    )
    found, own = (quintiles(t, (0.7,)) for t in (relabelled(table, seed), table))
    np.testing.assert_allclose(found["firing_rate"], own["firing_rate"])
    assert found["num_latents"].equals(own["num_latents"])
    if table["seed"].nunique() == 1:
        survivors = [
            t.assign(n=t["survival_rate"] * t["num_latents"])
            .groupby(["measure", "source"])["n"]
            .sum()
            for t in (found, own)
        ]
        pd.testing.assert_series_equal(*survivors)


# --- ablations ------------------------------------------------------------------------------------


def prompts(seed=0, shape=(3, 16)):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def kl_of(lm, sae, normalisation, latents):
    """KL by protocol, contexts, prompt, position (rows) and latent, in the order of `latents`.

    Every place where a latent fires is a context. Random directions are drawn by the number of the
    latent and along the axes, so they keep neither a new order nor a rotation.
    """
    upper = UpperBlocks(lm, prompts(), site="resid_post", layer=1)
    found = ablate(
        upper, sae, normalisation, latents=latents, random_direction_latents=[],
        contexts_per_latent=1000, seed=0,
    )  # fmt: skip
    key = ["protocol", "contexts", "prompt", "position"]
    return found.kl.pivot_table(index=key, columns="latent", values="kl")[latents], found


def site_statistics(lm, same_deviation=False):
    x = run_to_site(lm, prompts(), "resid_post", 1).flatten(0, 1)
    return Statistics(x.mean(0), x.std().expand(x.shape[1]) if same_deviation else x.std(0))


def assert_same_kl(found, expected):
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=2e-3, atol=1e-9)


def test_ablations_know_latents_by_their_weights_alone(tiny_lm):
    sae, normalisation = rare_sae(np.random.default_rng(0), 16, 24, 4), site_statistics(tiny_lm)
    order = order_of(5, 24)
    new_number = order.argsort().tolist()  # of every old latent
    latents = list(range(0, 24, 4))
    expected, own = kl_of(tiny_lm, sae, normalisation, latents)
    moved = [new_number[latent] for latent in latents]
    found, other = kl_of(tiny_lm, permuted(sae, order), normalisation, moved)
    assert_same_kl(found, expected)
    np.testing.assert_allclose(other.reconstruction, own.reconstruction, rtol=1e-4)
    found, other = kl_of(tiny_lm, with_unused(sae, 3), normalisation, [*latents, 25])
    assert_same_kl(found[latents], expected)
    np.testing.assert_allclose(other.reconstruction, own.reconstruction, rtol=1e-4)
    unused = found[25].dropna().unstack("protocol")
    assert (unused[["isolated", "error_preserving"]] == 0).all().all()


# --- other axes -----------------------------------------------------------------------------------


@given(worlds(widths=(4, 8, 16)), SEEDS)
@examples(25)
def test_rotating_space_and_sae_changes_no_quality_and_no_persistence(world, seed):
    """In normalised space; raw FVU stays too as long as all deviations are equal."""
    sae, before, after = world
    rotation = exact_rotation(np.random.default_rng(seed), sae.d_model)
    assert torch.equal(rotation @ rotation.T, torch.eye(sae.d_model))
    other = rotated(sae, rotation)
    found, expected = quality(other, before @ rotation), quality(sae, before)
    assert_same_numbers(found, expected, rel=1e-12)  # a mean over tokens divides
    assert_same_latents(found, expected)
    rows = pruned_rows(other, before @ rotation, after @ rotation)
    pd.testing.assert_frame_equal(rows, pruned_rows(sae, before, after), check_exact=True)


@given(two_dictionaries, SEEDS)
@examples(30)
def test_rotating_both_dictionaries_changes_no_match(dictionaries, seed):
    a, b = dictionaries
    rotation = random_rotation(a.shape[1], seed=seed)
    found, expected = match_dictionaries(a @ rotation, b @ rotation), match_dictionaries(a, b)
    assert_same_rates(found, expected)
    assert np.array_equal(found.best_in_b, expected.best_in_b)
    assert np.array_equal(found.best_in_a, expected.best_in_a)


def noisy_world(seed, tokens=1500, width=8):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(tokens, width, generator=generator)
    after = before + 0.4 * torch.randn(tokens, width, generator=generator)
    return TopKSAE.initialise(width, 16, 16, init_seed=seed), before, after


@pytest.mark.parametrize("seed", range(2))
def test_under_a_rotation_shuffled_noise_turns_along_and_isotropic_noise_only_in_law(seed):
    """Isotropic noise is drawn along the axes: other draws of the same distribution."""
    sae, before, after = noisy_world(seed)
    rotation = random_rotation(8, seed=seed)
    own, turned = (
        persistence_of(s, x, y, seed=1).set_index("source")["correlation"]
        for s, x, y in (
            (sae, before, after),
            (rotated(sae, rotation), before @ rotation, after @ rotation),
        )
    )
    for source in ("pruned", "undone", "null", "noise_shuffled"):
        np.testing.assert_allclose(turned[source], own[source], atol=1e-4)
    isotropic = (turned - own).loc["noise_isotropic"]
    assert isotropic.abs().max() > 1e-4
    assert isotropic.abs().max() < 0.06
    assert abs(isotropic.mean()) < 0.02


def rotated_llama(lm, rotation):
    """The same function with its residual stream rotated: x -> x rotation everywhere.

    RMS norms look at lengths alone as long as their gains are all one.
    """
    other = as_language_model(copy.deepcopy(lm.model), label="rotated")
    assert all((p == 1).all() for name, p in lm.model.named_parameters() if "norm" in name)
    with torch.no_grad():
        for name, module in other.model.named_modules():
            end = name.rpartition(".")[2]
            if end in ("o_proj", "down_proj"):  # write into the stream
                module.weight.copy_(rotation.T @ module.weight)
            elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):  # read from it
                module.weight.copy_(module.weight @ rotation)
    return other


def test_rotating_a_model_with_its_sae_changes_nothing_that_is_measured(tiny_llama):
    """Under one deviation for all dimensions: the axes choose the deviations, so those do not turn.

    Nor do magnitude and Wanda, which score weights along the axes.
    """
    lm, rotation = tiny_llama, random_rotation(16, seed=3)
    other = rotated_llama(lm, rotation)
    assert not torch.allclose(lm.blocks[0].mlp.up_proj.weight, other.blocks[0].mlp.up_proj.weight)
    torch.testing.assert_close(logits(other, prompts()), logits(lm, prompts()), atol=1e-4, rtol=0)
    x, turned = (run_to_site(m, prompts(), "resid_post", 1) for m in (lm, other))
    torch.testing.assert_close(turned, x @ rotation, atol=1e-4, rtol=1e-4)
    stream = prompts(1, (200,))
    found, own = (
        measure_perplexity(m, stream, context_tokens=20, bos_token=0).nll for m in (other, lm)
    )
    assert found == pytest.approx(own, rel=1e-5)

    sae, normalisation = rare_sae(np.random.default_rng(1), 16, 24, 4), site_statistics(lm, True)
    turned_statistics = Statistics(normalisation.mean @ rotation, normalisation.sigma)
    turned_sae = rotated(sae, rotation)
    data, turned_data = (
        InMemory(states.flatten(0, 1), *part)
        for states, part in ((x, normalisation), (turned, turned_statistics))
    )
    quality, turned_quality = (
        evaluate_sae(s, d, dense_variance=9.0) for s, d in ((sae, data), (turned_sae, turned_data))
    )
    assert_same_numbers(turned_quality, quality, rel=1e-4)
    assert torch.equal(turned_quality.firing_rate, quality.firing_rate)
    latents = list(range(0, 24, 3))
    expected, _ = kl_of(lm, sae, normalisation, latents)
    found, _ = kl_of(other, turned_sae, turned_statistics, latents)
    assert expected.max().max() > 1e-3
    assert_same_kl(found, expected)


def test_a_store_read_under_a_rotation_is_the_rotated_space(tiny_llama, tmp_path):
    """The same through capture and the store on disk; the space of the `floor_shared` arm."""
    path = tmp_path / "dense.safetensors"
    capture(
        tiny_llama, prompts(), path, site="resid_post", layer=1, config=ActivationConfig()
    )  # fmt: skip
    normalisation, rotation = (
        statistics(Activations(path), num_tokens=45),
        random_rotation(16, seed=1),
    )
    plain = Activations(path, statistics=normalisation)
    turned = Activations(path, statistics=normalisation, rotation=rotation)
    sae = rare_sae(np.random.default_rng(2), 16, 24, 4)
    found = evaluate_sae(rotated(sae, rotation), turned, dense_variance=9.0)
    expected = evaluate_sae(sae, plain, dense_variance=9.0)
    assert_same_numbers(found, expected, ("fvu", "l0", "alive"), rel=1e-5)
    assert torch.equal(found.firing_rate, expected.firing_rate)


# --- other units ----------------------------------------------------------------------------------


def stored(folder, raw):
    path = folder / "a.safetensors"
    save_file({"activations": raw.contiguous()}, path)
    return Activations(path)


def own_normalisation(folder, raw):
    """A store with its own mean and deviation, over all of its tokens."""
    plain = stored(folder, raw)
    found = statistics(plain, num_tokens=len(raw))
    return Activations(folder / "a.safetensors", statistics=found), found


@given(worlds(), SEEDS, st.booleans())
@examples(25)
def test_rescaling_activations_changes_nothing_but_the_scale(tmp_path_factory, world, seed, each):
    """By powers of two, which are exact; `each`: a scale for every dimension, so raw FVU moves."""
    generator, raw = np.random.default_rng(seed), world.disturbed
    scale = torch.from_numpy(2.0 ** generator.integers(-9, 10, raw.shape[1] if each else 1)).float()
    variance = float((raw.double() - raw.double().mean(0)).square().sum())
    factor = 1.0 if each else float(scale) ** 2
    found, expected = [], []
    for numbers, x, dense_variance in (
        (expected, raw, variance),
        (found, raw * scale, variance * factor),
    ):
        data, normalisation = own_normalisation(tmp_path_factory.mktemp("store"), x)
        numbers += [data, normalisation]
        numbers.append(evaluate_sae(world.sae, data, dense_variance=dense_variance))
    assert torch.equal(found[1].mean, expected[1].mean * scale)
    constant = (raw == raw[0]).all(0)  # gets deviation 1 whatever its scale
    same = torch.where(constant, 1.0, expected[1].sigma * scale)
    assert torch.equal(found[1].sigma, same)
    every = torch.arange(len(raw))
    assert torch.equal(found[0].rows(every), expected[0].rows(every))
    own_scale = ("fvu", "l0", "alive")
    assert_same_numbers(found[2], expected[2], own_scale if each or constant.any() else NUMBERS)
    assert_same_latents(found[2], expected[2])
    if not each:
        ratios = [participation_ratio(covariance(part[0])) for part in (found, expected)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_shifting_and_rescaling_by_any_amount_changes_only_last_digits(tmp_path, seed):
    """A far mean costs digits of x, so the same within float32, and k of k for no near-ties."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(300, 6, generator=generator)
    scale = 10 ** (4 * torch.rand(6, generator=generator) - 2)
    shift = 20 * scale * torch.randn(6, generator=generator)
    sae = TopKSAE.initialise(6, 12, 12, init_seed=seed)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    own, _ = own_normalisation(tmp_path / "a", raw)
    other, _ = own_normalisation(tmp_path / "b", raw * scale + shift)
    index = torch.arange(300)
    torch.testing.assert_close(other.rows(index), own.rows(index), atol=1e-4, rtol=0)
    found, expected = (evaluate_sae(sae, data, dense_variance=1.0) for data in (other, own))
    assert found.fvu == pytest.approx(expected.fvu, rel=1e-4)
    np.testing.assert_allclose(found.firing_rate, expected.firing_rate, atol=0.01)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_masks_know_no_units(tiny_lm, criterion):
    """All weights times 4, all norms times 8: the same order of the same scores."""
    other = as_language_model(copy.deepcopy(tiny_lm.model), label="scaled")
    norms = input_norms(tiny_lm, prompts())
    config = PruningConfig(criterion=criterion, scope="global", sparsity=0.37)
    own = prune_model(tiny_lm, config, input_norms=norms).masks
    for parameter in other.model.parameters():
        parameter.mul_(4)
    scaled = {name: 8 * norm for name, norm in norms.items()}
    found = prune_model(other, config, input_norms=scaled).masks
    assert all(torch.equal(found[name], mask) for name, mask in own.items())


# --- latents that are never used ------------------------------------------------------------------


@given(worlds(), st.integers(1, 9))
@examples(20)
def test_unused_latents_change_no_number_of_the_others(world, number):
    sae, before, after = world
    other, used = with_unused(sae, number), slice(sae.num_latents)
    found, expected = quality(other, before), quality(sae, before)
    assert_same_numbers(found, expected)
    assert torch.equal(found.firing_rate[used], expected.firing_rate)
    assert not found.firing_rate[sae.num_latents :].any()
    assert found.mean_activation[sae.num_latents :].isnan().all()
    rows, own = pruned_rows(other, before, after), pruned_rows(sae, before, after)
    pd.testing.assert_frame_equal(rows.iloc[used], own, check_exact=True)
    assert rows.iloc[sae.num_latents :]["correlation"].isna().all()
    assert not rows.iloc[sae.num_latents :]["silenced"].any()


@given(two_dictionaries, st.integers(1, 9), st.integers(0, 9))
@examples(30)
def test_unused_latents_enter_rates_through_the_denominator_alone(dictionaries, more_a, more_b):
    """Theirs are rows of zeros, as a direction that nothing was ever written along."""
    a, b = dictionaries
    longer = [torch.cat([d, torch.zeros(n, 6)]) for d, n in ((a, more_a), (b, more_b))]
    found, expected = match_dictionaries(*longer), match_dictionaries(a, b)
    share_a, share_b = len(a) / len(longer[0]), len(b) / len(longer[1])
    assert_same_rates(found, expected, (share_a, share_a, share_a, share_b))
    close = found.best_in_b[: len(a)] < len(b)  # else every cosine is negative, zero is the best
    assert np.array_equal(found.best_in_b[: len(a)][close], expected.best_in_b[close])


@given(fates)
@examples(4)
def test_dead_latents_enter_no_quintile_and_no_test(table):
    dead = table.assign(latent=table["latent"] + 1000, firing_rate=0.0, firing_rate_first_half=0.0)
    more = pd.concat([table, dead], ignore_index=True)
    pd.testing.assert_frame_equal(quintiles(more, (0.7,)), quintiles(table, (0.7,)))
    found, expected = (fragility_tests(t, (0.7,)) for t in (more, table))
    pd.testing.assert_frame_equal(found, expected)  # the intervals too


# --- the same text twice --------------------------------------------------------------------------


@given(worlds(), st.integers(2, 3))
@examples(20)
def test_repeated_tokens_change_no_share_no_mean_and_no_correlation(tmp_path_factory, world, times):
    """But latents with few firings come to have enough of them for a correlation."""
    sae, before, after = world
    variance = float((before.double() - before.double().mean(0)).square().sum())
    found = quality(sae, before.repeat(times, 1), times * variance)
    expected = quality(sae, before, variance)
    assert_same_numbers(found, expected, rel=1e-12)
    assert torch.equal(found.firing_rate, expected.firing_rate)
    np.testing.assert_allclose(found.mean_activation, expected.mean_activation, rtol=1e-12)
    rows, own = (
        pruned_rows(sae, before.repeat(times, 1), after.repeat(times, 1)),
        pruned_rows(sae, before, after),
    )
    known = own["correlation"].notna().to_numpy()
    assert rows["firings"].tolist() == (times * own["firings"]).tolist()
    columns = ["correlation", "jaccard", "silenced"]
    pd.testing.assert_frame_equal(rows.loc[known, columns], own.loc[known, columns], rtol=1e-9)
    stores = [
        own_normalisation(tmp_path_factory.mktemp("store"), x)
        for x in (before, before.repeat(times, 1))
    ]
    for ours, theirs in zip(stores[0][1], stores[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(covariance(data) for data, _ in stores))


@pytest.mark.parametrize("bos_token", [0, None])
def test_a_text_read_twice_has_the_same_perplexity(tiny_lm, bos_token):
    """Where it fills whole windows: else the second reading is cut at other places."""
    stream = prompts(3, (190,)).clamp_min(1)
    context = 20 if bos_token is not None else 19
    once, twice = (
        measure_perplexity(tiny_lm, text, context_tokens=context, bos_token=bos_token)
        for text in (stream, stream.repeat(2))
    )
    assert twice.num_tokens == 2 * once.num_tokens
    assert twice.nll == pytest.approx(once.nll, rel=1e-6)
    torch.testing.assert_close(twice.window_nll, once.window_nll.repeat(2), rtol=1e-5, atol=0)


def test_a_calibration_text_read_again_gives_the_same_masks(tiny_lm, monkeypatch):
    """Norms grow by the root of the number of readings: by exactly 2 for four in equal batches."""
    text = prompts(4)
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", text.numel())
    norms = {times: input_norms(tiny_lm, text.repeat(times, 1)) for times in (1, 2, 4)}
    for name, norm in norms[1].items():
        assert torch.equal(norms[4][name], 2 * norm)
        torch.testing.assert_close(norms[2][name], norm * 2**0.5, rtol=1e-6, atol=0)
    for scope in ("row", "global"):
        config = PruningConfig(criterion="wanda", scope=scope, sparsity=0.43)
        masks = {}
        for times, given_norms in norms.items():
            fresh = as_language_model(copy.deepcopy(tiny_lm.model), label="fresh")
            masks[times] = prune_model(fresh, config, input_norms=given_norms).masks
        for name, mask in masks[1].items():
            assert torch.equal(masks[4][name], mask)
            assert torch.equal(masks[2][name], mask)


def test_transfer_knows_neither_numbers_nor_unused_latents_nor_repetition(tiny_llama):
    lm, sae = tiny_llama, rare_sae(np.random.default_rng(3), 16, 24, 4)
    normalisation, text, refit_text = site_statistics(lm), prompts(6), prompts(7)

    def rows(sae, times=1):
        found = transfer(
            lm, [given_sae(sae, normalisation, name="ours")], text.repeat(times, 1),
            refit_text.repeat(times, 1), torch.arange(len(text)).repeat(times),
            site="resid_post", layer=1, dense=None, ce_windows=len(text) * times,
        ).rows  # fmt: skip
        return found.assign(**{n: found[n] // times for n in ("num_tokens", "num_windows")})

    own = rows(sae)
    assert own["ce_recovered"].notna().all()
    for other in (rows(permuted(sae, order_of(0, 24))), rows(with_unused(sae, 5)), rows(sae, 2)):
        pd.testing.assert_frame_equal(other, own, rtol=1e-4)
