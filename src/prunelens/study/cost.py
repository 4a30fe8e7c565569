"""How much work a stage is, from its config alone: operations, and tokens through the models.

Operations are those that the definitions ask for, a multiplication and an addition counting two.
What a device really executes differs by a factor (a GPU multiplies a TopK SAE's zeros as well),
which the measured rates of `study.preflight.calibrate` take in: they are in the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prunelens.analyses.persistence import DRAWS
from prunelens.analyses.scaling import SOURCES
from prunelens.analyses.survival import COORDINATES
from prunelens.checkpoint import ModelShape
from prunelens.config import StudyConfig

KINDS = {  # stage -> the kind of work whose rate it runs at; other stages are minutes at most
    "calibration": "language model",
    "prune": "language model",
    "perplexity": "language model",
    "activations": "language model",
    "transfer": "language model",
    "causal": "language model",
    "sae": "SAE training",
    "common_change": "SAE encoding",
    "persistence": "SAE encoding",
    "scaling": "SAE encoding",
    "activation_matching": "SAE encoding",
    "evidence": "SAE encoding",
    "stability": "matching",
    "survival": "matching",
    "subspace": "matching",
    "sufficiency": "matching",
}
SECONDS_PER_FLOP = {  # relative to the language model's: sparse products are slower (2 cores)
    "language model": 1.0,
    "SAE training": 4.0,
    "SAE encoding": 4.0,
    "matching": 1.0,
}
LEAST_COST = 1e7
EVALUATIONS = 1.5  # passes over the eval split per SAE: at the end, and over its first half
FIT_STEPS = 10  # of the joint regression; three to five were seen
ABLATION_GROUPS = 10  # of latents: five for each of two groupings
ABLATED_SHARE = 0.25  # of all (prompt, position) pairs: a latent fires in some prompts, from some
# position on. An assumption; the true share is known once the SAE is there.


class Work(NamedTuple):
    """What one stage takes."""

    flops: float = 0.0
    """Additions and multiplications."""
    forward_tokens: int = 0
    """Tokens run through the language model, or through those of its blocks that are needed."""
    sae_tokens: int = 0
    """Tokens on which an SAE is trained."""


def stage_work(
    name: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Any],
    shape: ModelShape,
    study: StudyConfig,
) -> Work:
    """The work of one stage.

    Args:
        name: the stage's kind; one that is not in KINDS is no work worth counting.
        config: the stage's config, as in its identity.
        parents: role -> stage; only the roles are looked at.
        shape: of the model that the stage belongs to.
        study: where text sizes, windows and SAE sizes come from.
    """
    count = _COUNTS.get(name)
    return count(config, parents, shape, study) if count else Work()


def progress_cost(name: str, work: Work) -> float:
    """Roughly in proportion to a stage's seconds, for what a person sees of the progress."""
    return max(LEAST_COST, work.flops * SECONDS_PER_FLOP.get(KINDS.get(name, ""), 1.0))


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


def _calibration(
    _config: Mapping[str, Any], _parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    tokens = study.corpus.calibration_tokens
    context = study.corpus.context_tokens
    return Work(forward_flops(shape, tokens, context_tokens=context, head=False), tokens)


def _prune(
    config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """With sequential calibration every block runs twice: unpruned for its inputs, then pruned.

    SparseGPT's products of inputs take about as much as a pass: a matrix's inputs are about as many
    as its outputs, and it has products where they have weights.
    """
    pruning = config.get("pruning")
    if pruning is None or pruning["calibration"] != "sequential":
        head = bool(pruning and pruning.get("lm_head")) * shape.d_model * shape.vocabulary_size
        return Work(10.0 * (shape.linear_weights + head))  # scores, and counting; or a comparison
    once = _calibration(config, parents, shape, study)
    products = once.flops if pruning["criterion"] == "sparsegpt" else 0.0
    return Work(2 * once.flops + products, 2 * once.forward_tokens)


def _perplexity(
    config: Mapping[str, Any], _parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """A text of its own is taken to be as long as the eval split."""
    tokens = config["max_tokens"] or study.corpus.eval_tokens
    longest = shape.max_context_tokens
    contexts = {min(c, longest) if longest else c for c in config["context_tokens"]}
    flops = sum(forward_flops(shape, tokens, context_tokens=c, head=True) for c in contexts)
    return Work(flops, tokens * len(contexts))


def _activations(
    config: Mapping[str, Any], _parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    tokens = study.corpus.train_tokens + study.corpus.eval_tokens
    context, blocks = study.corpus.context_tokens, config["layer"] + 1
    flops = forward_flops(shape, tokens, context_tokens=context, blocks=blocks, head=False)
    return Work(flops, tokens)


def _sae(
    config: Mapping[str, Any], _parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    size = sae_size(shape, study)
    tokens = config["steps"] * config["batch_tokens"]
    passes = EVALUATIONS + len(config["checkpoints"])
    judged = round(passes * study.corpus.eval_tokens)
    return Work(training_flops(*size, tokens) + encoding_flops(*size, judged), 0, tokens)


def _common_change(
    _config: Mapping[str, Any], _parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Two products of every token's activations with each other, on half the eval split."""
    return Work(4.0 * (study.corpus.eval_tokens // 2) * shape.d_model**2)


def _persistence(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Per SAE: dense and every draw of what is disturbed, on half the eval split."""
    encodings = 1 + sum(DRAWS.values())
    tokens = study.corpus.eval_tokens // 2 * encodings * _count(parents, "sae-")
    return Work(encoding_flops(*sae_size(shape, study), tokens))


def _scaling(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Per SAE, on half the eval split: one encoding, and per step of the joint regression k sparse
    rows of every target, read twice.
    """
    d_model, num_latents, k = sae_size(shape, study)
    tokens = study.corpus.eval_tokens // 2 * _count(parents, "sae-")
    sparse = 4.0 * tokens * d_model * k * len(SOURCES) * FIT_STEPS
    return Work(encoding_flops(d_model, num_latents, k, tokens) + sparse)


def _activation_matching(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Every SAE reads half the eval split, plain ones of a pruned run also the null in its place;
    every pair multiplies k by k latents per token.
    """
    d_model, num_latents, k = sae_size(shape, study)
    tokens, saes = study.corpus.eval_tokens // 2, sum("-" in role for role in parents)
    seeds = _count(parents, "dense-") if "pruned" in parents else 0
    pairs = 2.0 * tokens * k**2 * (saes * max(1, saes - 1) + seeds**2)
    return Work(encoding_flops(d_model, num_latents, k, tokens * (saes + seeds)) + pairs)


def _stability(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    d_model, num_latents, _ = sae_size(shape, study)
    seeds = len(parents)
    return Work(matching_flops(d_model, num_latents, seeds * (seeds - 1) // 2))


def _survival(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """The arms of methods §7: a pruned run's own, or the dense run's ceilings, floor and chance."""
    roles = [role.split("-") for role in parents]
    seeds = sum(parts[0] == "dense" and parts[1] == parts[2] for parts in roles)
    controls = sum(parts[1] != parts[2] for parts in roles)
    pruned = any(parts[0] == "pruned" for parts in roles)
    pairs = seeds * (seeds - 1)
    comparisons = seeds + controls + pairs if pruned else controls + 2 * pairs
    d_model, num_latents, _ = sae_size(shape, study)
    return Work(matching_flops(d_model, num_latents, comparisons * len(COORDINATES)))


def _subspace(
    config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Every arm's cosines again, in one system of coordinates."""
    return Work(_survival(config, parents, shape, study).flops / len(COORDINATES))


def _sufficiency(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Every dense SAE against every pruned one at every checkpoint, where both are followed."""
    d_model, num_latents, _ = sae_size(shape, study)
    dense = _count(parents, "dense-")
    steps = len(study.sufficiency.checkpoints) + 1
    return Work(matching_flops(d_model, num_latents, dense**2 * steps))


def _transfer(
    config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Activations for FVU and refit, then cross-entropies on four sets, the null's one of them.

    As many windows as there may be are counted: a pruned model's may be enough before.
    """
    context, blocks = study.corpus.context_tokens, config["layer"] + 1
    num_saes = max(1, _count(parents, "sae-"))  # one of others is no parent
    below = study.corpus.eval_tokens + config["refit_tokens"]
    whole = config["ce_tokens"] * (5 + 8 * num_saes)
    flops = forward_flops(shape, below, context_tokens=context, blocks=blocks, head=False)
    flops += forward_flops(shape, whole, context_tokens=context, head=True)
    encoded = num_saes * (4 * below + 8 * config["ce_tokens"])
    return Work(flops + encoding_flops(*sae_size(shape, study), encoded), below + whole)


def _causal(
    config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Two protocols with every SAE, every latent of every group, through the blocks above."""
    context, blocks = study.corpus.context_tokens, shape.num_blocks - config["layer"] - 1
    saes = _count(parents, "dense-") + _count(parents, "pruned-")
    ablations = 2 * saes * ABLATION_GROUPS * config["group_size"]
    tokens = round(ABLATED_SHARE * config["prompts"] * context) * ablations
    return Work(
        forward_flops(shape, tokens, context_tokens=context, blocks=blocks, head=False), tokens
    )


def _evidence(
    _config: Mapping[str, Any], parents: Mapping[str, Any], shape: ModelShape, study: StudyConfig
) -> Work:
    """Every SAE reads the eval split; each of its directions is held against the vocabulary."""
    d_model, num_latents, k = sae_size(shape, study)
    tokens = study.corpus.eval_tokens * (1 + ("dense" in parents))
    effects = 2.0 * num_latents * d_model * shape.vocabulary_size
    return Work(encoding_flops(d_model, num_latents, k, tokens) + effects)


def _count(parents: Mapping[str, Any], prefix: str) -> int:
    return sum(role.startswith(prefix) for role in parents)


_Count = Callable[[Mapping[str, Any], Mapping[str, Any], ModelShape, StudyConfig], Work]
_COUNTS: dict[str, _Count] = {
    "calibration": _calibration,
    "prune": _prune,
    "perplexity": _perplexity,
    "activations": _activations,
    "sae": _sae,
    "common_change": _common_change,
    "persistence": _persistence,
    "scaling": _scaling,
    "activation_matching": _activation_matching,
    "stability": _stability,
    "survival": _survival,
    "subspace": _subspace,
    "sufficiency": _sufficiency,
    "transfer": _transfer,
    "causal": _causal,
    "evidence": _evidence,
}
