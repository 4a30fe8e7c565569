"""Which next tokens a direction promotes and suppresses, straight through the unembedding.

The logit lens of a decoder direction d: the logits that d adds where it is a small part of what
enters the last norm, U (gain * d) up to the stream's length. The blocks above d are passed over,
so of low layers it says little.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunelens.errors import UserError
from prunelens.model import LanguageModel, logits
from prunelens.offload import execution_device, weight_of


class TokenEffects(NamedTuple):
    """Per direction the tokens at both ends, the most extreme first; on the CPU."""

    promoted: Int[Tensor, "latents count"]
    """Token ids."""
    promoted_logits: Float[Tensor, "latents count"]
    """Less the mean over the vocabulary; NaN for a direction of length 0, whose tokens say nothing.
    """
    suppressed: Int[Tensor, "latents count"]
    """Token ids."""
    suppressed_logits: Float[Tensor, "latents count"]
    """As of the promoted ones."""


class Unembedding(NamedTuple):
    """What turns the output of the last block into logits."""

    weight: Float[Tensor, "vocab d_model"]
    """Of the head; rows that are no token (a padded vocabulary) are left out."""
    final_norm: nn.Module
    """What the head reads through."""


def unembedding(lm: LanguageModel) -> Unembedding:
    """The head of a model, and the norm whose output enters it, found in a pass over two tokens.

    Raises: UserError where it has no such head or norm.
    """
    head = lm.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (len(weight), lm.d_model):
        raise UserError(
            f"models.name: {lm.label} has no matrix from its activations ({lm.d_model} wide) to"
            " logits; leave 'evidence' out of questions"
        )
    final_norm = _final_norm(lm, head)
    known = lm.tokenizer.get_vocab().values() if lm.tokenizer else [len(weight) - 1]
    return Unembedding(weight_of(head).detach()[: max(known) + 1], final_norm)


@torch.no_grad()
def token_effects(
    directions: Float[Tensor, "latents d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    final_norm: nn.Module,
    *,
    count: int = 10,
    block: int = 2**26,
) -> TokenEffects:
    """The `count` tokens whose logits each direction raises most, and lowers most.

    Logits are U (gain * d) of the direction at unit length, less their mean over the vocabulary
    (softmax does not see a common shift), so that latents can be compared. A norm that takes off
    the mean takes it off the direction.

    Args:
        directions: in raw space: where an SAE works in normalised space, times sigma.
        unembedding: U, of any precision; products are float32, on its device.
        final_norm: the last norm. Its gain is measured, whatever its convention.
        block: logits at a time, 4 bytes each.
    Raises: UserError where the vocabulary has fewer than `count` tokens.
    """
    num_tokens, (num_latents, _) = len(unembedding), directions.shape
    if not 1 <= count <= num_tokens:
        raise UserError(
            f"evidence.effects: {count} is not in 1..{num_tokens}, the size of the vocabulary"
        )
    read = _as_read(directions.to(unembedding.device, torch.float32), final_norm)
    at_once = max(1, block // max(1, num_latents))
    best = _Extremes(count, sign=1.0), _Extremes(count, sign=-1.0)
    total = torch.zeros(read.shape[1], dtype=torch.float64, device=read.device)
    for first in range(0, num_tokens, at_once):
        rows = unembedding[first : first + at_once].float()
        total += rows.sum(0, dtype=torch.float64)
        found = read @ rows.T
        for extremes in best:
            extremes.offer(found, first)
    mean = (read.double() @ (total / num_tokens)).float()
    mean[~read.any(1)] = torch.nan
    (promoted, raised), (suppressed, lowered) = (extremes.found(mean) for extremes in best)
    return TokenEffects(promoted, raised, suppressed, lowered)


class _Extremes:
    """The largest logits (times a sign) of every direction, while the vocabulary goes by."""

    def __init__(self, count: int, *, sign: float) -> None:
        self._count, self._sign = count, sign
        self._tokens: Tensor | None = None
        self._logits: Tensor | None = None

    def offer(self, logits: Float[Tensor, "latents some"], first: int) -> None:
        """Of tokens `first`, `first` + 1, …"""
        count = min(self._count, logits.shape[1])
        values, tokens = logits.topk(count, dim=1, largest=self._sign > 0)
        tokens = tokens + first
        if self._logits is not None and self._tokens is not None:
            values = torch.cat([self._logits, values], dim=1)
            tokens = torch.cat([self._tokens, tokens], dim=1)
            count = min(self._count, values.shape[1])
            values, source = values.topk(count, dim=1, largest=self._sign > 0)
            tokens = tokens.gather(1, source)
        self._logits, self._tokens = values, tokens

    def found(self, mean: Float[Tensor, " latents"]) -> tuple[Tensor, Tensor]:
        """Tokens, and their logits less the mean."""
        assert self._logits is not None and self._tokens is not None, "there are tokens"
        return self._tokens.cpu(), (self._logits - mean[:, None]).cpu()


def _as_read(
    directions: Float[Tensor, "latents d_model"], norm: nn.Module
) -> Float[Tensor, "latents d_model"]:
    """What a small part of the residual stream is behind the norm, but for the stream's length."""
    unit = torch.nn.functional.normalize(directions, dim=1)
    gain, takes_off_mean = _measured(norm, directions.shape[1])
    if takes_off_mean:
        unit = unit - unit.mean(1, keepdim=True)
    return unit * gain.to(unit.device)


def _measured(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """A norm's gain, and whether it takes off the mean.

    x has mean 0 and root mean square 1, so that either kind of norm leaves it, and what a norm
    adds cancels between x and -x. All ones are nothing but mean.
    """
    x = torch.tensor([1.0, -1.0]).repeat(d_model)[:d_model]
    if d_model % 2:  # three numbers that do what pairs do
        x[-3:] = torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(2)
    weight = next(norm.parameters(), None)
    ones = torch.ones(d_model)
    inputs = torch.stack([x, -x, ones, -ones])[None]
    if weight is not None:
        inputs = inputs.to(execution_device(norm), weight.dtype)
    plus, minus, up, down = norm(inputs)[0].float()
    gain = (plus - minus) / (2 * inputs[0, 0].float())
    largest = float(gain.abs().max())
    return gain, float((up - down).abs().max()) < 0.01 * largest


def _final_norm(lm: LanguageModel, head: nn.Module) -> nn.Module:
    """The module outside the blocks that gave what the head took: names differ, this does not."""
    within = {head, *lm.blocks.modules()}
    outside = [m for m in lm.model.modules() if m not in within and not list(m.children())]
    outputs: list[tuple[nn.Module, Tensor]] = []
    inputs: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        passes_on = given and given[0] is output  # as dropout does
        if isinstance(output, Tensor) and not passes_on:
            outputs.append((module, output))

    hooks = [module.register_forward_hook(keep) for module in outside]
    hooks.append(head.register_forward_pre_hook(lambda _, given: inputs.append(given[0])))
    try:
        logits(lm, torch.tensor([[0, 1]]))
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in outputs:
        if output.shape == inputs[0].shape and torch.equal(output.to(inputs[0].device), inputs[0]):
            return module
    raise UserError(
        f"models.name: {lm.label} has no norm right before its unembedding; leave 'evidence' out of"
        " questions"
    )
