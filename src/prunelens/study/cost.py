"""Operations that the definitions ask for, a multiplication and an addition counting two.

What a device really executes differs by a factor (a GPU multiplies a TopK SAE's zeros as well),
which the measured rates of `study.preflight.calibrate` take in: they are in the same operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prunelens.checkpoint import ModelShape
from prunelens.config import StudyConfig
from prunelens.study.parents import Of, Sae, saes_among


class Cost(NamedTuple):
    """What one stage takes."""

    flops: float = 0.0
    """Additions and multiplications."""
    forward_tokens: int = 0
    """Tokens run through the language model, or through those of its blocks that are needed."""
    sae_tokens: int = 0
    """Tokens on which an SAE is trained."""


class Costed(NamedTuple):
    """A stage as its cost is reckoned from it."""

    config: Mapping[str, Any]
    """As in its identity."""
    parents: Mapping[str, Any]
    """Role -> stage; only the roles are looked at."""
    shape: ModelShape
    """Of its model."""
    study: StudyConfig
    """Where text sizes, windows and SAE sizes come from."""

    @property
    def eval_tokens(self) -> int:
        """Of both halves."""
        return self.study.corpus.eval_tokens

    def saes(self, of: Of) -> list[Sae]:
        """The parents that are SAEs of that kind."""
        return list(saes_among(self.parents, of))

    def forward(self, tokens: int, *, blocks: int | None = None, head: bool = False) -> float:
        """`forward_flops` of the model on windows of the corpus."""
        context = self.study.corpus.context_tokens
        return forward_flops(self.shape, tokens, context_tokens=context, blocks=blocks, head=head)

    def encoding(self, tokens: int) -> float:
        """`encoding_flops` of an SAE of the study."""
        return encoding_flops(*sae_size(self.shape, self.study), tokens)

    def matching(self, comparisons: int) -> float:
        """`matching_flops` of SAEs of the study."""
        d_model, num_latents, _ = sae_size(self.shape, self.study)
        return matching_flops(d_model, num_latents, comparisons)


def forward_flops(
    shape: ModelShape, tokens: int, *, context_tokens: int, blocks: int | None = None, head: bool
) -> float:
    """A forward pass through `blocks` blocks (None: all), with or without the output head.

    Attention is counted over the whole window, the masked half included.
    """
    blocks = shape.num_blocks if blocks is None else blocks
    weights = shape.linear_weights * blocks / shape.num_blocks
    attention = 2 * context_tokens * shape.attention_width * blocks
    output = shape.d_model * shape.vocabulary_size if head else 0
    return 2.0 * tokens * (weights + attention + output)


def training_flops(d_model: int, num_latents: int, k: int, tokens: int) -> float:
    """SAE training: the encoder's product, and four sparse ones of k latents per token.

    The four: reconstruction, gradients of the latents, of the encoder, of the decoder.
    """
    return 2.0 * tokens * d_model * (num_latents + 4 * k)


def encoding_flops(d_model: int, num_latents: int, k: int, tokens: int) -> float:
    """An SAE's encoder, and its sparse decoder."""
    return 2.0 * tokens * d_model * (num_latents + k)


def matching_flops(d_model: int, num_latents: int, comparisons: int) -> float:
    """All cosines of two dictionaries, `comparisons` times."""
    return 2.0 * comparisons * num_latents**2 * d_model


def sae_size(shape: ModelShape, study: StudyConfig) -> tuple[int, int, int]:
    """d_model, latents and k of a model's SAEs in this study."""
    return shape.d_model, study.sae.expansion * shape.d_model, study.sae.k
