"""Activations, SAEs, and the sizes of what is measured with them."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator

from prunelens.config.frozen import Frozen
from prunelens.config.text import CorpusConfig


class ActivationConfig(Frozen):
    """Which activations are kept, and how they are normalised (methods §1, §4)."""

    normalisation: Literal["own", "dense"] = "own"
    """Whose mean and deviation: each condition's own (paper), or the dense model's for all."""
    skip_first: int = Field(1, ge=0)
    """Positions at the start of each window that are left out (the attention sink)."""
    max_norm_multiple: float | None = Field(10.0, gt=1)
    """Tokens whose dense norm exceeds this multiple of its median are left out; null: none."""
    statistics_tokens: int = Field(50_000, ge=2)
    """Training tokens from which mean and deviation are computed, in float64."""
    common_change: Literal["scalar", "diagonal", "low_rank"] = "scalar"
    """What pruning may do to all activations alike and the noise controls keep (methods §10): a
    gain, one per dimension, or a gain and a matrix of rank 8; beside it always a shift."""
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision on disk."""


Architecture = Literal["topk", "batchtopk"]
"""Each has a class in `sae.architectures`."""


class SaeConfig(Frozen):
    """Sparse autoencoders and their training (methods §5); the paper's values by default."""

    # Not written where it is TopK: before there was a choice, SAEs had no such field, and those
    # that are there keep their identity and their checkpoints.
    architecture: Architecture = Field("topk", exclude_if=lambda name: name == "topk")
    """topk: every token keeps its k largest latents. batchtopk: a training batch keeps its k x
    tokens largest, and afterwards all above a fixed threshold are kept (k per token in the mean).
    """
    expansion: int = Field(8, ge=1)
    """num_latents / d_model."""
    k: int = Field(64, ge=1)
    """Latents kept per token; of batchtopk in the mean."""
    steps: int = Field(20_000, ge=1)
    """Optimiser steps."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per step."""
    learning_rate: float = Field(5e-5, gt=0)
    """Adam's rate at the start; cosine to 0, no warm-up."""
    resample_every: int | None = Field(None, ge=1)
    """Steps between restarts of dead latents; null: a tenth of the steps."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints from which a killed training goes on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of a training step's products, whose sums are float32; weights, Adam's moments and
    every measurement stay float32. bfloat16 is faster where the hardware multiplies it itself."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, max_length=100)
    """Seed s means init_seed = data_seed = s."""
    control_seeds: int = Field(1, ge=1)
    """For how many of the seeds the control SAEs (other order; rotated) are trained."""
    warm_steps: int | None = Field(None, ge=1)
    """Steps that a warm-started SAE trains on; null: a quarter of the steps."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{list(seeds)} must be distinct and not negative")
        return seeds

    @property
    def resample_interval(self) -> int:
        """Steps between restarts of dead latents."""
        return self.resample_every or max(1, self.steps // 10)

    @property
    def resolved_warm_steps(self) -> int:
        """Steps that a warm-started SAE trains on."""
        return self.warm_steps or max(1, self.steps // 4)


class SufficiencyConfig(Frozen):
    """Were the SAEs trained enough to be compared? Looked at while they are trained."""

    checkpoints: tuple[float, ...] = Field((0.125, 0.25, 0.5), min_length=1, max_length=100)
    """Shares of the training after which SAEs are judged, beside its end; rising, inside (0, 1)."""
    condition: str | None = None
    """The pruned condition by label whose SAEs are followed beside the dense ones; null: the
    first. Which SAEs are followed is part of their identity: name the condition where others may be
    put before it."""

    @field_validator("checkpoints")
    @classmethod
    def _rising_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if sorted(set(shares)) != list(shares) or shares[0] <= 0 or shares[-1] >= 1:
            raise ValueError(f"{list(shares)} must rise and lie strictly between 0 and 1")
        return shares

    def steps_at(self, steps: int) -> tuple[int, ...]:
        """The checkpoints of a training of so many steps: rising, at least 1, before the end.

        A share is read as an exact decimal and rounded down. Short trainings have fewer
        checkpoints than there are shares; a single step has none.
        """
        found = {max(1, int(Fraction(str(share)) * steps)) for share in self.checkpoints}
        return tuple(sorted(found - {steps}))


class TransferConfig(Frozen):
    """RQ3: dense SAEs on pruned activations (methods §7)."""

    ce_tokens: int = Field(65_536, ge=1)
    """Eval tokens at most (in whole windows, drawn evenly over documents) on which cross-entropy is
    measured: the dense model's on all of them, a pruned model's on 32 windows, 64, … until what
    it recovers less is known to within less than the verdict's margin of 0.02. A window costs 1 +
    3 x (1 + 2 x SAEs) passes through the blocks above the site, and 1 + 2 x SAEs for the null."""
    refit_tokens: int = Field(50_000, ge=1)
    """Training tokens (in whole windows) on which decoder bias and thresholds are refitted."""


class CausalConfig(Frozen):
    """RQ5: what happens to the output when a latent is ablated (methods §7)."""

    prompts: int = Field(64, ge=2)
    """Eval windows that serve as prompts, drawn evenly over documents."""
    group_size: int = Field(100, ge=1)
    """Latents per group (robust, fragile, …) and seed; fewer where too few are alive."""
    contexts_per_latent: int = Field(64, ge=1)
    """Places where a latent fires, at most, at which it is ablated alone."""
    conditions: tuple[str, ...] | None = None
    """Pruned conditions by label, e.g. wanda-row-0.30; null: all."""


class EvidenceConfig(Frozen):
    """Where each latent fires, for the explorer."""

    top: int = Field(10, ge=1)
    """Strongest activations kept per latent, each from another window."""
    samples: int = Field(8, ge=1)
    """Equal intervals, at least, of a latent's activation range that each give one context."""
    either_side: int = Field(12, ge=0)
    """Tokens shown before and after the one where the latent fires."""
    effects: int = Field(10, ge=1)
    """Tokens shown that a latent's direction promotes most, and as many that it suppresses."""


class ProbesConfig(Frozen):
    """Which tokens have which concepts, for probes that need no SAE."""

    concepts: str | None = Field(None, min_length=1, max_length=1000)
    """`python`: what Python's own tokenizer and parser say of its source; or the field of the
    text's rows that holds them, `{"concept": [[start, end]]}` in characters or one value for the
    whole document; null: `python` where the text is the standard library, else no probes."""
    tokens: int = Field(500, ge=10)
    """Tokens with a concept, at most, that a probe is fitted on, and as many that it is measured
    on; and as many without."""
    corpus: CorpusConfig | None = None
    """The labelled text, in which the eval documents are found again; null: the study's own."""
