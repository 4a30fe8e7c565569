"""Which code takes a training's steps: PyTorch's own operators, or kernels of ours.

Ours were written without a CUDA device at hand. So on such a device they are first tried on a small
batch, once per process and shape, beside PyTorch's step on the same device; where they fail, give
no number or differ, PyTorch's takes their place.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.config import SaeConfig
from prunelens.errors import one_line
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers
from prunelens.sae.steps.descent import Descended, Descent
from prunelens.sae.topk import TopKSAE

log = logging.getLogger(__name__)

COMPILED_FROM = 2e12
"""Multiplications of a training's encoder from which compiled loops are worth the seconds that it
takes to compile them: a minute's work of one core. It depends on the config alone, because numbers
do: the loops add in another order, and in bfloat16 round the error's gradient for the latents' too.
Whoever changes it gives stage `sae` a new version.
"""
PYTORCH, COMPILED, TRITON = "pytorch", "compiled loops", "triton"  # `engine` in meta.json
ALLOWED = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.02, 0.3)}
"""How far, as a share of its length, loss and weights, and gradients, may be from PyTorch's. In
bfloat16 latents tie for the last place among the k, either may win, and that alone is 0.14."""
TRIAL_TOKENS, TRIAL_RATE = 32, 1e-4


def descent_of(
    sae: SparseAutoencoder, config: SaeConfig, buffers: Buffers | None
) -> tuple[str, Descent]:
    """The engine's name, and its descent on the SAE's weights.

    By our own kernels on a CUDA device, where Triton is there and they hold the trial; on a CPU
    where it is worth it. They keep k latents of every token, so of other architectures than TopK
    the steps are PyTorch's.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = sae.decoder_bias.device
    if not isinstance(sae, TopKSAE):
        if device.type == "cuda" or _work(sae, config) >= COMPILED_FROM:
            _say_that_kernels_are_of_topk(sae.architecture)
        return PYTORCH, Descent(sae.weights, sae.k, dtype=dtype, buffers=buffers, keep=sae.keep)
    if device.type == "cpu" and _work(sae, config) >= COMPILED_FROM:
        from prunelens.sae.steps.cpu_descent import CpuDescent, compile_loops

        compile_loops(dtype)
        return COMPILED, CpuDescent(sae.weights, sae.k, dtype=dtype, buffers=buffers)
    fast, shape = _kernels_for(device), (sae.d_model, sae.num_latents, sae.k)
    if fast and not _problem(fast, device, dtype, *shape):
        return TRITON, fast(sae.weights, sae.k, dtype=dtype)
    return PYTORCH, Descent(sae.weights, sae.k, dtype=dtype, buffers=buffers)


def _work(sae: SparseAutoencoder, config: SaeConfig) -> int:
    return config.steps * config.batch_tokens * sae.encoder_weight.numel()


def _kernels_for(device: torch.device) -> Callable[..., Descent] | None:
    if device.type != "cuda":
        return None
    if not importlib.util.find_spec("triton"):
        _say_that_triton_is_missing()
        return None
    from prunelens.sae.steps.cuda_descent import CudaDescent

    return CudaDescent


@functools.cache
def _say_that_kernels_are_of_topk(architecture: str) -> None:
    log.info("%s SAEs are trained by PyTorch's own operators: our kernels are TopK's", architecture)


@functools.cache
def _say_that_triton_is_missing() -> None:
    log.warning("no triton: SAEs are trained by dense products, several times slower; install it")


@functools.cache
def _problem(
    fast: Callable[..., Descent],
    device: torch.device,
    dtype: torch.dtype,
    d_model: int,
    num_latents: int,
    k: int,
) -> str:
    """What is wrong with the kernels at this shape, said once; empty where nothing is."""
    draw = torch.Generator().manual_seed(0)
    x_hat = torch.randn(TRIAL_TOKENS, d_model, generator=draw).to(device)
    try:
        descents: list[Descent] = []
        for make in (Descent, fast):
            sae = TopKSAE.initialise(d_model, num_latents, k, init_seed=0)
            for bias in (sae.encoder_bias, sae.decoder_bias):
                bias.data.normal_(std=0.1, generator=draw.manual_seed(len(bias)))
            descents.append(make(sae.to(device).weights, k, dtype=dtype))
        # A second step: the first compiles, and only from the second on a graph is replayed.
        plain, ours = descents
        steps = (_difference(plain, ours, x_hat, number) for number in (1, 2))
        found = next(filter(None, steps), "")
    except Exception as error:  # whatever a compiler or a driver raises
        found = f"they fail ({one_line(f'{type(error).__name__}: {error}')[:200]})"
    if found:
        log.warning(
            "sae: on %s our kernels are not used, for %s; SAEs are trained by PyTorch's own"
            " operators, several times slower",
            *(device, found),
        )
    return found


def _difference(
    plain: Descent, fast: Descent, x_hat: Float[Tensor, "batch d_model"], number: int
) -> str:
    """Where a step of the two differs by more than is allowed; empty where it does not."""
    seen = [_seen(each, each.step(x_hat, rate=TRIAL_RATE, number=number)) for each in (plain, fast)]
    for name, expected in seen[0].items():
        share = _share_off(seen[1][name], expected)
        allowed = ALLOWED[plain.dtype]["gradient" in name or name == "firing"]
        if math.isnan(share) or share > allowed:
            return f"{name} of step {number} is {share:.2g} off (allowed: {allowed:g})"
    return ""


def _share_off(found: Tensor, expected: Tensor) -> float:
    """Of latents the share that fires otherwise; of numbers the distance, as a share."""
    if expected.dtype == torch.bool:
        return float((found != expected).sum() / expected.sum())
    away = torch.linalg.vector_norm(found - expected)
    return float(away / torch.linalg.vector_norm(expected))


def _seen(descent: Descent, descended: Descended) -> dict[str, Tensor]:
    """Forward, backward (a moment is the gradients' running mean) and what became of the weights.

    Copies: the next step may overwrite them.
    """
    seen = {"the loss": descended.loss, "firing": descended.fires}
    for name, tensor in descent.mean._asdict().items():
        seen[f"the gradient of {name}"] = tensor
    seen |= descent.weights._asdict()
    return {name: tensor.clone() for name, tensor in seen.items()}
