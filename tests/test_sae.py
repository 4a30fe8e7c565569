import math

import numpy as np
import pytest
import torch

from independent import sae as independent
from prunelens.errors import UserError
from prunelens.sae import TopKSAE, evaluate_sae, kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents, Weights
from prunelens.sae.steps import rounding
from prunelens.sae.steps.pattern import TransposedPattern


class InMemory:
    """Activations held as one raw tensor."""

    def __init__(self, raw, mean=None, sigma=None):
        self.raw = raw
        self.mean = raw.mean(0) if mean is None else mean
        self.sigma = raw.std(0) if sigma is None else sigma
        self.num_tokens, self.d_model = raw.shape

    def rows(self, index):
        return (self.raw[index] - self.mean) / self.sigma

    def batches(self, batch_tokens):
        for raw in self.raw.split(batch_tokens):
            yield (raw - self.mean) / self.sigma


def random_sae(d_model=12, num_latents=48, k=5, seed=0):
    """An SAE with nothing at its initial value; latent 3 never fires."""
    sae = TopKSAE.initialise(d_model, num_latents, k, init_seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        sae.encoder_bias[3] = -1e3
    return sae


def inputs(tokens, d_model=12, seed=1):
    return torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed))


def encode(x_hat, weights, k, **how):
    return kernels.top_k(kernels.pre_activations(x_hat, *weights[:2], **how), k)


def as_arrays(sae):
    return [w.detach().double().numpy() for w in sae.weights]


@pytest.mark.parametrize(
    ("num_latents", "k"),
    [(1024, 16), (9216, 64), (48, 5), (47, 5), (8, 8), (9, 8), (100, 1), (1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_finds_the_values_that_torch_finds(num_latents, k, dtype):
    pre = inputs(33, num_latents).to(dtype)
    pre[0] = 1.0  # all tied
    pre[1] = -pre[1].abs()
    pre[2, : num_latents // 2] = 0.5
    found = kernels.top_k(pre, k)
    expected = pre.relu().topk(k).values
    assert torch.equal(found.values.sort(descending=True).values, expected)
    assert torch.equal(pre.gather(1, found.indices).relu(), found.values)
    assert all(len(set(row)) == k for row in found.indices.tolist())


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_an_input_that_is_no_number_is_not_passed_over(bad):
    sae, x_hat = random_sae(), inputs(4)
    x_hat[2, 7] = bad
    found = kernels.sparse_gradients(x_hat, sae.weights, sae.encode(x_hat))
    assert not bool(found.loss.isfinite())


@pytest.mark.parametrize("bad", [math.nan, -math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, bad):
    """Top k may pass over a latent whose pre-activations are NaN."""
    sae = random_sae()
    with torch.no_grad():
        sae.encoder_weight[5, 0] = bad
    with pytest.raises(UserError, match="encoder_weight holds NaN"):
        evaluate_sae(sae, InMemory(inputs(30)), dense_variance=1.0)
    sae.save(tmp_path)
    with pytest.raises(UserError, match="encoder_weight holds NaN"):
        TopKSAE.load(tmp_path)


def test_encode_and_decode_agree_with_the_slow_definition():
    sae, x_hat = random_sae(), inputs(40)
    encoder, encoder_bias, decoder, decoder_bias = as_arrays(sae)
    z = independent.encode(x_hat.double().numpy(), encoder, encoder_bias, sae.k)
    latents = sae.encode(x_hat)
    np.testing.assert_allclose(sae.dense_latents(latents).detach().numpy(), z, atol=1e-5)
    expected = independent.decode(z, decoder, decoder_bias)
    np.testing.assert_allclose(sae.decode(latents).detach().numpy(), expected, atol=1e-5)
    assert torch.equal(sae(x_hat), sae.decode(latents))


def test_fewer_positive_latents_than_k_leave_zeros_that_do_not_fire():
    sae = random_sae(k=40)
    with torch.no_grad():
        sae.encoder_bias -= 1.0
    values = sae.encode(inputs(30)).values
    assert bool((values >= 0).all())
    assert bool((values == 0).any())


@pytest.mark.parametrize("case", ["plain", "many zeros", "repeated tokens", "one token", "k = F"])
def test_fast_gradients_equal_reference_and_autograd(case):
    sae = random_sae(k=48 if case == "k = F" else 5)
    x_hat = inputs(1 if case == "one token" else 64)
    if case == "many zeros":
        with torch.no_grad():
            sae.encoder_bias -= 2.0
    if case == "repeated tokens":
        x_hat = x_hat[:4].repeat(16, 1)
    weights = Weights(*(w.detach() for w in sae.weights))
    latents = encode(x_hat, weights, sae.k)
    fast = kernels.sparse_gradients(x_hat, weights, latents)
    reference = kernels.reference_gradients(x_hat, weights, latents)
    loss = (sae(x_hat) - x_hat).square().sum(1).mean()
    automatic = torch.autograd.grad(loss, list(sae.weights))
    torch.testing.assert_close(fast.loss, reference.loss)
    torch.testing.assert_close(fast.loss, loss.detach())
    for ours, theirs, autograd in zip(fast.weights, reference.weights, automatic, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours, autograd, atol=2e-5, rtol=1e-4)
    assert torch.equal(fast.fires, reference.fires)
    silent = ~fast.fires
    assert bool(silent[3])
    assert not fast.weights.encoder_weight[silent].any()
    assert not fast.weights.decoder_weight[silent].any()


def test_gradients_for_a_dictionary_wider_than_16_bits():
    sae, x_hat = TopKSAE.initialise(2, 70_000, 3, init_seed=0), inputs(8, 2)
    weights = Weights(*(w.detach() for w in sae.weights))
    latents = sae.encode(x_hat)
    latents = SparseLatents(latents.values.detach(), latents.indices)
    fast = kernels.sparse_gradients(x_hat, weights, latents)
    reference = kernels.reference_gradients(x_hat, weights, latents)
    for ours, theirs in zip(fast.weights, reference.weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def rounded(tensor):
    return tensor.bfloat16().float()


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_rounds_the_factors_of_the_encoder_product(monkeypatch, has_units):
    """With or without bfloat16 units: the slow product of rounded factors, summed in float64."""
    monkeypatch.setattr(rounding, "has_bfloat16_units", lambda: has_units)
    sae, x_hat = random_sae(num_latents=96), inputs(64)
    weights = Weights(*(w.detach() for w in sae.weights))
    encoder, bias = (rounded(w).double() for w in weights[:2])
    exact = (rounded(x_hat).double() @ encoder.T + bias).relu().topk(sae.k).values
    found = encode(x_hat, weights, sae.k, dtype=torch.bfloat16)
    assert found.values.dtype == torch.float32
    in_order = found.values.sort(descending=True).values.double()
    # What is left is the rounding of the result, where the units give bfloat16.
    torch.testing.assert_close(in_order, exact, atol=1e-3, rtol=2**-8 if has_units else 1e-5)


def test_bfloat16_gradients_are_those_of_rounded_factors():
    sae, x_hat = random_sae(num_latents=96), inputs(64)
    weights = Weights(*(w.detach() for w in sae.weights))
    latents = sae.encode(x_hat)
    latents = SparseLatents(rounded(latents.values.detach()), latents.indices)
    fast = kernels.sparse_gradients(x_hat, weights, latents, dtype=torch.bfloat16)
    slow = kernels.reference_gradients(
        x_hat, weights._replace(decoder_weight=rounded(weights.decoder_weight)), latents
    )
    assert all(w.dtype == torch.float32 for w in fast.weights)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-2, atol=0.0)
    for ours, theirs in zip(fast.weights, slow.weights, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_used_again_change_no_bit(dtype):
    """Also after other shapes: a last batch, a restart's pool."""
    sae, buffers = random_sae(num_latents=96), Buffers()
    weights = Weights(*(w.detach() for w in sae.weights))
    for x_hat in (inputs(64), inputs(10), inputs(64) + 1):
        plain = encode(x_hat, weights, sae.k, dtype=dtype)
        again = encode(x_hat, weights, sae.k, dtype=dtype, buffers=buffers)
        assert torch.equal(plain.values, again.values)
        assert torch.equal(plain.indices, again.indices)
        fresh = kernels.sparse_gradients(x_hat, weights, plain, dtype=dtype)
        reused = kernels.sparse_gradients(x_hat, weights, plain, dtype=dtype, buffers=buffers)
        for ours, theirs in zip(fresh.weights, reused.weights, strict=True):
            assert torch.equal(ours, theirs)


def test_products_over_the_transposed_pattern_equal_loops():
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(7)])
    entries = torch.randn(28, generator=generator)
    latent_rows, token_rows = torch.randn(9, 5, generator=generator), torch.randn(7, 5)
    pattern = TransposedPattern(indices, 9)
    product, sums = torch.zeros(9, 5), torch.zeros(9)
    inner = torch.zeros(28)
    for entry, latent in enumerate(indices.flatten().tolist()):
        token = entry // 4
        product[latent] += entries[entry] * token_rows[token]
        sums[latent] += entries[entry]
        inner[entry] = latent_rows[latent] @ token_rows[token]
    by_latent = pattern.by_latent(entries)
    torch.testing.assert_close(pattern.product(by_latent, token_rows), product)
    torch.testing.assert_close(pattern.sums(by_latent), sums)
    found = pattern.row_products(latent_rows, token_rows)
    torch.testing.assert_close(found, pattern.by_latent(inner))


def test_initialisation():
    sae = TopKSAE.initialise(16, 64, 4, init_seed=3)
    assert torch.equal(sae.encoder_weight, sae.decoder_weight)
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(64))
    assert not sae.encoder_bias.any()
    assert not sae.decoder_bias.any()
    again = TopKSAE.initialise(16, 64, 4, init_seed=3)
    other = TopKSAE.initialise(16, 64, 4, init_seed=4)
    assert torch.equal(sae.decoder_weight, again.decoder_weight)
    assert not torch.equal(sae.decoder_weight, other.decoder_weight)


def test_k_above_the_dictionary_is_refused():
    with pytest.raises(UserError, match=r"sae\.k: 65 is more than the 64 latents"):
        TopKSAE.initialise(16, 64, 65, init_seed=0)


def test_quality_agrees_with_the_slow_definitions():
    sae = random_sae()
    raw = inputs(150) * torch.linspace(0.5, 20, 12) + 300.0
    data = InMemory(raw, sigma=torch.linspace(0.4, 25, 12))
    dense_variance = 1234.5
    found = evaluate_sae(sae, data, dense_variance=dense_variance, batch_tokens=64)
    encoder, encoder_bias, decoder, decoder_bias = as_arrays(sae)
    x_hat = data.rows(torch.arange(150)).double().numpy()
    z = independent.encode(x_hat, encoder, encoder_bias, sae.k)
    x_rec = independent.decode(z, decoder, decoder_bias)
    mean, sigma = data.mean.double().numpy(), data.sigma.double().numpy()
    x, raw_rec = raw.double().numpy(), sigma * x_rec + mean
    assert found.fvu == pytest.approx(independent.fvu(x_hat, x_rec), rel=1e-4)
    assert found.fvu_raw == pytest.approx(independent.fvu(x, raw_rec), rel=1e-4)
    by_dense = independent.fvu(x, raw_rec) * independent.variance(x) / dense_variance
    assert found.fvu_dense_var == pytest.approx(by_dense, rel=1e-4)
    assert found.l0 == pytest.approx((z > 0).sum() / 150)
    assert found.alive == ((z > 0).any(0)).sum()
    np.testing.assert_allclose(found.firing_rate.numpy(), independent.firing_rate(z))
    np.testing.assert_allclose(
        found.mean_activation.numpy(), independent.mean_activation(z), rtol=1e-4
    )
    assert math.isnan(found.mean_activation[3])
    assert found.firing_rate.dtype == torch.float64


def test_quality_does_not_depend_on_the_batch_and_survives_a_far_mean():
    sae = random_sae()
    data = InMemory(inputs(100) + 5e3, mean=torch.zeros(12), sigma=torch.ones(12))
    whole = evaluate_sae(sae, data, dense_variance=1.0, first_tokens=31, batch_tokens=100)
    parts = evaluate_sae(sae, data, dense_variance=1.0, first_tokens=31, batch_tokens=7)
    first = evaluate_sae(sae, InMemory(data.raw[:31], data.mean, data.sigma), dense_variance=1.0)
    for found in (whole, parts):
        assert torch.equal(found.firing_rate_first, first.firing_rate)
    assert bool(first.firing_rate_first.isnan().all())  # asked of no token
    assert whole.fvu == pytest.approx(parts.fvu, rel=1e-6)
    x_hat = data.raw.double().numpy()
    x_rec = sae(data.raw).detach().double().numpy()
    assert whole.fvu == pytest.approx(independent.fvu(x_hat, x_rec), rel=1e-6)


def test_undefined_quality_is_nan():
    data = InMemory(torch.ones(5, 12), sigma=torch.ones(12))
    found = evaluate_sae(random_sae(), data, dense_variance=0.0)
    assert math.isnan(found.fvu)
    assert math.isnan(found.fvu_dense_var)


def test_quality_refuses_nothing_and_the_wrong_width():
    with pytest.raises(UserError, match="no activations"):
        evaluate_sae(
            random_sae(), InMemory(torch.ones(0, 12), sigma=torch.ones(12)), dense_variance=1.0
        )
    with pytest.raises(UserError, match="d_model 12, but the activations have 3"):
        evaluate_sae(random_sae(), InMemory(inputs(5, 3)), dense_variance=1.0)


def test_save_and_load(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "sae")
    again = TopKSAE.load(tmp_path / "sae")
    assert (again.k, again.d_model, again.num_latents) == (5, 12, 48)
    for ours, theirs in zip(sae.weights, again.weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("damage", ["missing", "cut", "no json", "other shape", "no folder"])
def test_a_damaged_sae_is_one_line(tmp_path, damage):
    random_sae().save(tmp_path)
    weights, description = tmp_path / "sae.safetensors", tmp_path / "sae.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no json":
        description.write_text("{")
    elif damage == "other shape":
        description.write_text(description.read_text().replace("48", "49"))
    folder = tmp_path / "none" if damage == "no folder" else tmp_path
    with pytest.raises(UserError, match=r"^sae: ") as error:
        TopKSAE.load(folder)
    assert "\n" not in str(error.value)
