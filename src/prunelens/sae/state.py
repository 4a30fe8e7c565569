"""The state of one SAE's training: a step, restarts, checkpoints (methods §5).

Everything random is a function of a seed and a position (epoch or step), so a checkpoint holds no
random state and a resumed training repeats the uninterrupted one bit for bit (on a GPU as far as
its libraries take the same algorithms again).
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.config import SaeConfig
from prunelens.errors import UserError
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers
from prunelens.sae.checked import load_checked, save_checked
from prunelens.sae.order import TokenOrder, derived_generator
from prunelens.sae.resample import restart_dead
from prunelens.sae.start import fingerprint, starting_sae
from prunelens.sae.steps.engine import descent_of

_ROWS = 256  # of a weight matrix, looked at at a time


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
    """Mean over the latents of `Training.init_retention`, had the training ended here."""


class Training:
    """The state of one training, `step` steps in.

    Trainings that take turns may share the order of tokens and the buffers of a step.
    """

    def __init__(
        self,
        data: TokenActivations,
        config: SaeConfig,
        *,
        init_seed: int,
        data_seed: int,
        start: SparseAutoencoder | None = None,
        order: TokenOrder | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        if data.num_tokens < 1:
            raise UserError("corpus.train_tokens: no activations to train on; raise it")
        sae = starting_sae(data.d_model, config, init_seed=init_seed, start=start)
        device = data.rows(torch.zeros(1, dtype=torch.long)).device
        self.data, self.config, self.data_seed = data, config, data_seed
        self.sae = sae.to(device)
        self.order = order or TokenOrder(data.num_tokens, config.batch_tokens, data_seed=data_seed)
        self.engine, self.descent = descent_of(self.sae, config, buffers)
        self.start = self.sae.decoder_weight.detach().clone()
        self.resampled = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
        self.fired = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
        self.log: list[StepLog] = []
        self.step = 0
        self.loss = torch.zeros((), device=device)  # of the last step
        unused = {"seeds", "control_seeds", "checkpoint_every", "warm_steps"}
        self.identity = {
            "config": config.model_dump(mode="json", exclude=unused),
            "seeds": [init_seed, data_seed],
            "start": None if start is None else fingerprint(start),
            "data": [data.num_tokens, data.d_model],
        }

    def next_batch(self) -> Float[Tensor, "batch d_model"]:
        """What the next step is to see."""
        return self.data.rows(self.order.batch(self.step + 1))

    @torch.no_grad()
    def advance(self, x_hat: Float[Tensor, "batch d_model"], *, log: bool = False) -> None:
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
        rate = config.learning_rate * (1 + math.cos(math.pi * (self.step - 1) / config.steps)) / 2
        self.loss, fires = self.descent.step(x_hat, rate=rate, number=self.step)
        self.fired |= fires
        if x_hat.device.type == "cpu":  # elsewhere it would wait for the device at every step
            self._checked_loss()
        due = self.step % config.resample_interval == 0
        hundredth = self.step % max(1, config.steps // 100) == 0
        if log or due or hundredth or self.step in (1, config.steps):
            spread = float((x_hat - x_hat.mean(0)).square().sum(1).mean())
            loss = self._checked_loss()
            fvu = loss / spread if spread > 0 else math.nan
            retention = float(self.init_retention().mean())
            num_dead = int((~self.fired).sum())
            self.log.append(StepLog(self.step, loss, fvu, rate, num_dead, retention))

    def _checked_loss(self) -> float:
        """The last step's loss. Raises UserError where it is no number."""
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise UserError(
                f"sae.learning_rate: the loss is {loss} at step {self.step}; lower the rate (now"
                f" {self.config.learning_rate}), or look for extreme activations"
            )
        return loss

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
        self.descent.forget(restarted)

    def init_retention(self) -> Float[Tensor, " latents"]:
        """Cosine of each decoder row with the row it (re)started from, in float64."""
        # Some rows at a time: a fresh float64 copy of both matrices costs more than two steps.
        matrices = (self.sae.decoder_weight.detach(), self.start)
        pairs = zip(*(matrix.split(_ROWS) for matrix in matrices), strict=True)
        return torch.cat([torch.cosine_similarity(a.double(), b.double()) for a, b in pairs])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, not copied."""
        named = {"start": self.start, "resampled": self.resampled, "fired": self.fired}
        descent = self.descent
        groups = {"sae": descent.weights, "mean": descent.mean, "mean_square": descent.mean_square}
        for group, weights in groups.items():
            for name, tensor in weights._asdict().items():
                named[f"{group}.{name}"] = tensor
        return named | {f"sae.{name}": tensor for name, tensor in self.sae.named_buffers()}

    def save(self, path: pathlib.Path) -> None:
        """Write a checkpoint beside `path`, then put it in place at once.

        Raises: UserError where the loss is no number, and writes nothing.
        """
        self._checked_loss()
        state = {"step": self.step, "log": self.log, "identity": self.identity}
        save_checked(self.tensors(), path, note=json.dumps(state))

    def load(self, path: pathlib.Path) -> None:
        """Take over the state of a checkpoint.

        Raises: UserError where it does not fit, or is not as it was written.
        """
        try:
            saved, note = load_checked(path)
        except ValueError as error:
            problem = " ".join(str(error).split())[:150]
            raise UserError(
                f"checkpoint: {path} cannot be read ({problem}); delete it to start again"
            ) from None
        state: dict[str, Any] = json.loads(note)
        if state["identity"] != json.loads(json.dumps(self.identity)):
            raise UserError(
                f"checkpoint: {path} is of another training (config, seeds, start or data differ);"
                " delete it to start again"
            )
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.log = [StepLog(*entry) for entry in state["log"]]
        self.step = state["step"]
