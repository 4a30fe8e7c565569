"""Training SAEs, one or several at once (methods §5)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from prunelens.config import SaeConfig
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers
from prunelens.sae.order import TokenOrder
from prunelens.sae.state import StepLog, TokenActivations, Training

Observer = Callable[[int, SparseAutoencoder], None]


class TrainedSae(NamedTuple):
    """An SAE and what its training left behind."""

    sae: SparseAutoencoder
    init_retention: Float[Tensor, " latents"]
    """Cosine of the final decoder row with the row it (re)started from."""
    resampled: Bool[Tensor, " latents"]
    """The latent was restarted, so its start is not the initialisation."""
    log: list[StepLog]
    """About a hundred points, and every observed step."""
    engine: str
    """What took the steps: `pytorch`, `compiled loops` or `triton` (sae/steps/engine.py)."""


class SaeRequest(NamedTuple):
    """One SAE to be trained."""

    config: SaeConfig
    """`seeds`, `control_seeds` and `warm_steps` are not used here."""
    init_seed: int
    """Fixes the initial weights, nothing else; changes nothing where `start` is given."""
    data_seed: int
    """Fixes the order of the tokens and the inputs that latents restart at."""
    start: SparseAutoencoder | None = None
    """An SAE whose weights training starts from (a warm start) instead of random ones. It is
    copied. Only weights are taken over: Adam's moments and the rate start anew."""
    checkpoint: pathlib.Path | None = None
    """A safetensors file, written every `config.checkpoint_every` steps; if it exists, training
    goes on from it. The caller deletes it."""
    observe: Mapping[int, Observer] = {}
    """Step -> callback, called after that step (0: before the first). Called a second time for
    steps that a resumed training repeats. Must not change the SAE."""
    progress: Callable[[int], None] | None = None
    """Called with the step after every step."""
    logged: Callable[[StepLog, SparseAutoencoder], None] | None = None
    """Called with every new point of the training curve and the SAE, which it must not change."""


def train_sae(
    data: TokenActivations,
    config: SaeConfig,
    *,
    init_seed: int,
    data_seed: int,
    start: SparseAutoencoder | None = None,
    checkpoint: pathlib.Path | None = None,
    observe: Mapping[int, Observer] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainedSae:
    """Train one SAE on `data` for `config.steps` steps.

    Adam on the mean squared error per token; the rate falls to 0 along a cosine. Decoder rows are
    scaled back to unit norm after every step; the gradient along a row is left in, its effect is
    undone by that scaling.

    Args: `data` holds normalised training activations; for the rest see SaeRequest.
    Raises: UserError where k exceeds the dictionary, `start` does not fit, there is no data, the
        loss is no number, or the checkpoint is of another training (another start too).
    """
    request = SaeRequest(config, init_seed, data_seed, start, checkpoint, observe or {}, progress)
    return train_saes(data, [request])[0]


def train_saes(data: TokenActivations, requests: Sequence[SaeRequest]) -> list[TrainedSae]:
    """Train several SAEs on the same activations, step by step in turn.

    Each comes out as `train_sae` would make it, bit for bit. Those with the same `data_seed` and
    batch size see the same tokens in the same order: a batch is read and normalised once for all
    of them. Buffers of a step are shared by all.

    Raises: UserError as `train_sae`, for the first SAE that cannot be trained on.
    """
    orders: dict[tuple[int, int], TokenOrder] = {}
    buffers = Buffers()
    trainings = [_begin(data, request, orders, buffers) for request in requests]
    pairs = list(zip(trainings, requests, strict=True))
    while behind := [pair for pair in pairs if pair[0].step < pair[1].config.steps]:
        step = min(training.step for training, _ in behind)  # resumed ones may be ahead
        batches: dict[TokenOrder, Tensor] = {}
        for training, request in behind:
            if training.step == step:
                if training.order not in batches:
                    batches[training.order] = training.next_batch()
                _advance(training, request, batches[training.order])
    return [_result(training) for training in trainings]


def _begin(
    data: TokenActivations,
    request: SaeRequest,
    orders: dict[tuple[int, int], TokenOrder],
    buffers: Buffers,
) -> Training:
    """The training's first state, or that of its checkpoint."""
    config, seed = request.config, request.data_seed
    order = orders.setdefault(
        (seed, config.batch_tokens),
        TokenOrder(data.num_tokens, config.batch_tokens, data_seed=seed),
    )
    training = Training(
        data,
        config,
        init_seed=request.init_seed,
        data_seed=seed,
        start=request.start,
        order=order,
        buffers=buffers,
    )
    if request.checkpoint is not None and request.checkpoint.exists():
        training.load(request.checkpoint)
    elif 0 in request.observe:
        request.observe[0](0, training.sae)
    return training


def _advance(
    training: Training, request: SaeRequest, batch: Float[Tensor, "batch d_model"]
) -> None:
    """One step, and whoever waits for it."""
    training.advance(batch, log=training.step + 1 in request.observe)
    step, config = training.step, request.config
    if request.logged is not None and training.log and training.log[-1].step == step:
        request.logged(training.log[-1], training.sae)
    if step in request.observe:
        request.observe[step](step, training.sae)
    due = step % config.checkpoint_every == 0 and step < config.steps
    if request.checkpoint is not None and due:
        training.save(request.checkpoint)
    if request.progress is not None:
        request.progress(step)


def _result(training: Training) -> TrainedSae:
    """Tensors on the CPU but for the SAE."""
    retention = training.init_retention().float()
    return TrainedSae(
        training.sae, retention.cpu(), training.resampled.cpu(), training.log, training.engine
    )
