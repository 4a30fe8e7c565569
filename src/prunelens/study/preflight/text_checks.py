"""Does the text suit the model: its BOS, its length, and whether the model can read it at all.

These load tokenizers, and the last check a model; both only where they are on this machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from prunelens.checkpoint import is_here, is_local, load_tokenizer, longest_context, text_config
from prunelens.concepts import labelled_documents, refuse_without_places
from prunelens.config import CorpusConfig, ModelConfig, StudyConfig
from prunelens.corpus import check_ids, check_splits, joined_stream, split_tokens
from prunelens.model import LanguageModel, load_model
from prunelens.panics import TOKENIZER_FIX, panics_told
from prunelens.perplexity import check_windows, measure_perplexity
from prunelens.study.preflight.finding import Finding
from prunelens.study.preflight.model_checks import running_checks
from prunelens.text import documents, reader_of
from prunelens.tokens import Tokenizer, token_rows

PROBE = "The quick brown fox"
DOCUMENTS_LOOKED_AT, LOOKED_AT = 100, 1000  # of each document so many characters
EVAL_TOKENS, TRAIN_TOKENS = 4096, 200_000  # of the sanity check, at most


def text_checks(
    study: StudyConfig, *, hub_answers: bool, device: str, load: bool
) -> Iterator[Finding]:
    """BOS, length of the text, how the dense model runs, and its perplexity.

    What is skipped is named.

    Args:
        study: whose models and text are looked at.
        hub_answers: whether text on the hub can be read.
        device: where a model is put.
        load: whether models may be loaded.
    Raises: UserError where a tokenizer, a model or the text cannot be read; of text on this machine
        also where the study would refuse it, as too short for example.
    """
    for model in study.models:
        if model.is_planted:
            continue
        if not is_here(model):
            for check in ("BOS", "perplexity"):
                yield Finding("ok", check, f"skipped: {model.label} is not on this machine")
            yield from text_check(study, model)
            continue
        with panics_told(
            f"models.name: the tokenizer of {model.label!r} cannot read the text", TOKENIZER_FIX
        ):
            bos = list(bos_checks(study, model))
        yield from bos
        if any(found.level == "error" for found in bos):
            for check in ("text", "perplexity"):
                yield Finding("ok", check, f"skipped: first mend the BOS of {model.label}")
            continue
        yield from text_check(study, model)
        if not load:
            what = f"skipped: {model.label} is not loaded without calibration"
            yield Finding("ok", "perplexity", what)
        elif not (text_is_here(study.corpus) or hub_answers):
            yield Finding("ok", "perplexity", "skipped: the text is on the hub, out of reach")
        else:
            lm = load_model(model, device=device)
            yield from running_checks(study, model, lm)
            yield perplexity_check(study, model, lm)


def text_is_here(corpus: CorpusConfig) -> bool:
    """Whether a text can be read without the hub."""
    return corpus.source != "hub" or is_local(corpus.dataset or "")


# --- BOS ----------------------------------------------------------------------------------------


def bos_checks(study: StudyConfig, model: ModelConfig) -> Iterator[Finding]:
    """Whether windows open with one BOS: not none where the study wants one, and not two.

    Raises: UserError where a tokenizer or the text cannot be read.
    """
    corpus = study.corpus
    if reader_of(corpus).rows:
        yield _bos_of_rows(corpus)
        return
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        yield Finding(
            "error",
            "BOS",
            f"corpus.source: {corpus.source!r} is text, and {model.label} has no tokenizer",
            "add one to the model's folder, or use source 'tokens'",
        )
        return
    yield _bos_of_tokenizer(corpus, model, tokenizer)
    yield _double_bos(corpus, model, tokenizer)
    if text_is_here(study.corpus) and tokenizer.bos_token:
        yield _bos_in_text(corpus, tokenizer)


def _bos_of_tokenizer(corpus: CorpusConfig, model: ModelConfig, tokenizer: Tokenizer) -> Finding:
    bos = tokenizer.bos_token_id
    if bos is None and corpus.bos == "always":
        return Finding(
            "error",
            "BOS",
            f"corpus.bos: 'always', but the tokenizer of {model.label} has no BOS",
            "use 'auto' or 'never'",
        )
    if bos is None:
        return Finding("ok", "BOS", f"{model.label} has no BOS: windows open with text")
    if corpus.bos == "never" and _adds_its_own(tokenizer):
        return Finding(
            "warning",
            "BOS",
            f"corpus.bos: 'never', but {model.label} puts {tokenizer.bos_token!r} before every"
            " text, and such models are often far worse without it",
            "use 'auto', unless that is what you study",
        )
    opens = "text" if corpus.bos == "never" else repr(tokenizer.bos_token)
    return Finding("ok", "BOS", f"windows of {model.label} open with {opens}")


def _adds_its_own(tokenizer: Tokenizer) -> bool:
    return tokenizer(PROBE)["input_ids"][:1] == [tokenizer.bos_token_id]


def _double_bos(corpus: CorpusConfig, model: ModelConfig, tokenizer: Tokenizer) -> Finding:
    """prunelens asks for no special tokens; some tokenizers add their BOS all the same."""
    bos = tokenizer.bos_token_id
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if bos is None or bos not in plain:
        adds = bos is not None and _adds_its_own(tokenizer)
        why = "its tokenizer adds one, which is turned off" if adds else "its tokenizer adds none"
        return Finding("ok", "double BOS", f"{model.label}: {why}")
    if corpus.bos == "never":
        return Finding(
            "error",
            "double BOS",
            f"corpus.bos: 'never', but the tokenizer of {model.label} puts a BOS before every"
            " document all the same",
            "use 'auto', which keeps one for each window, or mend the tokenizer",
        )
    return Finding(
        "warning",
        "double BOS",
        f"the tokenizer of {model.label} puts a BOS before every document even where none is asked"
        " for; all but the one that opens a window are dropped",
        "mend the tokenizer",
    )


def _bos_in_text(corpus: CorpusConfig, tokenizer: Tokenizer) -> Finding:
    some = itertools.islice(documents(corpus, most=LOOKED_AT), DOCUMENTS_LOOKED_AT)
    count = sum(document.text.startswith(tokenizer.bos_token) for document in some)
    if not count:
        return Finding("ok", "double BOS", "no document spells out a BOS at its start")
    kept = corpus.bos == "never"
    what = "stay in the middle of windows" if kept else "are dropped"
    return Finding(
        "warning",
        "double BOS",
        f"{count} of the first {DOCUMENTS_LOOKED_AT} documents open with"
        f" {tokenizer.bos_token!r}; these {what}",
        "take it out of the text",
    )


def _bos_of_rows(corpus: CorpusConfig) -> Finding:
    rows = token_rows(corpus)
    first = rows[0, 0]
    if bool((rows[:, 0] == first).all()) and bool((rows[:, 1] == first).all()):
        return Finding(
            "warning",
            "double BOS",
            f"corpus.paths: every window opens with the token {int(first)} twice",
            "write windows with one BOS",
        )
    return Finding("ok", "double BOS", "ready-made windows do not open with two BOS")


# --- is there enough? ---------------------------------------------------------------------------


def text_check(study: StudyConfig, model: ModelConfig) -> Iterator[Finding]:
    """Whether the study's stages that read text could do so; it is read as far as they would.

    Raises: UserError as those stages.
    """
    texts = (
        ("corpus", study.corpus, _check_corpus),
        ("perplexity.corpus", study.perplexity.corpus, _check_text),
        ("probes.concepts", study.labelled_text, _check_labels),
    )
    for field, corpus, check in texts:
        if corpus is None:
            continue
        has_ids = reader_of(corpus).rows is not None
        if not text_is_here(corpus):
            yield Finding("ok", "text", f"skipped: {field} is on the hub")
        elif not has_ids and not is_here(model):
            yield Finding("ok", "text", f"skipped: {model.label} is not on this machine")
        else:
            check(study, model, None if has_ids else load_tokenizer(model))
            yield Finding("ok", "text", f"{field} is enough for {model.label}")


def _check_corpus(study: StudyConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    seen = check_splits(study.corpus, tokenizer)
    check_ids(seen.highest_id, text_config(model).vocab_size, model.label)
    if study.perplexity.corpus is None:  # it is measured on eval
        _check_lengths(study, model, seen.eval_tokens, seen.bos_token)


def _check_text(study: StudyConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    assert study.perplexity.corpus
    stream, bos_token = joined_stream(study.perplexity.corpus, tokenizer)
    check_ids(stream, text_config(model).vocab_size, model.label)
    _check_lengths(study, model, len(stream), bos_token)


def _check_labels(study: StudyConfig, _model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """The first document's, for all are read by `run` alone."""
    assert study.labelled_text and study.concepts
    refuse_without_places(tokenizer)
    for document in itertools.islice(labelled_documents(study.labelled_text, study.concepts), 1):
        document.spans()


def _check_lengths(
    study: StudyConfig, model: ModelConfig, num_tokens: int, bos_token: int | None
) -> None:
    longest = longest_context(text_config(model))
    for context in study.perplexity.context_tokens:
        context = min(context, longest or context)
        num_windows = num_tokens // (context - (bos_token is not None))
        check_windows(
            num_windows, num_tokens, context_tokens=context, max_tokens=study.perplexity.max_tokens
        )


# --- can the model read the text? ---------------------------------------------------------------


def perplexity_check(study: StudyConfig, model: ModelConfig, lm: LanguageModel) -> Finding:
    """The dense model's perplexity on a little eval text, against a unigram model's.

    The unigram model has the token counts of the train split, one added to each of the vocabulary.
    A model that is worse has another tokenizer's ids or broken weights. Of ready-made token ids
    nobody knows whether they are language, so there it is no more than a warning.

    Raises: UserError as `split_tokens`, `logits` and `check_ids`.
    """
    corpus = _a_little(study.corpus)
    splits = split_tokens(corpus, lm.tokenizer, only=("train", "eval_first"))
    result = measure_perplexity(
        lm,
        splits.eval_first,
        context_tokens=corpus.context_tokens,
        bos_token=splits.bos_token,
    )
    check_ids(splits.train, lm.vocabulary_size, model.label)
    nll = unigram_nll(splits.train, splits.eval_first, lm.vocabulary_size)
    told = (
        f"{model.label} has perplexity {result.perplexity:,.4g} on {result.num_tokens:,} tokens,"
        f" a unigram model of the text {math.exp(nll):,.4g}"
    )
    if result.nll < nll:
        return Finding("ok", "perplexity", told)
    given = reader_of(study.corpus).rows is not None
    return Finding(
        "warning" if given else "error",
        "perplexity",
        f"models.name: {told}",  # NaN comes here too
        "check that the ids are of this model's tokenizer"
        if given
        else "check that tokenizer and weights belong together, and models.dtype",
    )


def unigram_nll(
    train: Int[Tensor, " train_tokens"], held_out: Int[Tensor, " tokens"], vocabulary_size: int
) -> float:
    """Mean -log p per token in nats, p = (count in `train` + 1) / (tokens + vocabulary)."""
    counts = torch.bincount(train.long(), minlength=vocabulary_size).double() + 1
    return float((counts.sum().log() - counts.log()[held_out.long()]).mean())


def _a_little(corpus: CorpusConfig) -> CorpusConfig:
    """The same text, but less of it, in whole windows."""
    context = corpus.context_tokens
    half = max(1, EVAL_TOKENS // context)
    return corpus.model_copy(
        update={
            "train_tokens": min(corpus.train_tokens, max(1, TRAIN_TOKENS // context) * context),
            "eval_tokens": min(corpus.eval_tokens, 2 * half * context),
            "calibration_tokens": context,
        }
    )
