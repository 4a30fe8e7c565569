"""The CUDA kernels against plain PyTorch and against the CPU's step.

Where there is a CUDA device the tests run on it. Elsewhere `test_in_tritons_interpreter` runs this
file again in a process of its own, in which Triton interprets the kernels on the CPU: Triton reads
that setting as it is imported, and other libraries' use of it must stay as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prunelens.sae import kernels
from prunelens.sae.kernels import SparseLatents, Weights
from prunelens.sae.steps import engine
from prunelens.sae.steps.descent import Descent

pytest.importorskip("triton", reason="triton is not installed (it comes with torch for CUDA)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_device = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="no CUDA device; test_in_tritons_interpreter runs it on the CPU",
)
B, D, F, K = 5, 20, 12, 3  # the interpreter takes milliseconds for every row


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-n0", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_top_k_is_a_stable_sort(dtype, k, biased):
    """In bfloat16 without a bias many values tie; with k = F most kept ones are not positive."""
    pre, bias = normal(3, 300).to(dtype), normal(300) if biased else None
    total = (pre.float() + (0 if bias is None else bias)).clamp_min(0)
    expected = total.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    found = triton_kernels().top_k(pre, bias, k)
    assert torch.equal(found.indices, expected)
    assert torch.equal(found.values, total.gather(1, expected))


@on_device
def test_top_k_of_several_pieces_extremes_and_nothing_positive(monkeypatch):
    monkeypatch.setattr(triton_kernels(), "_PIECE", 16)
    pre = torch.full((5, 70), -1.0, device=DEVICE)
    pre[0, [3, 68]] = torch.tensor([1e-45, 3e38], device=DEVICE)  # the least and nearly the most
    pre[1, 40] = torch.inf
    pre[2, [5, 60]] = torch.tensor([1.0, torch.nan], device=DEVICE)
    pre[3] = 2.0  # ties in every piece
    found = triton_kernels().top_k(pre, None, 3)
    assert found.indices.tolist() == [[0, 3, 68], [0, 1, 40], [0, 5, 60], [0, 1, 2], [0, 1, 2]]
    assert found.values[[0, 1, 3, 4]].tolist() == [
        [0, pytest.approx(1e-45), pytest.approx(3e38)],
        [0, 0, torch.inf],
        [2, 2, 2],
        [0, 0, 0],
    ]
    assert found.values[2, :2].tolist() == [0, 1] and found.values[2, 2].isnan()


@on_device
def test_rows_too_wide_for_a_program_go_to_torch(monkeypatch, caplog):
    module = triton_kernels()
    pre, bias = normal(3, 300).bfloat16(), normal(300)
    expected = module.top_k(pre, bias, 5)
    monkeypatch.setattr(module, "WIDEST_ROW", 256)
    with caplog.at_level("INFO"):
        found = module.top_k(pre, bias, 5)
        module.top_k(pre, bias, 5)
    assert torch.equal(found.indices.sort(1).values, expected.indices)
    assert len([r for r in caplog.records if "torch.topk selects" in r.message]) == 1


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_the_dense_product(dtype):
    latents, weight, bias = some_latents(), normal(F, D).to(dtype), normal(D)
    found = triton_products().decode(latents.values, latents.indices, weight, bias)
    expected = kernels.dense_latents(latents, F) @ weight.float() + bias
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, kernels.decode(latents, weight.float(), bias))


@on_device
@pytest.mark.parametrize("segment", [128, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_over_the_transposed_pattern(monkeypatch, segment, dtype):
    """One latent fires on every token, so with short segments it takes several; some on none."""
    module = triton_products()
    monkeypatch.setattr(module, "_SEGMENT_ENTRIES", segment)
    latents = some_latents()
    latents.indices[:, 0] = F - 1
    rows, weight = normal(B, D).to(dtype), normal(F, D).to(dtype)
    pattern = module.by_latent(latents.indices, F)
    entries = latents.values.flatten()[pattern.order]
    found = module.transposed_product(pattern, entries, rows)
    expected = torch.zeros(F, D, device=DEVICE)
    products = []
    for entry, token, latent in zip(entries, pattern.tokens, pattern.latents, strict=True):
        expected[latent] += entry * rows[token].float()
        products.append(rows[token].float() @ weight[latent].float())
    torch.testing.assert_close(found, expected)
    assert (found[pattern.starts.diff() == 0] == 0).all()
    inner = module.entry_products(rows, weight, pattern.tokens, pattern.latents)
    torch.testing.assert_close(inner, torch.stack(products))


@on_device
def test_by_latent_lists_the_entries_of_each_latent_in_order():
    indices = torch.tensor([[2, 0], [2, 3], [0, 2]], device=DEVICE)
    pattern = triton_products().by_latent(indices, 5)
    assert pattern.starts.tolist() == [0, 2, 2, 5, 6, 6]
    assert pattern.tokens.tolist() == [0, 2, 0, 1, 2, 1]
    assert pattern.latents.tolist() == [0, 0, 2, 2, 2, 3]
    assert torch.equal(indices.flatten()[pattern.order].int(), pattern.latents)


@on_device
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("width", [D, 1])
def test_adam_rows_is_torchs_fused_adam(normalise, width):
    param = torch.nn.Parameter(normal(F, width))
    optimizer = torch.optim.Adam([param], lr=1e-2, fused=True)
    ours, mean, mean_square = param.detach().clone(), *torch.zeros(2, F, width, device=DEVICE)
    table = torch.full((F, width + 3), 7.0, dtype=torch.bfloat16, device=DEVICE)
    for step in (1, 2):
        gradient = normal(F, width + 2, seed=step)[:, :width]  # rows lie apart
        param.grad = gradient.contiguous()
        optimizer.step()
        if normalise:
            param.data /= torch.linalg.vector_norm(param.data, dim=1, keepdim=True)
        number = torch.tensor(float(step), device=DEVICE)
        scales = triton_kernels().step_scales(torch.tensor(1e-2, device=DEVICE), number)
        triton_kernels().adam_rows(
            ours, gradient, mean, mean_square, scales, normalise=normalise, shadow=table[:, :width]
        )
        torch.testing.assert_close(ours, param.detach(), rtol=2e-6, atol=1e-7)
    state = optimizer.state[param]
    torch.testing.assert_close(mean, state["exp_avg"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean_square, state["exp_avg_sq"], rtol=1e-6, atol=1e-8)
    assert torch.equal(table[:, :width], rounded(ours)) and (table[:, width:] == 7).all()


@on_device
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gradients_are_the_dense_references(dtype, within):
    from prunelens.sae.steps import cuda_descent

    weights, x_hat = some_weights(), normal(B, D, seed=5)
    latents = kernels.top_k(kernels.pre_activations(x_hat, *weights[:2]), K)
    expected = kernels.reference_gradients(x_hat, weights, latents)
    inputs, rows = cuda_descent.with_ones(x_hat, dtype), weights.decoder_weight.to(dtype)
    found = cuda_descent.gradients(x_hat, inputs, latents, rows, weights.decoder_bias)
    assert torch.equal(found.fires, expected.fires)
    torch.testing.assert_close(found.loss, expected.loss, rtol=within, atol=0)
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < within


@on_device
@pytest.mark.parametrize(
    ("dtype", "within", "share"), [(torch.float32, 1e-4, 1.0), (torch.bfloat16, 0.05, 0.5)]
)
def test_a_training_goes_as_on_the_cpu(dtype, within, share):
    """With a write from outside in between, as a restart makes; on a GPU by its graph.

    How far the weights moved is compared, not where they are: they hardly move, and Adam's first
    steps go by the signs of the gradients. Where those are nearly 0 bfloat16 may turn them, and
    with them a latent's whole row: so only half of the rows must agree.
    """
    from prunelens.sae.steps.cuda_descent import CudaDescent

    ours = some_weights()
    theirs, start = (Weights(*(w.cpu().clone() for w in ours)) for _ in range(2))
    descent = CudaDescent(ours, K, dtype=dtype)
    reference = Descent(theirs, K, dtype=torch.float32)
    for number in (1, 2, 3):
        x_hat = normal(B, D, seed=10 + number)
        found = descent.step(x_hat, rate=1e-3 / number, number=number)
        expected = reference.step(x_hat.cpu(), rate=1e-3 / number, number=number)
        torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=within, atol=0)
        if dtype == torch.float32:
            assert torch.equal(found.fires.cpu(), expected.fires)
        if number == 1:
            for weights in (ours, theirs, start):
                weights.encoder_weight[:2] = 0.5
                weights.encoder_bias[:2] = 3.0
    for name in Weights._fields:
        moved, should = (getattr(w, name).cpu() - getattr(start, name) for w in (ours, theirs))
        moved, should = moved.view(len(moved), -1), should.view(len(should), -1)
        apart = (moved - should).norm(dim=1) / should.norm(dim=1)  # NaN where a row stayed
        assert float(apart.nanquantile(share)) < 2 * within, name
    if dtype == torch.bfloat16:
        bias = ours.encoder_bias[:, None]
        both = torch.cat([ours.encoder_weight, bias], dim=1)
        assert torch.equal(descent._copies.encoder[:, : D + 1], rounded(both))
        assert torch.equal(descent._copies.decoder, rounded(ours.decoder_weight))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_hold_the_trial_that_decides_whether_they_are_used(dtype):
    from prunelens.sae.steps.cuda_descent import CudaDescent

    assert engine._problem(CudaDescent, torch.device(DEVICE), dtype, D, F, K) == ""


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU the kernels' programs run one by one")
def test_same_input_same_bits():
    from prunelens.sae.steps.cuda_descent import CudaDescent

    runs = []
    for _ in range(2):
        weights = Weights(normal(4096, 256), normal(4096), normal(4096, 256), normal(256))
        descent = CudaDescent(weights, 32, dtype=torch.bfloat16)
        for number in range(1, 6):
            descent.step(normal(2048, 256, seed=number), rate=1e-3, number=number)
        runs.append(weights)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_kernels_compile_for_hopper():
    """To machine code, without a device: what the interpreter accepts a compiler may not."""
    kernels_of = vars(triton_products()) | vars(triton_kernels())
    compiled = [compile_for_hopper(kernels_of[name], *how) for name, *how in COMPILED]
    assert all(len(cubin) > 0 for cubin in compiled)


WIDE = {"ENTRIES": 16, "BLOCK": 256}
COMPILED = (
    ("_top_k_kernel", "bf16", {"HAS_BIAS": 0, "UNUSED_BITS": 16, "BLOCK": 1024, "PIECE": 512}),
    ("_decode_kernel", "bf16", WIDE),
    ("_segments_kernel", "bf16", {"SEGMENT": 128, **WIDE}),
    ("_entry_products_kernel", "bf16", WIDE),
    ("_adam_kernel", "bf16", {"NORMALISE": 1, "HAS_SHADOW": 1, "BLOCK": 2048}),
)
INTEGERS = ("indices", "tokens", "latents", "starts", "extra_starts", "extra_owners")
ROWS = ("pre", "weight", "rows", "left", "right", "shadow")  # in the precision that is asked for
FLOATS = (
    *("bias", "values", "entries", "out", "partial", "scales"),
    *("param", "grad", "mean", "mean_square"),
)


def compile_for_hopper(kernel, precision, constants):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= dict.fromkeys(INTEGERS, "*i64") | dict.fromkeys(ROWS, f"*{precision}")
    kinds |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    return compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def triton_kernels():
    """Imported where it is used: the module is no part of an ordinary CPU run."""
    from prunelens.sae.steps import triton_kernels

    return triton_kernels


def triton_products():
    from prunelens.sae.steps import triton_products

    return triton_products


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def some_weights():
    rows = torch.nn.functional.normalize(normal(F, D), dim=1)
    return Weights(rows.clone(), 0.1 * normal(F, seed=1), rows.clone(), 0.1 * normal(D, seed=2))


def rounded(values):
    """To bfloat16 as a kernel does it: a device to the nearest, the interpreter towards zero."""
    if INTERPRETED:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.bfloat16()


def some_latents():
    """Among the first 8 latents; a third of the values are 0."""
    indices = normal(B, 8).argsort(1)[:, :K].contiguous()
    return SparseLatents(normal(B, K, seed=1).clamp_min(-0.4) + 0.4, indices)
