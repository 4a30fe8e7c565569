"""Perplexity of a model on a text (methods §2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.corpus import windows
from prunelens.errors import UserError
from prunelens.model import LanguageModel, logits
from prunelens.spread import one_of_each_stretch

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**29}  # numbers of four bytes: 16 MB and 2 GB
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**28}  # of these, in float32 for their logarithms


class Perplexity(NamedTuple):
    """How well a model predicts a text."""

    context_tokens: int
    """Tokens per window, the BOS included, after the cut to the model's maximum."""
    num_tokens: int
    """Predicted tokens."""
    nll: float
    """Mean negative log likelihood per predicted token, in nats; NaN where the model gives NaN."""
    perplexity: float
    """exp(nll)."""
    windows: Int[Tensor, " windows"]
    """Which windows of the text were read, in rising order."""
    window_nll: Float[Tensor, " windows"]
    """float64: the mean within each of them, for paired comparisons of two models."""


@torch.no_grad()
def measure_perplexity(
    lm: LanguageModel,
    stream: Int[Tensor, " tokens"],
    *,
    context_tokens: int,
    bos_token: int | None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """exp(mean NLL over predicted tokens), in non-overlapping windows.

    The BOS is context and never predicted; without one the first token of a window is not
    predicted. The sum is in float64. The windows depend on the arguments, not on the model.

    Args:
        stream: token ids without BOS, as `joined_stream` and `split_tokens` give them.
        context_tokens: tokens per window, cut to the model's maximum.
        bos_token: what opens every window; None: nothing does.
        max_tokens: predict at most so many tokens, in whole windows, of which one is drawn from
            each of as many equal stretches of the text; None: all.
        seed: of these draws.
        progress: called with the number of tokens predicted so far.
    Raises: UserError where there is less than one window.
    """
    context_tokens = min(context_tokens, lm.max_context_tokens or context_tokens)
    cut = windows(stream, context_tokens, bos_token)
    check_windows(len(cut), len(stream), context_tokens=context_tokens, max_tokens=max_tokens)
    most = len(cut) if max_tokens is None else max_tokens // (context_tokens - 1)
    read = one_of_each_stretch(len(cut), most, seed=seed)
    per_batch = LOGITS_AT_ONCE.get(lm.device.type, 2**22) // (context_tokens * lm.vocabulary_size)
    means, num_tokens = [], 0
    for batch in cut[read].split(max(1, per_batch)):
        means.append(next_token_nll(logits(lm, batch), batch).double().mean(1).cpu())
        num_tokens += batch[:, 1:].numel()
        if progress:
            progress(num_tokens)
    window_nll = torch.cat(means)
    nll = float(window_nll.mean())
    # math.exp overflows above 709 nats, where the perplexity is as good as infinite.
    perplexity = math.inf if nll > 709 else math.exp(nll)
    return Perplexity(context_tokens, num_tokens, nll, perplexity, read, window_nll)


def check_windows(
    num_windows: int, num_tokens: int, *, context_tokens: int, max_tokens: int | None
) -> None:
    """Raises UserError where a text of so many whole windows and tokens gives none to score."""
    if not num_windows:
        raise UserError(
            f"perplexity.context_tokens: {context_tokens} is more than the {num_tokens} tokens of"
            " the text; lower it or give more text"
        )
    if max_tokens is not None and max_tokens < context_tokens - 1:
        raise UserError(
            f"perplexity.max_tokens: {max_tokens} is less than one window of {context_tokens}"
            f" tokens; raise it to at least {context_tokens - 1}"
        )


def next_token_nll(
    scores: Float[Tensor, "windows context vocabulary"], tokens: Int[Tensor, "windows context"]
) -> Float[Tensor, "windows predictions"]:
    """-log p(token | what stands before it) at positions 1.. of each window, in float32.

    Taken a few positions at a time: over a large vocabulary, float32 scores of a whole window and
    their logarithms are four times what the model gave (4 GB for 2,048 tokens of Gemma 3).
    """
    targets = tokens[:, 1:].to(scores.device)
    at_once = max(1, SCORES_AT_ONCE.get(scores.device.type, 2**22) // scores.shape[-1])
    losses = torch.empty(targets.shape, dtype=torch.float32, device=scores.device)
    for window, wanted, found in zip(scores, targets, losses, strict=True):
        for first in range(0, len(wanted), at_once):
            part = slice(first, min(first + at_once, len(wanted)))
            found[part] = F.cross_entropy(window[part].float(), wanted[part], reduction="none")
    return losses
