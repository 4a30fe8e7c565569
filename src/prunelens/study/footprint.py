"""The disk and memory that a study needs, from shapes alone. Bytes, to within a few tenths."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from prunelens.activations import STORAGE
from prunelens.checkpoint import ModelShape, is_here
from prunelens.config import CheckpointConfig, ModelConfig, PruningConfig, StudyConfig
from prunelens.model import forward_tokens
from prunelens.perplexity import LOGITS_AT_ONCE, SCORES_AT_ONCE
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import sae_size

FLOAT = 4
PROCESS_BYTES = 700e6  # a process with torch and transformers
GPU_CONTEXT_BYTES = 600e6  # what CUDA and its libraries take
SAMPLES_FOUND = 1.5  # intervals of a latent's range, in units of `evidence.samples`: 1 to 2
INVERSION_BYTES = 44  # per entry of SparseGPT's X Xᵀ in its inversion: five of float64, one more
CONTEXT_TOKEN_BYTES = 5.5  # 4 under pruning, and as they are: mostly zeros, compressed


class Disk(NamedTuple):
    """Bytes in the study's folder, but for `downloads`, which go to the hub's cache."""

    store: float
    """The largest activation store."""
    stores: float
    """The activation stores that exist at one time with one worker."""
    saes: float
    """All SAEs, control SAEs included, and the decoders kept from within their training."""
    masks: float
    """One bit per prunable weight and pruned condition; under SparseGPT, which changes them, the
    remaining weights as well."""
    contexts: float
    """Where latents fire, and what they do there under pruning; 0 without the question."""
    checkpoint: float
    """The SAEs that are trained in turn, whose checkpoints go when they are done."""
    kept: float
    """What is there when the study is done."""
    peak: float
    """The most at one time, with one worker."""
    downloads: float
    """Weights still to be fetched from the hub, taken to be of 16 bits; text comes on top."""


class Memory(NamedTuple):
    """Bytes of one worker, at its largest model."""

    model: float
    """The language model's weights."""
    forward: float
    """Weights and one batch on its way through the blocks."""
    perplexity: float
    """Weights and one batch of logits over the vocabulary."""
    sae_training: float
    """An SAE, its gradients, Adam's moments and one batch."""
    pruning: float
    """Weights and, under SparseGPT, the inputs of one block for the whole calibration text, their
    products for every matrix of the block, and what inverting the largest takes. Where a condition
    is a checkpoint: two models, as they are compared (on a GPU the dense one is beside it)."""
    device: float
    """The most that is needed at one time on the device that the stages run on."""
    host: float
    """The most of the machine's memory."""


def disk_use(study: StudyConfig, shapes: Mapping[str, ModelShape], stages: Sequence[Stage]) -> Disk:
    """What the study writes.

    Args:
        study: the study.
        shapes: model label -> shape.
        stages: all distinct stages.
    """
    models = [stage.source.model.label for stage in stages if stage.source]
    counts = collections.Counter(zip((stage.name for stage in stages), models, strict=True))

    def of_all(name: str, size: Mapping[str, float]) -> float:
        return sum(size[label] * counts[name, label] for label in shapes)

    tokens = study.corpus.train_tokens + study.corpus.eval_tokens
    tokens -= tokens // study.corpus.context_tokens * study.activations.skip_first
    row = STORAGE[study.activations.storage][0].itemsize
    store = {label: float(tokens * shape.d_model * row) for label, shape in shapes.items()}
    sae = {label: _sae_bytes(shape, study) for label, shape in shapes.items()}
    all_stores = of_all("activations", store)
    together = max(  # all layers of the dense model and of one pruned condition
        store[model.label] * min(counts["activations", model.label], 2 * len(model.layers))
        for model in study.models
    )
    stores = all_stores if study.keep_activations else together
    saes = of_all("sae", sae)
    for stage, label in zip(stages, models, strict=True):  # decoders kept from within a training
        saes += sae[label] * len(stage.config.get("checkpoints", ())) / 2
    conditions = study.conditions()
    prunings = [c for c in conditions if isinstance(c, PruningConfig)]
    heads = sum(c.lm_head for c in prunings)
    left = sum(1 - c.sparsity for c in prunings if c.entry.updates_weights)
    masks = 0.0
    for model in study.models:
        shape = shapes[model.label]
        masks += len(conditions) * shape.linear_weights / 8
        masks += heads * shape.d_model * shape.vocabulary_size / 8
        masks += left * shape.linear_weights * getattr(torch, model.dtype).itemsize
    contexts = of_all("evidence", {label: _contexts_bytes(s, study) for label, s in shapes.items()})
    # Weights, two moments, and the decoder's start.
    checkpoint = 3.5 * saes_at_once(stages) * max(sae.values())
    return Disk(
        max(store.values()),
        stores,
        saes,
        masks,
        contexts,
        checkpoint,
        kept=saes + masks + contexts + (all_stores if study.keep_activations else 0.0),
        peak=saes + masks + contexts + stores + checkpoint,
        downloads=2.0 * sum(_fetched_weights(study, shapes)),
    )


def _fetched_weights(study: StudyConfig, shapes: Mapping[str, ModelShape]) -> Iterator[int]:
    """Weights of every model and checkpoint that is not on this machine."""
    for model in study.models:
        if not model.is_planted and not is_here(model):
            yield shapes[model.label].parameters
    first = study.models[0]
    for condition in study.conditions():
        if isinstance(condition, CheckpointConfig):
            place = {"name": condition.checkpoint, "revision": condition.revision}
            if not is_here(first.model_copy(update=place)):
                yield shapes[first.label].parameters


def memory_use(
    study: StudyConfig, shapes: Mapping[str, ModelShape], device: str, *, num_saes: int = 1
) -> Memory:
    """What one worker needs on `device` (`cpu`, `cuda`, …) and of the machine's memory.

    A single worker trains up to `num_saes` SAEs in turn (see `saes_at_once`); several one each.
    """
    each = (
        _model_memory(study, model, shapes[model.label], device, num_saes) for model in study.models
    )
    most = Memory(*map(max, zip(*each, strict=True)))
    if device != "cpu":
        return most
    return most._replace(host=PROCESS_BYTES + max(2 * most.model, most.device))


def saes_at_once(stages: Iterable[Stage]) -> int:
    """The most SAEs that a single worker trains in turn."""
    groups = collections.Counter(stage.together for stage in stages if stage.name == "sae")
    return max(groups.values(), default=1)


def _model_memory(
    study: StudyConfig, model: ModelConfig, shape: ModelShape, device: str, num_saes: int
) -> Memory:
    kind = device.partition(":")[0]
    itemsize = getattr(torch, model.dtype).itemsize
    weights = shape.parameters * itemsize
    tokens = max(forward_tokens(kind), study.corpus.context_tokens)
    widths = shape.linear_weights / shape.num_blocks / shape.d_model  # of all layers of a block
    longest = min(
        max(study.perplexity.context_tokens), shape.max_context_tokens or 10**9
    )  # one window at least
    scores = max(LOGITS_AT_ONCE.get(kind, LOGITS_AT_ONCE["cpu"]), longest * shape.vocabulary_size)
    part = min(scores, SCORES_AT_ONCE.get(kind, SCORES_AT_ONCE["cpu"]))
    batch = tokens * widths * itemsize
    perplexity = weights + scores * itemsize + part * 2 * FLOAT  # as float32, and its logarithms
    training = _training_bytes(shape, study, kind, num_saes)
    pruning = weights
    for condition in study.conditions():
        if isinstance(condition, CheckpointConfig):
            pruning = max(pruning, weights * (2 if kind == "cpu" else 1))
        elif condition.calibration == "sequential":
            held: float = study.corpus.calibration_tokens * shape.d_model * itemsize
            solving = 0.0
            if condition.entry.updates_weights:
                held += FLOAT * shape.products / shape.num_blocks
                solving = INVERSION_BYTES * shape.widest_input**2
            pruning = max(pruning, weights + held + max(batch, solving))
    context = 0.0 if kind == "cpu" else GPU_CONTEXT_BYTES
    on_device = context + max(weights + batch, perplexity, training, pruning)
    host = PROCESS_BYTES + weights
    return Memory(weights, weights + batch, perplexity, training, pruning, on_device, host)


def _sae_bytes(shape: ModelShape, study: StudyConfig) -> float:
    d_model, num_latents, _ = sae_size(shape, study)
    return float(FLOAT * (2 * num_latents * d_model + num_latents + d_model))


def _contexts_bytes(shape: ModelShape, study: StudyConfig) -> float:
    """Of one stage: contexts as they are and, in a pruned run, under pruning."""
    _, num_latents, _ = sae_size(shape, study)
    evidence = study.evidence
    per_latent = evidence.top + SAMPLES_FOUND * evidence.samples
    return num_latents * per_latent * (2 * evidence.either_side + 1) * CONTEXT_TOKEN_BYTES


def _training_bytes(shape: ModelShape, study: StudyConfig, kind: str, num_saes: int) -> float:
    """Weights, two moments and the decoder's start of each; gradients; the batch's latents.

    With bfloat16 each may hold both matrices rounded as well, on a CPU without units for it the
    encoder's in float32. A GPU without Triton holds the latents dense: before the top k, after, and
    their gradients with temporaries.
    """
    _, num_latents, _ = sae_size(shape, study)
    batch = study.sae.batch_tokens * num_latents * FLOAT
    rounded = 0.0 if study.sae.dtype == "float32" else 0.75 if kind == "cpu" else 0.5
    held = ((3.5 + rounded) * num_saes + 1) * _sae_bytes(shape, study)
    return held + batch * (2 if kind == "cpu" else 5)
