"""The compiled training step of a CPU against plain PyTorch and slow sums."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from prunelens.sae import kernels, train_sae
from prunelens.sae import state as training
from prunelens.sae.kernels import SparseLatents, Weights
from prunelens.sae.steps import cpu_descent, cpu_kernels, cpu_numbers, engine, rounding
from prunelens.sae.steps.cpu_descent import CpuDescent
from prunelens.sae.steps.descent import Descent
from test_sae import inputs, random_sae
from test_sae_train import SMALL, StopHereError, assert_same, clustered

SHAPES = [(1024, 16), (9216, 64), (48, 5), (47, 5), (8, 8), (9, 8), (100, 1), (1, 1)]
RATE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Every training of this file takes the compiled loops, however small it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "COMPILED_FROM", 0)
        yield


def copied(weights):
    return Weights(*(weight.detach().clone() for weight in weights))


def unit(sae):
    with torch.no_grad():
        sae.decoder_weight /= sae.decoder_weight.norm(dim=1, keepdim=True)
    return sae


@pytest.mark.parametrize(("num_latents", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_finds_the_values_that_torch_finds(num_latents, k, dtype):
    pre = inputs(33, num_latents).to(dtype)
    pre[0] = 1.0  # all tied
    pre[1] = -pre[1].abs()
    pre[2, : num_latents // 2] = 0.5
    pre[3, ::2] = 0.0
    pre[4, : num_latents // 3] = math.inf
    indices, values = np.empty((33, k), np.int32), np.empty((33, k), np.float32)
    size = kernels.group_size(num_latents, k)
    cpu_kernels.select(0, 33, cpu_descent._bits(pre), size, indices, values)
    expected = pre.relu().topk(k).values.float()
    found = torch.from_numpy(values)
    assert torch.equal(found.sort(descending=True).values, expected)
    assert torch.equal(pre.gather(1, torch.from_numpy(indices).long()).relu().float(), found)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_entries_by_latent_are_those_of_a_stable_sort():
    generator = np.random.default_rng(0)
    indices = np.stack([generator.permutation(50)[:7] for _ in range(40)]).astype(np.int32)
    values = generator.random((40, 7), np.float32)
    starts, tokens = np.empty(52, np.int64), np.empty(280, np.int32)
    entries = np.empty(280, np.float32)
    cpu_kernels.by_latent(indices, values, starts, tokens, entries)
    order = np.argsort(indices.ravel(), kind="stable")
    assert tokens.tolist() == (order // 7).tolist()
    assert entries.tolist() == values.ravel()[order].tolist()
    counts = np.bincount(indices.ravel(), minlength=50)
    assert starts[:51].tolist() == [0, *np.cumsum(counts)]


def test_factors_are_rounded_as_torch_rounds_them():
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).int()
    numbers = torch.cat([bits.view(torch.float32), torch.tensor([math.inf, -math.inf, math.nan])])
    row = np.empty(len(numbers), np.uint16)
    cpu_numbers.keep_rounded(row, numbers.numpy())
    found = torch.from_numpy(row).view(torch.bfloat16)
    torch.testing.assert_close(found, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


CASES = ["plain", "many zeros", "repeated tokens", "one token", "k = F", "odd"]


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_dense_gradients_with_torch_adam(case):
    """In float32, from weights none of which is at its initial value."""
    sae = unit(random_sae(k=48 if case == "k = F" else 5))
    if case == "odd":
        sae = unit(random_sae(d_model=13, num_latents=47, k=6))
    x_hat = inputs(1 if case == "one token" else 97, d_model=sae.d_model)
    if case == "many zeros":
        with torch.no_grad():
            sae.encoder_bias -= 2.0
    if case == "repeated tokens":
        x_hat = x_hat[:4].repeat(16, 1)
    ours = CpuDescent(copied(sae.weights), sae.k, dtype=torch.float32)
    theirs = copied(sae.weights)
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in theirs], lr=RATE)
    for number in range(1, 6):
        found = ours.step(x_hat, rate=RATE, number=number)
        latents = kernels.top_k(kernels.pre_activations(x_hat, *theirs[:2]), sae.k)
        latents = SparseLatents(latents.values.detach(), latents.indices)
        dense = kernels.reference_gradients(x_hat, Weights(*(w.detach() for w in theirs)), latents)
        for weight, gradient in zip(theirs, dense.weights, strict=True):
            weight.grad = gradient
        optimizer.step()
        with torch.no_grad():
            theirs.decoder_weight.div_(theirs.decoder_weight.norm(dim=1, keepdim=True))
        torch.testing.assert_close(found.loss, dense.loss)
        assert torch.equal(found.fires, dense.fires)
        for a, b in zip(ours.weights, theirs, strict=True):
            # Adam divides by the root of a square: a gradient near 0 keeps few digits.
            torch.testing.assert_close(a, b.detach(), atol=0.02 * RATE, rtol=1e-4)
    assert not found.fires[3]


@pytest.mark.parametrize("has_units", [True, False])
def test_a_bfloat16_step_is_that_of_rounded_factors(monkeypatch, has_units):
    """Against dense float64 products of rounded factors; Adam's first moments show gradients."""
    monkeypatch.setattr(rounding, "has_bfloat16_units", lambda: has_units)
    sae, x_hat = unit(random_sae(num_latents=96)), inputs(64)
    ours = CpuDescent(copied(sae.weights), sae.k, dtype=torch.bfloat16)
    found = ours.step(x_hat, rate=RATE, number=1)

    def r(t):
        return t.detach().bfloat16().double()

    encoder, bias, decoder, decoder_bias = sae.weights
    pre = r(x_hat) @ r(encoder).T + r(bias)
    pre = pre.bfloat16().double() if has_units else pre
    kept = pre.relu().topk(sae.k)
    z = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    error = z @ r(decoder) + decoder_bias.detach().double() - x_hat.double()
    grad = error * 2 / len(x_hat)
    grad_z = (r(grad) @ decoder.detach().double().T) * (z > 0)
    expected = Weights(grad_z.T @ r(x_hat), grad_z.sum(0), z.T @ r(grad), grad.sum(0))
    torch.testing.assert_close(found.loss.double(), error.square().sum(1).mean(), rtol=1e-5, atol=0)
    for mean, gradient in zip(ours.mean, expected, strict=True):
        difference = mean.double() / 0.1 - gradient
        assert float(difference.norm() / gradient.norm()) < 1e-3
    assert torch.equal(ours._copies.decoder, ours.weights.decoder_weight.bfloat16())
    D = len(decoder_bias)
    assert torch.equal(ours._copies.encoder[:, :D].bfloat16(), ours.weights[0].bfloat16())
    assert torch.equal(ours._copies.encoder[:, D].bfloat16(), ours.weights[1].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit_of_the_loops(dtype, monkeypatch):
    """Products are torch's: they are taken in one thread here."""
    ends = []
    for threads in (1, 2, 3):
        sae = unit(random_sae(d_model=12, num_latents=512, k=7))
        descent = CpuDescent(copied(sae.weights), 7, dtype=dtype)
        monkeypatch.setattr(cpu_descent.torch, "get_num_threads", lambda n=threads: n)
        found = [descent.step(inputs(300, seed=n), rate=RATE, number=n) for n in (1, 2, 3)]
        ends.append([*(step.loss for step in found), *descent.weights])
    for others in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], others, strict=True))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_an_input_that_is_no_number_is_not_passed_over(bad):
    sae, x_hat = unit(random_sae()), inputs(4)
    x_hat[2, 7] = bad
    descent = CpuDescent(copied(sae.weights), sae.k, dtype=torch.float32)
    assert not bool(descent.step(x_hat, rate=RATE, number=1).loss.isfinite())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, dtype):
    """With restarts on the way, after which copies have to be made anew."""
    config = SMALL.model_copy(update={"dtype": dtype})
    given = {"init_seed": 0, "data_seed": 0}
    straight = train_sae(clustered(), config, **given)
    assert straight.resampled.any()

    def stop(step):
        if step == 17:
            raise StopHereError

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(StopHereError):
        train_sae(clustered(), config, checkpoint=checkpoint, progress=stop, **given)
    assert_same(straight, train_sae(clustered(), config, checkpoint=checkpoint, **given))


def test_a_training_ends_where_that_of_torchs_operators_ends(monkeypatch):
    ours = train_sae(clustered(), SMALL, init_seed=0, data_seed=0)
    monkeypatch.setattr(engine, "COMPILED_FROM", math.inf)
    theirs = train_sae(clustered(), SMALL, init_seed=0, data_seed=0)
    assert torch.equal(ours.resampled, theirs.resampled)
    for a, b in zip(ours.sae.weights, theirs.sae.weights, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


def test_in_bfloat16_it_learns_as_torchs_operators_do():
    """Not the same roundings (the loops round the error's gradient for the latents' as well)."""
    x, sae = inputs(256, 32), unit(random_sae(32, 96, 6))
    losses = []
    for kind in (CpuDescent, Descent):
        steps = kind(copied(sae.weights), 6, dtype=torch.bfloat16)
        losses.append([float(steps.step(x, rate=RATE, number=n).loss) for n in range(1, 41)])
    assert losses[0][-1] < 0.95 * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_beforehand_the_first_step_compiles_nothing(dtype):
    """In the main thread, which an interruption reaches; so `plan` times steps alone, too."""
    cpu_descent.compile_loops(dtype)
    loops = [cpu_kernels.select, cpu_kernels.by_latent, cpu_kernels.errors]
    loops += [cpu_kernels.step_decoder, cpu_kernels.step_encoder]
    before = [loop.signatures[:] for loop in loops]
    weights = copied(unit(random_sae(32, 96, 6)).weights)
    CpuDescent(weights, 6, dtype=dtype).step(inputs(64, 32), rate=RATE, number=1)
    assert [loop.signatures for loop in loops] == before and all(before)


@pytest.mark.parametrize(("steps", "expected"), [(100, Descent), (10_000_000, CpuDescent)])
def test_only_a_long_training_compiles(monkeypatch, steps, expected):
    monkeypatch.setattr(engine, "COMPILED_FROM", 2e12)
    config = SMALL.model_copy(update={"steps": steps, "batch_tokens": 512})
    made = training.Training(clustered(), config, init_seed=0, data_seed=0)
    assert type(made.descent) is expected


def test_only_a_cpu_takes_them():
    """Another accelerator's memory cannot be read by compiled code, however long the training."""
    sae = random_sae(32, 96, 6)
    assert type(engine.descent_of(sae, SMALL, None)[1]) is CpuDescent
    assert type(engine.descent_of(sae.to("meta"), SMALL, None)[1]) is Descent


_NO_PICKLE = """
import pathlib, sys, torch
from prunelens.sae import TopKSAE
from prunelens.sae.steps import cpu_descent
seen = []
sys.addaudithook(lambda event, arguments: seen.append(arguments) if "pickle" in event else None)
sys.addaudithook(lambda event, arguments: seen.append(arguments)
                 if event == "open" and set(arguments[1] or "") & set("wax") else None)
sae = TopKSAE.initialise(12, 48, 3, init_seed=0)
descent = cpu_descent.CpuDescent(sae.weights, 3, dtype=torch.bfloat16)
descent.step(torch.randn(64, 12), rate=1e-3, number=1)
assert cpu_descent.cpu_kernels.select.signatures, "nothing was compiled"
print("SEEN", seen)
"""


def test_compiling_writes_no_file_and_reads_no_pickle():
    done = subprocess.run(
        [sys.executable, "-c", _NO_PICKLE], capture_output=True, text=True, check=False
    )
    assert done.stdout == "SEEN []\n", done.stdout + done.stderr[-2000:]
