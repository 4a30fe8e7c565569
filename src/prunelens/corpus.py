"""Text as token windows, split by document (methods §1).

`text` reads the documents and `tokens` makes ids of them; `split_tokens` puts each into train,
calibration or a half of eval, which never share one; `windows` cuts a stream of tokens into what a
model sees.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from prunelens import tokens
from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.spread import (
    DocumentStream,
    window_documents,
)
from prunelens.text import (
    documents,
    every_document,
    named,
    reader_of,
)
from prunelens.tokens import Tokenizer, bos_of, encoder, token_rows

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 500_000
_MOST_OF_TOKEN = 16  # characters: no text has so many on average
_LEAST_DOCUMENTS = 16  # that a measurement's text is of


class TokenSplits(NamedTuple):
    """Token ids of the splits, without any BOS, each trimmed to whole windows."""

    train: Int32[Tensor, " tokens"]
    """For training SAEs."""
    calibration: Int32[Tensor, " tokens"]
    """For the pruning criteria that need activations."""
    eval_first: Int32[Tensor, " tokens"]
    """One half of the documents for measurements."""
    eval_second: Int32[Tensor, " tokens"]
    """The other half; shares no document with the first."""
    train_starts: Int64[Tensor, " documents"]
    """Where in `train` each of its documents begins; of ready-made tokens a row is one."""
    calibration_starts: Int64[Tensor, " documents"]
    """The same of `calibration`."""
    eval_first_starts: Int64[Tensor, " documents"]
    """The same of `eval_first`."""
    eval_second_starts: Int64[Tensor, " documents"]
    """The same of `eval_second`."""
    bos_token: int | None
    """What opens every window; None: nothing does."""


def split_tokens(
    config: CorpusConfig,
    tokenizer: Tokenizer | None,
    *,
    only: Sequence[str] = ("train", "calibration", "eval_first", "eval_second"),
    even: Sequence[str] = ("calibration", "eval_first", "eval_second"),
    progress: Callable[[int], None] | None = None,
) -> TokenSplits:
    """Tokenise a corpus once and split it by document.

    A document's SHA-256 decides its split, in proportion to the tokens asked for; of `stdlib`,
    eval is the held-out modules and nothing else. Documents follow each other without a separator,
    and the reading ends when all splits are full. Where the windows carry a BOS, BOS ids inside
    the text are dropped, so that no window holds two.

    So that no document stands for all text, it gives the `even` splits at most a 16th of their
    tokens (but a window), in a row from a place that its content decides. Only where the text ends
    before a split is full do the long ones give more, each up to the least length that fills it.
    For that they stay in memory, some 16 documents of at most a split each. Of a document no
    more is read than 16 characters for each token of the largest split, but two million.

    Args:
        config: context_tokens, bos and the *_tokens fields (which count the windows' BOS).
        tokenizer: the model's; None is enough for `tokens`.
        only: the splits that are wanted, which share the text; the others stay empty.
        even: those in which no document may dominate; the others take each as it stands.
        progress: called with the number of tokens kept so far.
    Raises: UserError as `documents`; where a split asks for less than a window or for more than
        there is; where `bos: always` meets a tokenizer without BOS.
    """
    bos_token = bos_of(config, tokenizer)
    kept = _filled(config, tokenizer, bos_token, only, even, progress=progress)
    empty = DocumentStream(0, 0)
    joined = {s: kept.get(s, empty).joined() for s in TokenSplits._fields[:4]}
    streams = {split: stream for split, (stream, _) in joined.items()}
    starts = {f"{split}_starts": begin for split, (_, begin) in joined.items()}
    return TokenSplits(**streams, **starts, bos_token=bos_token)


class LookedAt(NamedTuple):
    """What `check_splits` has seen."""

    eval_tokens: int
    """That both halves of eval would hold, without BOS."""
    highest_id: Int32[Tensor, ""]
    """Of all tokens."""
    bos_token: int | None
    """What would open every window."""


def check_splits(config: CorpusConfig, tokenizer: Tokenizer | None) -> LookedAt:
    """Refuse the text that `split_tokens` would refuse. It reads as far, and keeps no token."""
    splits = TokenSplits._fields[:4]
    bos_token = bos_of(config, tokenizer)
    highest = torch.zeros((), dtype=torch.int32)

    def look(ids: Tensor) -> None:
        torch.maximum(highest, ids.max(), out=highest)

    filled = _filled(config, tokenizer, bos_token, splits, splits[1:], look=look)
    return LookedAt(sum(filled[half].quota for half in splits[2:]), highest, bos_token)


def check_ids(ids: Int[Tensor, "*shape"], vocabulary_size: int, model: str) -> None:
    """Raises UserError where a model, named by its label, has no such token."""
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= vocabulary_size:
        raise UserError(
            f"corpus: token id {highest} is outside the vocabulary of {model}"
            f" ({vocabulary_size} tokens); use text or ids made for this model"
        )


def split_documents(
    splits: TokenSplits, context_tokens: int, *names: str
) -> Int64[Tensor, " windows"]:
    """The document of each window of some splits, one after the other; no number is in two."""
    per_window = context_tokens - (splits.bos_token is not None)
    found, before = [], 0
    for name in names:
        starts = getattr(splits, f"{name}_starts")
        num_windows = len(getattr(splits, name)) // per_window
        found.append(before + window_documents(starts, num_windows, per_window))
        before += len(starts)
    return torch.cat(found)


def windows(
    stream: Int[Tensor, " tokens"], context_tokens: int, bos_token: int | None
) -> Int64[Tensor, "windows context_tokens"]:
    """Cut a stream into windows that open with the BOS; a partial last window is dropped.

    BOS ids inside the stream are dropped, so that there are never two in a row.
    """
    if bos_token is None:
        count = len(stream) // context_tokens
        return stream[: count * context_tokens].view(count, context_tokens).long()
    stream = stream[stream != bos_token].long()
    count = len(stream) // (context_tokens - 1)
    body = stream[: count * (context_tokens - 1)].view(count, context_tokens - 1)
    return torch.cat([body.new_full((count, 1), bos_token), body], dim=1)


def joined_stream(
    config: CorpusConfig, tokenizer: Tokenizer | None
) -> tuple[Int32[Tensor, " tokens"], int | None]:
    """A whole corpus as one text, documents joined with blank lines; and the BOS of its windows.

    This is the convention for WikiText-2 perplexity (methods §2): rows joined with "\\n\\n", empty
    ones included. Of `stdlib` only held-out modules are read. The text is held in memory.
    Raises: UserError as `split_tokens`.
    """
    bos_token = bos_of(config, tokenizer)
    texts = list(token_rows(config)) if reader_of(config).rows else [_joined_text(config)]
    return torch.cat(encoder(config, tokenizer, bos_token)(texts)), bos_token


def _joined_text(config: CorpusConfig) -> str:
    halves = reader_of(config).halves
    texts = [document.text for document in (halves()[1] if halves else every_document(config))]
    if not any(text.strip() for text in texts):
        raise UserError(f"{named(config)} holds no text; give a source that does")
    return "\n\n".join(texts)


# --- which split --------------------------------------------------------------------------------


def _filled(
    config: CorpusConfig,
    tokenizer: Tokenizer | None,
    bos_token: int | None,
    only: Sequence[str],
    even: Sequence[str],
    *,
    look: Callable[[Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, DocumentStream]:
    """The splits with their documents, or, where those are only looked at, with their numbers."""
    quotas = {s: count for s, count in _quotas(config, bos_token).items() if s in only}
    encode = encoder(config, tokenizer, bos_token)
    most = {
        s: max(quotas[s] // _LEAST_DOCUMENTS, config.context_tokens) for s in quotas if s in even
    }
    keep = look is None
    kept = {s: DocumentStream(quotas[s], most.get(s, quotas[s]), keep=keep) for s in quotas}
    num_documents = 0
    for batch in _batches(_assigned(config, quotas)):
        num_documents += len(batch)
        wanted = [(split, content) for split, content in batch if kept[split].missing]
        for (split, _), ids in zip(wanted, encode([c for _, c in wanted]), strict=True):
            kept[split].add(ids)
            if look and len(ids):
                look(ids)
        if progress:
            progress(sum(part.quota - part.missing for part in kept.values()))
        if not any(part.missing for part in kept.values()):
            break
    if lacking := {split: part.lacking for split, part in kept.items() if part.lacking}:
        raise UserError(_too_little(config, quotas, lacking, num_documents))
    return kept


def _assigned(config: CorpusConfig, quotas: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Every document's content with its split."""
    reader = reader_of(config)
    if reader.rows:
        for row in token_rows(config):
            yield _split_of(row.numpy().tobytes(), quotas), row
    elif reader.halves:
        trained, held_out = reader.halves()
        for part, names in (
            (trained, ("train", "calibration")),
            (held_out, ("eval_first", "eval_second")),
        ):
            own = {s: quotas[s] for s in names if s in quotas}
            for document in part if own else ():
                yield _split_of(document.text.encode(), own), document.text
    else:
        most = max(tokens.PIECE, _MOST_OF_TOKEN * max(quotas.values()))
        for document in documents(config, most=most):
            yield _split_of(document.text.encode(), quotas), document.text


def _split_of(content: bytes, quotas: dict[str, int]) -> str:
    """u = sha256 / 2^256 against the cumulative quotas, in exact integers."""
    u = int.from_bytes(hashlib.sha256(content).digest(), "big")
    total = sum(quotas.values())
    for split, bound in zip(quotas, itertools.accumulate(quotas.values()), strict=True):
        if u * total < bound << 256:
            return split
    raise AssertionError("u is below 1, so a split was found")


def _quotas(config: CorpusConfig, bos_token: int | None) -> dict[str, int]:
    """Tokens wanted per split, in whole windows, the BOS not counted."""
    width, eval_windows = config.context_tokens, config.eval_tokens // config.context_tokens
    for field, least in (("train_tokens", 1), ("calibration_tokens", 1), ("eval_tokens", 2)):
        if (value := getattr(config, field)) < least * width:
            raise UserError(
                f"corpus.{field}: {value} is less than {least} window{'s' * (least > 1)} of"
                f" {width} tokens; raise it to {least * width} or lower corpus.context_tokens"
            )
    counts = {
        "train": config.train_tokens // width,
        "calibration": config.calibration_tokens // width,
        "eval_first": eval_windows - eval_windows // 2,
        "eval_second": eval_windows // 2,
    }
    return {split: count * (width - (bos_token is not None)) for split, count in counts.items()}


def _too_little(
    config: CorpusConfig, quotas: dict[str, int], lacking: dict[str, int], num_documents: int
) -> str:
    """What lacks most, and how far to lower all three fields: the shares stay, so it fits.

    Of a few documents, which no two splits share, a split may get none however long they are.
    """
    worst = max(lacking, key=lambda split: lacking[split])
    field = "eval_tokens" if worst.startswith("eval") else f"{worst}_tokens"
    found = quotas[worst] - lacking[worst]
    scale = 0.97 * min(1 - lacking[split] / quotas[split] for split in lacking)
    fields = ("train_tokens", "eval_tokens", "calibration_tokens")
    windows_each = {f: int(getattr(config, f) * scale) // config.context_tokens for f in fields}
    fixes = ["give more text"]
    if all(windows_each.values()):
        lower = (f"{f} {n * config.context_tokens}" for f, n in windows_each.items())
        fixes.append(f"lower all three, e.g. {', '.join(lower)}")
    elif num_documents >= len(quotas):
        fixes.append(f"lower the largest of {', '.join(fields)}")
    why = ""
    if num_documents < _LEAST_DOCUMENTS * len(quotas) and not reader_of(config).rows:
        why = (
            f" (corpus.document: {config.document!r} makes {num_documents} of it, each in one split"
            " alone)"
        )
        fixes.insert(0, "set another document: or cut the text into more")
    return (
        f"corpus.{field}: {getattr(config, field)} is more than the text holds: {found} of"
        f" {quotas[worst]} tokens for {worst}{why}; {', or '.join(fixes)}"
    )


def _batches(assigned: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Documents in groups that are worth one call of the tokenizer and fit into memory."""
    batch: list[tuple[str, Any]] = []
    size = 0
    for item in assigned:
        batch.append(item)
        size += len(item[1])
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
