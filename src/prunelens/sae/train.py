"""Training one TopK SAE: start, learning rate, resampling, checkpoints (methods §5).

Everything random is a function of a seed and a position (epoch or step), so a checkpoint holds no
random state and a resumed training repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import safetensors
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.adam import adam

from prunelens.config import SaeConfig
from prunelens.errors import UserError
from prunelens.sae import kernels
from prunelens.sae.kernels import Weights
from prunelens.sae.order import TokenOrder, derived_generator
from prunelens.sae.resample import restart_dead
from prunelens.sae.start import fingerprint, starting_sae
from prunelens.sae.topk import TopKSAE

Observer = Callable[[int, TopKSAE], None]


@runtime_checkable
class TokenActivations(Protocol):
    """What training and evaluation need of an activation store: normalised float32 rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the store."""

    @property
    def d_model(self) -> int:
        """Width of an activation."""

    @property
    def sigma(self) -> Float[Tensor, " d_model"]:
        """Deviation that raw activations were divided by."""

    def rows(self, index: Int[Tensor, " batch"], /) -> Float[Tensor, "batch d_model"]:
        """Tokens by index, on the device to train on."""

    def batches(self, batch_tokens: int, /) -> Iterator[Float[Tensor, "batch d_model"]]:
        """All tokens in order."""


class StepLog(NamedTuple):
    """A point of the training curve."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the batch of the squared error summed over d_model."""
    fvu: float
    """Squared error over the batch's variance; NaN where the batch does not vary."""
    learning_rate: float
    """Used in this step."""
    num_dead: int
    """Latents that have not fired since the last check for dead latents."""
    mean_init_retention: float
    """Mean over the latents of `TrainedSae.init_retention`, had the training ended here."""


class TrainedSae(NamedTuple):
    """An SAE and what its training left behind."""

    sae: TopKSAE
    init_retention: Float[Tensor, " latents"]
    """Cosine of the final decoder row with the row it (re)started from."""
    resampled: Bool[Tensor, " latents"]
    """The latent was restarted, so its start is not the initialisation."""
    log: list[StepLog]
    """About a hundred points, and every observed step."""


def train_sae(
    data: TokenActivations,
    config: SaeConfig,
    *,
    init_seed: int,
    data_seed: int,
    start: TopKSAE | None = None,
    checkpoint: pathlib.Path | None = None,
    observe: dict[int, Observer] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainedSae:
    """Train on `data` for `config.steps` steps.

    Adam on the mean squared error per token; the rate falls to 0 along a cosine. Decoder rows are
    scaled back to unit norm after every step; the gradient along a row is left in, its effect is
    undone by that scaling.

    Args:
        data: normalised training activations.
        config: see SaeConfig; `seeds`, `control_seeds` and `warm_steps` are not used here.
        init_seed: fixes the initial weights, nothing else; changes nothing where `start` is given.
        data_seed: fixes the order of the tokens and the inputs that latents restart at.
        start: an SAE whose weights training starts from (a warm start) instead of random ones. It
            is copied. Only weights are taken over: Adam's moments and the rate start anew.
        checkpoint: a safetensors file, written every `config.checkpoint_every` steps; if it exists,
            training goes on from it. The caller deletes it.
        observe: step -> callback, called after that step (0: before the first). Called a second
            time for steps that a resumed training repeats. Must not change the SAE.
        progress: called with the step after every step.
    Raises: UserError where k exceeds the dictionary, `start` does not fit, there is no data, the
        loss is no number, or the checkpoint is of another training (another start too).
    """
    observe = observe or {}
    training = Training(data, config, init_seed=init_seed, data_seed=data_seed, start=start)
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint)
    elif 0 in observe:
        observe[0](0, training.sae)
    while training.step < config.steps:
        training.advance(log=training.step + 1 in observe)
        if training.step in observe:
            observe[training.step](training.step, training.sae)
        due = training.step % config.checkpoint_every == 0 and training.step < config.steps
        if checkpoint is not None and due:
            training.save(checkpoint)
        if progress is not None:
            progress(training.step)
    return training.result()


class Training:
    """The state of one training, `step` steps in."""

    def __init__(
        self,
        data: TokenActivations,
        config: SaeConfig,
        *,
        init_seed: int,
        data_seed: int,
        start: TopKSAE | None = None,
    ) -> None:
        if data.num_tokens < 1:
            raise UserError("corpus.train_tokens: no activations to train on; raise it")
        sae = starting_sae(data.d_model, config, init_seed=init_seed, start=start)
        device = data.rows(torch.zeros(1, dtype=torch.long)).device
        self.data, self.config, self.data_seed = data, config, data_seed
        self.sae = sae.to(device)
        self.order = TokenOrder(data.num_tokens, config.batch_tokens, data_seed=data_seed)
        # Adam's functional form: the class would import PyTorch's compiler, seconds per process.
        self.mean = Weights(*(torch.zeros_like(w) for w in sae.weights))
        self.mean_square = Weights(*(torch.zeros_like(w) for w in sae.weights))
        self.start = self.sae.decoder_weight.detach().clone()
        self.resampled = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
        self.fired = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
        self.log: list[StepLog] = []
        self.step = 0
        unused = {"seeds", "control_seeds", "checkpoint_every", "warm_steps"}
        self.identity = {
            "config": config.model_dump(mode="json", exclude=unused),
            "seeds": [init_seed, data_seed],
            "start": None if start is None else fingerprint(start),
            "data": [data.num_tokens, data.d_model],
        }

    @torch.no_grad()
    def advance(self, *, log: bool = False) -> None:
        """One step: restart what was dead after the last one if due, gradients, Adam, unit norm.

        Restarts open a step, so that whoever looks between two steps sees what was trained and not
        what was just restarted. A point is added to the log every hundredth of the steps, where
        dead latents are counted, and where asked.
        """
        if self.step and self.step % self.config.resample_interval == 0:
            if self.step < 0.75 * self.config.steps and not bool(self.fired.all()):
                self._restart(~self.fired)
            self.fired.zero_()
        self.step += 1
        config = self.config
        x_hat = self.data.rows(self.order.batch(self.step))
        rate = config.learning_rate * (1 + math.cos(math.pi * (self.step - 1) / config.steps)) / 2
        loss, fires = self._descend(x_hat, rate)
        self.fired |= fires
        due = self.step % config.resample_interval == 0
        hundredth = self.step % max(1, config.steps // 100) == 0
        if log or due or hundredth or self.step in (1, config.steps):
            spread = float((x_hat - x_hat.mean(0)).square().sum(1).mean())
            fvu = loss / spread if spread > 0 else math.nan
            retention = float(self._init_retention().mean())
            num_dead = int((~self.fired).sum())
            self.log.append(StepLog(self.step, loss, fvu, rate, num_dead, retention))

    def _descend(self, x_hat: Float[Tensor, "batch d_model"], rate: float) -> tuple[float, Tensor]:
        """Update the weights on one batch; returns the loss before it and which latents fired."""
        sae = self.sae
        dtype = getattr(torch, self.config.encoder_dtype)
        latents = kernels.encode(x_hat, sae.encoder_weight, sae.encoder_bias, sae.k, dtype=dtype)
        found = kernels.gradients(x_hat, sae.weights, latents)
        loss = float(found.loss)
        if not math.isfinite(loss):
            raise UserError(
                f"sae.learning_rate: the loss is {loss} at step {self.step}; lower the rate (now"
                f" {self.config.learning_rate}), or look for extreme activations"
            )
        adam(
            list(sae.weights),
            list(found.weights),
            list(self.mean),
            list(self.mean_square),
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(self.step - 1.0, device=x_hat.device) for _ in sae.weights],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            lr=rate,
            weight_decay=0.0,
            maximize=False,
        )
        norms = torch.linalg.vector_norm(sae.decoder_weight, dim=1, keepdim=True)
        sae.decoder_weight.div_(norms)
        return loss, found.fires

    def _restart(self, dead: Bool[Tensor, " latents"]) -> None:
        generator = derived_generator("restart", self.data_seed, self.step)
        # Enough inputs to choose from, without a pass over all of them.
        size = max(8192, 4 * self.sae.num_latents)
        pool = torch.randperm(self.data.num_tokens, generator=generator)[:size]
        restarted = restart_dead(
            self.sae,
            dead,
            pool,
            self.data.rows,
            batch_tokens=self.config.batch_tokens,
            generator=generator,
        )
        self.start[restarted] = self.sae.decoder_weight[restarted]
        self.resampled |= restarted
        for moments in (self.mean, self.mean_square):
            for tensor in moments[:3]:  # all but the decoder bias, which belongs to no latent
                tensor[restarted] = 0

    def result(self) -> TrainedSae:
        """What the caller gets; tensors on the CPU but for the SAE."""
        retention = self._init_retention().float()
        return TrainedSae(self.sae, retention.cpu(), self.resampled.cpu(), self.log)

    def _init_retention(self) -> Float[Tensor, " latents"]:
        """In float64."""
        rows, start = self.sae.decoder_weight.detach().double(), self.start.double()
        return torch.cosine_similarity(rows, start, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, not copied."""
        named = {"start": self.start, "resampled": self.resampled, "fired": self.fired}
        groups = {"sae": self.sae.weights, "mean": self.mean, "mean_square": self.mean_square}
        for group, weights in groups.items():
            for name, tensor in weights._asdict().items():
                named[f"{group}.{name}"] = tensor.detach()
        return named

    def save(self, path: pathlib.Path) -> None:
        """Write a checkpoint beside `path`, then put it in place at once."""
        state = {"step": self.step, "log": self.log, "identity": self.identity}
        partial = path.with_name(path.name + ".partial")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()},
            partial,
            metadata={"training": json.dumps(state)},
        )
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: pathlib.Path) -> None:
        """Take over the state of a checkpoint. Raises UserError where it does not fit."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state: dict[str, Any] = json.loads((file.metadata() or {})["training"])
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            problem = " ".join(str(error).split())[:150]
            raise UserError(
                f"checkpoint: {path} cannot be read ({problem}); delete it to start again"
            ) from None
        if state["identity"] != json.loads(json.dumps(self.identity)):
            raise UserError(
                f"checkpoint: {path} is of another training (config, seeds, start or data differ);"
                " delete it to start again"
            )
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.log = [StepLog(*entry) for entry in state["log"]]
        self.step = state["step"]
