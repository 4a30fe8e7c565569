"""Checks of a study against its models' configs and its own plan: no weights, no text, no hub."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prunelens.checkpoint import ModelShape, text_config
from prunelens.config import ModelConfig, PruningConfig, StudyConfig
from prunelens.study.cost import sae_size
from prunelens.study.matrix import Plan
from prunelens.study.preflight.finding import Finding
from prunelens.study.preflight.model_checks import model_checks

DENSE_CODE = 0.5  # k of a TopK SAE, as a share of d_model, from which a code is hardly sparse
LEAST_TOKENS = 20  # distinct training tokens per latent
LEAST_FIRINGS = 100  # times that an average latent fires in training
LAST_RESTART = 0.75  # share of a training after which no dead latent is restarted
LARGEST_FLOAT16 = 65_504


def study_checks(plan: Plan, shapes: Mapping[str, ModelShape]) -> Iterator[Finding]:
    """What can be said of a study from configs alone.

    Args:
        plan: the study's.
        shapes: model label -> shape.
    Raises: UserError as `text_config`.
    """
    study = plan.study
    for model in study.models:
        shape = shapes[model.label]
        if not model.is_planted:
            config = text_config(model)
            for check in _MODEL_CHECKS:
                yield check(study, model, config)
            yield from model_checks(study, model)
            yield from _pruned_at_all(study, model, shape)
        yield from _sae_sizes(study, model, shape)
    yield from _duplicates(plan)
    if "probes" in study.questions and study.concepts is None:
        what = "no concept is probed: nothing labels the text"
        fix = "name in probes.concepts the field of its rows that has labels, or 'python'"
        yield Finding("ok", "probes", what, fix)


# --- one model ----------------------------------------------------------------------------------


def _soft_capping(_study: StudyConfig, model: ModelConfig, config: Any) -> Finding:
    """Flash and memory-efficient attention leave the cap out, in some versions without a word."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap:
        what = f"{model.label} caps attention scores at {cap}: it runs with eager attention"
    else:
        what = f"{model.label} caps no attention scores"
    return Finding("ok", "soft-capping", what)


def _tied_weights(_study: StudyConfig, model: ModelConfig, config: Any) -> Finding:
    tied = bool(getattr(config, "tie_word_embeddings", False))
    what = "embedding and output head are one matrix, which is" if tied else (
        "embedding and output head are two matrices, which are"
    )  # fmt: skip
    return Finding("ok", "tied weights", f"{model.label}: {what} not pruned")


def _dtype(study: StudyConfig, model: ModelConfig, config: Any) -> Finding:
    """float16 has fewer exponents than what most models were made in."""
    made_in = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    is_gemma = str(config.model_type).startswith("gemma")
    wide = is_gemma or made_in == "bfloat16"
    made = "bfloat16" if wide else made_in or "a dtype that its config does not name"
    if wide and model.dtype == "float16":
        return Finding(
            "warning",
            "dtype",
            f"models.dtype: 'float16' ends at {LARGEST_FLOAT16:,}, and {model.label} was made in"
            " bfloat16, whose activations may be larger and would become infinite",
            "use bfloat16 or float32",
        )
    if wide and study.activations.storage == "float16":
        return Finding(
            "warning",
            "dtype",
            f"activations.storage: 'float16' ends at {LARGEST_FLOAT16:,}, and {model.label} was"
            " made in bfloat16, whose activations may be larger",
            "use bfloat16 or float32",
        )
    if made == "bfloat16" and model.dtype == "float32":
        what = f"{model.label} was made in bfloat16 and runs in float32: exact, in twice the memory"
        return Finding("ok", "dtype", what)
    return Finding("ok", "dtype", f"{model.label} was made in {made} and runs in {model.dtype}")


_MODEL_CHECKS: tuple[Callable[[StudyConfig, ModelConfig, Any], Finding], ...] = (
    _soft_capping,
    _tied_weights,
    _dtype,
)


def _pruned_at_all(study: StudyConfig, model: ModelConfig, shape: ModelShape) -> Iterator[Finding]:
    """A share so small that it rounds down to no weight."""
    for condition in study.conditions():
        if not isinstance(condition, PruningConfig):
            continue
        most = {"global": shape.linear_weights, "row": shape.widest_input}.get(condition.scope)
        if most is not None and math.floor(condition.fraction * most) == 0:
            yield Finding(
                "error",
                "duplicates",
                f"prunings.sparsities: {condition.sparsity} of scope {condition.scope!r} is no"
                f" weight of {model.label}, so {condition.label} is the dense model once more",
                "raise it or remove it",
            )


# --- SAEs ---------------------------------------------------------------------------------------


def _sae_sizes(study: StudyConfig, model: ModelConfig, shape: ModelShape) -> Iterator[Finding]:
    d_model, latents, k = sae_size(shape, study)
    found = list(_doubtful_sizes(study, d_model, latents, k))
    for what, fix in found:
        yield Finding("warning", "SAE sizes", f"{what} ({model.label})", fix)
    if not found:
        what = f"{model.label}: {latents:,} latents of width {d_model:,}, {k} at a time"
        yield Finding("ok", "SAE sizes", what)


def _doubtful_sizes(
    study: StudyConfig, d_model: int, latents: int, k: int
) -> Iterator[tuple[str, str]]:
    """What is doubtful, and the fix."""
    sae, tokens = study.sae, study.corpus.train_tokens
    if k >= DENSE_CODE * d_model:
        yield (
            f"sae.k: {k} is {k / d_model:.0%} of d_model {d_model}: so many directions rebuild"
            " nearly everything, whatever they mean",
            f"make k at most {max(1, math.floor(DENSE_CODE * d_model) - 1)}",
        )
    if latents > tokens:
        yield (
            f"sae.expansion: {sae.expansion} makes {latents:,} latents, more than the {tokens:,}"
            " corpus.train_tokens",
            "give more text or a smaller expansion",
        )
    elif tokens < LEAST_TOKENS * latents:
        yield (
            f"corpus.train_tokens: {tokens:,} is {tokens / latents:.1f} tokens for each of"
            f" {latents:,} latents",
            f"give at least {LEAST_TOKENS * latents:,}, or a smaller sae.expansion",
        )
    firings = sae.steps * sae.batch_tokens * k / latents
    if firings < LEAST_FIRINGS:
        yield (
            f"sae.steps: in {sae.steps:,} steps an average latent fires {firings:.0f} times",
            f"train {math.ceil(sae.steps * LEAST_FIRINGS / firings):,} steps or more",
        )
    if sae.resample_interval > LAST_RESTART * sae.steps:
        yield (
            f"sae.resample_every: {sae.resample_interval:,} of {sae.steps:,} steps: dead latents"
            " are never restarted, for the last quarter of a training has no restarts",
            f"make it at most {max(1, math.floor(LAST_RESTART * sae.steps)):,}",
        )


# --- the same work twice ------------------------------------------------------------------------


def _duplicates(plan: Plan) -> Iterator[Finding]:
    """Runs that read the same activations; a checkpoint that is the dense model."""
    seen: dict[frozenset[str], str] = {}
    count = 0
    for run in plan.runs:
        read = frozenset(stage.identity for stage in run.temporary())
        if read and read in seen:
            count += 1
            field = "prunings" if run.pruning else "models"
            yield Finding(
                "error",
                "duplicates",
                f"{field}: {run.name} and {seen[read]} are the same weights"
                " at the same layer, and would count twice in every table",
                "remove one",
            )
        seen.setdefault(read, run.name)
    dense = list(_dense_checkpoints(plan))
    yield from dense
    if not count and not dense:
        yield Finding("ok", "duplicates", f"{len(plan.runs)} runs, all different")


def _dense_checkpoints(plan: Plan) -> Iterable[Finding]:
    """No error: a checkpoint that changes nothing is a control that some will want."""
    labels = {
        run.pruning.label
        for run in plan.runs
        if run.pruning is not None
        and "prune" in run.stages
        and "checkpoint" in (config := run.stages["prune"].config)
        and config["checkpoint"] == config["weights"]
    }
    for label in sorted(labels):
        yield Finding(
            "warning",
            "duplicates",
            f"prunings.checkpoint: {label} is the dense model itself",
            "keep it only as a control",
        )
