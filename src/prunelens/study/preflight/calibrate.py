"""How fast this device does a study's kinds of work, measured on the code that will do them.

The weights are random and of the model's shapes, so nothing has to be downloaded. What is timed is
one decoder block of the real architecture, SAE training steps, SAE encoding, and matching. Rates
are in the operations of `study.cost`.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from prunelens.activations import STORAGE, Activations
from prunelens.checkpoint import FAILURES, model_shape, text_config
from prunelens.config import ModelConfig, StudyConfig
from prunelens.errors import UserError
from prunelens.match import match_dictionaries
from prunelens.model import LanguageModel, as_language_model, forward_tokens, run_to_site
from prunelens.prune.selection import threads_of_torch
from prunelens.sae.state import Training
from prunelens.study.cost import (
    encoding_flops,
    forward_flops,
    matching_flops,
    sae_size,
    training_flops,
)
from prunelens.study.kind import WORK_KINDS

REPEATS = 5  # of the full size, at most
VOCABULARY = 128  # of the block that is timed; embeddings are looked up, not multiplied
LATENTS_TO_MATCH = 4096  # of a larger dictionary, so many


class Rate(NamedTuple):
    """How fast one kind of work goes."""

    flops_per_second: float
    """In the operations of `study.cost`."""
    share_of_batch: float
    """Size of what was timed, of the study's own batch. Below 1: that would have taken too long,
    and the rate is extrapolated."""


def calibrate(
    study: StudyConfig, model: ModelConfig, *, device: str, seconds: float
) -> dict[str, Rate]:
    """The rate of every kind of work in `WORK_KINDS`, for one model of the study.

    Takes about `seconds` at most: each kind may use its share of what those before it left, but
    never less than the smallest piece takes; what is compiled for a training comes on top, once per
    process, as it does in a study. Threads are those of `study.threads_per_stage`.
    Matching runs on the CPU whatever the device.
    Raises: UserError as `model_shape`.
    """
    end = time.perf_counter() + seconds
    scratch = tempfile.TemporaryDirectory(prefix="prunelens-", ignore_cleanup_errors=True)
    with scratch as folder, threads_of_torch(study.threads_per_stage), torch.no_grad():
        rates = {"matching": _matching_rate(study, model, _left(end) / 6)}
        rates["language model"] = _forward_rate(study, model, device, _left(end) / 3)
        before = time.perf_counter()
        size = sae_size(model_shape(model), study)
        training = _Trainings(study, _random_rows(study, size[0], folder, device), device)
        sizes = sorted({max(1, study.sae.batch_tokens // part) for part in (16, 4, 1)})
        training.step(sizes[0])  # compiles what it needs
        end += time.perf_counter() - before
        flops = functools.partial(training_flops, *size)
        rates["SAE training"] = _rate(training.step, flops, sizes, 0.8 * _left(end))
        flops = functools.partial(encoding_flops, *size)
        rates["SAE encoding"] = _rate(training.encode, flops, sizes, _left(end))
    return {kind: rates[kind] for kind in WORK_KINDS}


def _left(end: float) -> float:
    return max(0.0, end - time.perf_counter())


def _rate(
    work: Callable[[int], None],
    flops: Callable[[int], float],
    sizes: list[int],
    budget: float,
) -> Rate:
    """Time growing sizes, as long as the next is likely to fit what is left of the budget.

    Every size runs once to warm up, then is timed; the largest is timed until the budget is spent,
    and the fastest of its times counts. Where the full size does not fit, the line through the two
    largest that do is followed to it: a step has costs that do not grow with the batch.
    """
    end = time.perf_counter() + budget
    times: dict[int, float] = {}
    for number, size in enumerate(sizes):
        work(size)
        times[size] = _timed(work, size)
        last = number + 1 == len(sizes)
        if last or 2.2 * times[size] * sizes[number + 1] / size > end - time.perf_counter():
            break
    for _ in range(REPEATS - 1):
        if time.perf_counter() + times[size] > end:
            break
        times[size] = min(times[size], _timed(work, size))
    return Rate(flops(sizes[-1]) / _seconds_at(sizes[-1], times), size / sizes[-1])


def _seconds_at(size: int, times: dict[int, float]) -> float:
    """What `size` takes, from what the sizes that were timed took."""
    *before, (largest, seconds) = sorted(times.items())
    if not before:
        return seconds * size / largest
    smaller, fewer = before[-1]
    slope = max(0.0, (seconds - fewer) / (largest - smaller))
    return seconds + slope * (size - largest)


def _timed(work: Callable[[int], None], size: int) -> float:
    started = time.perf_counter()
    work(size)
    return max(time.perf_counter() - started, 1e-9)


def _forward_rate(study: StudyConfig, model: ModelConfig, device: str, budget: float) -> Rate:
    """One block of the architecture, with random weights, in the study's precision."""
    context = study.corpus.context_tokens
    lm = _one_block(model, device)
    shape = model_shape(model)
    most = max(1, forward_tokens(lm.device.type) // context)
    tokens: Int[Tensor, "windows context"] = torch.randint(
        VOCABULARY, (most, context), generator=torch.Generator().manual_seed(0)
    )

    def forward(windows: int) -> None:
        run_to_site(lm, tokens[:windows], "resid_post", 0)
        _finish(device)

    return _rate(
        forward,
        lambda n: forward_flops(shape, n * context, context_tokens=context, blocks=1, head=False),
        sorted({1, most}),
        budget,
    )


def _one_block(model: ModelConfig, device: str) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    text = text_config(model)
    depth = text.num_hidden_layers
    fields = {
        name: value[:1] if isinstance(value, list | tuple) and len(value) == depth else value
        for name, value in text.to_dict().items()
        if name != "per_layer_config"  # of Gemma 4, made of the others
    } | {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    try:
        with torch.random.fork_rng(devices=[]):
            built = AutoModelForCausalLM.from_config(
                type(text)(**fields), dtype=getattr(torch, model.dtype), trust_remote_code=False
            )
    except FAILURES as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(
            f"models.name: no model of one block can be made of {model.label} to be timed ({why});"
            " plan with --no-calibration or --rates"
        ) from None
    return as_language_model(built.to(device), label=model.label)


class _Trainings:
    """SAE trainings on random activations, one for each size of batch, and what they trained."""

    def __init__(self, study: StudyConfig, data: Activations, device: str) -> None:
        self._sae, self._data, self._device = study.sae, data, device
        self._training: Training | None = None

    def step(self, tokens: int) -> None:
        """One step on so many tokens."""
        if self._training is None or self._training.config.batch_tokens != tokens:
            self._training = None  # free the last one first
            # As many tokens in all as the study trains on: by that the kernels are chosen.
            steps = self._sae.steps * self._sae.batch_tokens // tokens
            config = self._sae.model_copy(update={"batch_tokens": tokens, "steps": steps})
            self._training = Training(self._data, config, init_seed=0, data_seed=0)
        self._training.advance(self._training.next_batch())
        _finish(self._device)

    def encode(self, tokens: int) -> None:
        """Encode and decode so many tokens."""
        assert self._training, "encoding is timed after training"
        self._training.sae(self._data.rows(torch.arange(tokens)))
        _finish(self._device)


def _random_rows(study: StudyConfig, width: int, folder: str, device: str) -> Activations:
    """A store of one batch, read as a study's are."""
    rows = torch.randn(study.sae.batch_tokens, width, generator=torch.Generator().manual_seed(0))
    path = pathlib.Path(folder) / "random.safetensors"
    save_file({"activations": rows.to(STORAGE[study.activations.storage][0])}, path)
    return Activations(path, device=device)


def _matching_rate(study: StudyConfig, model: ModelConfig, budget: float) -> Rate:
    d_model, num_latents, _ = sae_size(model_shape(model), study)
    most = min(num_latents, LATENTS_TO_MATCH)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(most, d_model, generator=generator) for _ in range(2))

    def match(latents: int) -> None:
        match_dictionaries(a[:latents], b[:latents], lowest_tau=min(study.taus))

    flops = functools.partial(matching_flops, d_model, comparisons=1)
    return _rate(match, flops, sorted({max(1, most // 4), most}), budget)


def _finish(device: str) -> None:
    """Wait for a GPU, which works on while Python goes on."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
