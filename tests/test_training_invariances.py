"""Training knows no numbers of latents, no units, and axes only through Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from exact_worlds import on_grid, permuted, rotated, signed_permutation
from prunelens.activations import random_rotation
from prunelens.config import SaeConfig
from prunelens.match import match_dictionaries, match_rates
from prunelens.sae import TopKSAE, kernels, train_sae
from prunelens.sae.resample import restart_dead
from test_invariances import order_of, own_normalisation, quality
from test_properties import SEEDS, exactly, examples, rare_sae

SMALL = SaeConfig(
    expansion=3, k=3, steps=60, batch_tokens=64, learning_rate=3e-2, resample_every=60
)


def planted(seed=0, tokens=500, width=8):
    """Sparse sums of random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, width, generator=generator), dim=1)
    on = torch.rand(tokens, 20, generator=generator) < 0.15
    x = (on * (0.5 + torch.rand(tokens, 20, generator=generator))) @ directions
    return x + 0.02 * torch.randn(tokens, width, generator=generator)


def trained(x_hat, start, config=SMALL):
    return train_sae(exactly(x_hat), config, init_seed=0, data_seed=0, start=start)


def assert_same_sae(found, expected, atol=2e-3):
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_training_from_permuted_rows_ends_at_permuted_rows():
    """Within float32: sums are taken in another order."""
    x_hat, start = planted(), TopKSAE.initialise(8, 24, 3, init_seed=0)
    order = order_of(1, 24)
    own, other = trained(x_hat, start), trained(x_hat, permuted(start, order))
    assert own.init_retention.mean() < 0.97  # far enough from the start to matter
    assert_same_sae(other.sae, permuted(own.sae, order))
    torch.testing.assert_close(other.init_retention, own.init_retention[order], atol=2e-3, rtol=0)


def test_restarted_latents_are_the_same_features_under_other_numbers():
    """Dead latents are dealt the badly rebuilt inputs by their numbers: the set is the same."""
    x_hat, start = planted(tokens=300), TopKSAE.initialise(8, 24, 3, init_seed=0)
    with torch.no_grad():
        start.encoder_bias[::3] = -3.0  # dead from the start
    config = SMALL.model_copy(update={"resample_every": 20})
    own, other = (trained(x_hat, s, config) for s in (start, permuted(start, order_of(1, 24))))
    assert own.resampled.sum() >= 8
    found = match_dictionaries(own.sae.decoder_weight.detach(), other.sae.decoder_weight.detach())
    assert match_rates(found, 0.99).mnn == 1.0


def test_training_in_swapped_and_mirrored_coordinates_ends_at_the_turned_sae():
    x_hat, start = planted(), TopKSAE.initialise(8, 24, 3, init_seed=0)
    turn = signed_permutation(np.random.default_rng(0), 8)
    own, other = trained(x_hat, start), trained(x_hat @ turn, rotated(start, turn))
    assert_same_sae(other.sae, rotated(own.sae, turn))


@given(SEEDS)
@examples(10)
def test_gradients_turn_with_the_space(seed):
    """Any rotation. Adam does not: it divides every coordinate by the size of its own gradients."""
    generator = np.random.default_rng(seed)
    sae, x_hat = rare_sae(generator, 8, 24, 24), on_grid(generator, (40, 8), 2, 8)
    rotation = random_rotation(8, seed=seed)
    turned = rotated(sae, rotation)
    own, other = (
        kernels.sparse_gradients(x, s.weights, s.encode(x))
        for s, x in ((sae, x_hat), (turned, x_hat @ rotation))
    )
    torch.testing.assert_close(other.loss, own.loss, rtol=1e-5, atol=0)
    expected = [
        own.weights.encoder_weight @ rotation,
        own.weights.encoder_bias,
        own.weights.decoder_weight @ rotation,
        own.weights.decoder_bias @ rotation,
    ]
    for found, wanted in zip(other.weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@given(SEEDS)
@examples(5)
def test_restarts_turn_with_the_space(seed):
    """The same inputs are drawn, as badly rebuilt as before."""
    sae, x_hat = rare_sae(np.random.default_rng(seed), 8, 24, 24), planted(seed, tokens=60)
    rotation, dead = random_rotation(8, seed=seed), torch.arange(24) % 3 == 0
    own, other = permuted(sae, torch.arange(24)), rotated(sae, rotation)
    for restarted, x in ((own, x_hat), (other, x_hat @ rotation)):
        restart_dead(
            restarted, dead, torch.arange(60), lambda index, x=x: x[index],
            batch_tokens=16, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    assert_same_sae(other, rotated(own, rotation), atol=1e-5)


def test_training_in_a_rotated_space_finds_the_same_features_by_another_path():
    """Adam has axes, so the SAE is not the turned one to the last digit; the features are."""
    x_hat, start = planted(), TopKSAE.initialise(8, 24, 3, init_seed=0)
    rotation = random_rotation(8, seed=2)
    turned_x, turned_start = x_hat @ rotation, rotated(start, rotation)
    own, other = trained(x_hat, start).sae, trained(turned_x, turned_start).sae
    expected = rotated(own, rotation)
    assert (other.decoder_weight - expected.decoder_weight).abs().max() > 0.01
    matches = match_dictionaries(other.decoder_weight.detach(), expected.decoder_weight.detach())
    assert match_rates(matches, 0.7).mnn > 0.9
    assert quality(other, turned_x).fvu == pytest.approx(quality(own, x_hat).fvu, rel=0.1)


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_training_knows_no_units(tmp_path, scale):
    """With a space normalised by its own deviations: the same SAE, bit for bit."""
    saes = []
    for name, factor in (("a", 1.0), ("b", scale)):
        (tmp_path / name).mkdir()
        data, _ = own_normalisation(tmp_path / name, planted() * factor)
        saes.append(train_sae(data, SMALL, init_seed=0, data_seed=0).sae)
    for ours, theirs in zip(*(sae.weights for sae in saes), strict=True):
        assert torch.equal(ours, theirs)
