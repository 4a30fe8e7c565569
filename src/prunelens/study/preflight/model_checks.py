"""Do a study's models allow what it asks of them: to prune them, and to read their sites?

Asked of the model that the config describes, without weights, by the code that would refuse it once
the dense model is done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from prunelens.config import ModelConfig, PruningConfig, StudyConfig
from prunelens.errors import UserError
from prunelens.model import LanguageModel, described_model, logits, run_to_sites, site_module
from prunelens.prune.apply import check_prunable
from prunelens.prune.calibrate import check_replayable
from prunelens.prune.compare import quantisation_of
from prunelens.prune.matrices import linear_matrices
from prunelens.study.preflight.finding import Finding
from prunelens.upper_blocks import UpperBlocks

CONTEXT = 32  # tokens that a model is run on
SAME = 1e-2  # of the logits' deviation: more than rounding, less than any attention to the future


def model_checks(study: StudyConfig, model: ModelConfig) -> Iterator[Finding]:
    """The blocks, the sites and the matrices of one model, from its architecture alone."""
    try:
        lm = described_model(model)
        for layer in model.layers:
            site_module(lm, model.site, layer)
        for condition in study.conditions():
            if isinstance(condition, PruningConfig):
                if method := quantisation_of(lm):
                    raise UserError(
                        f"pruning: {lm.label} is quantised ({method}); prune the float checkpoint"
                        " instead"
                    )
                check_prunable(lm, condition)
            else:  # it is compared with the model, matrix by matrix
                linear_matrices(lm)
    except UserError as error:
        yield _refused(error)
    else:
        what = f"{model.label}: {len(lm.blocks)} blocks with {model.site} and what is pruned"
        yield Finding("ok", "architecture", what)


def site_checks(model: ModelConfig) -> Iterator[Finding]:
    """Whether each site gives one vector per token, as far as shapes alone can be run.

    Where they cannot (a model that looks at its numbers to decide what it does) nothing is said;
    the first activations will tell.
    """
    # Two windows of three tokens: what swaps or joins the two is seen.
    tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _unlogged():
            run_to_sites(
                described_model(model), tokens, [(model.site, layer) for layer in model.layers]
            )
    except UserError as error:
        if error.__cause__ is None:  # else it is the forward pass that failed
            yield _refused(error)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Of an operation without shapes torch logs a traceback, besides raising what it was."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def running_checks(study: StudyConfig, model: ModelConfig, lm: LanguageModel) -> Iterator[Finding]:
    """What only a model with weights can tell, from a few tokens.

    Does a token see none that follow it; can blocks be run one by one, where a pruning does so; can
    ablations go on from a block, where they are asked for?
    Raises: UserError where the model cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    context = min(study.corpus.context_tokens, CONTEXT)
    tokens = torch.randint(lm.vocabulary_size, (1, context), generator=generator)
    yield _looks_back_only(lm, tokens)
    conditions = [c for c in study.conditions() if isinstance(c, PruningConfig)]
    try:
        if any(condition.calibration == "sequential" for condition in conditions):
            check_replayable(lm, tokens)
        if conditions and "causal" in study.questions:
            for layer in model.layers:
                UpperBlocks(lm, tokens, site=model.site, layer=layer)
    except UserError as error:
        yield _refused(error)


def _looks_back_only(lm: LanguageModel, tokens: Int[Tensor, "1 context"]) -> Finding:
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % lm.vocabulary_size
    before, after = (logits(lm, text)[:, :-1].float() for text in (tokens, other))
    if float((before - after).abs().max()) <= SAME * float(before.std()):
        return Finding("ok", "architecture", f"{lm.label}: a token sees none that follow it")
    return Finding(
        "error",
        "architecture",
        f"models.name: in {lm.label} ({type(lm.model).__name__}) tokens see those that follow them",
        "use a causal language model (of BERT and its kin one with is_decoder: true)",
    )


def _refused(error: UserError) -> Finding:
    what, _, fix = str(error).rpartition("; ")
    return Finding("error", "architecture", what, fix)
