"""Text as token windows, split by document (methods §1).

`text` reads the documents; `split_tokens` tokenises it once into train, calibration and the two
halves of eval, which never share a document; `windows` cuts a stream of tokens into what a model
sees.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.panics import TOKENIZER_FIX, panics_told
from prunelens.spread import (
    DocumentStream,
    document_groups,
    spread_over_documents,
    window_documents,
)
from prunelens.text import (
    Document,
    documents,
    every_document,
    fingerprint,
    matching_files,
    named,
    stdlib_documents,
    stdlib_held_out,
)

__all__ = [
    "Document",
    "TokenSplits",
    "check_ids",
    "check_splits",
    "document_groups",
    "documents",
    "fingerprint",
    "joined_stream",
    "split_documents",
    "split_tokens",
    "spread_over_documents",
    "stdlib_documents",
    "stdlib_held_out",
    "token_rows",
    "window_documents",
    "windows",
]

_TOKEN_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
)
Tokenizer = Any
"""A transformers PreTrainedTokenizerBase; named loosely, because importing transformers is slow."""
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 500_000
_PIECE = 2_000_000  # characters that are tokenised in one go, in some 200 bytes of memory each
_AROUND, _PLACES = 64, 1000  # characters to either side of a cut; places that are tried
_MOST_OF_TOKEN = 16  # characters: no text has so many on average
_SPACE = re.compile(r"\S \S")
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
    bos_token = _bos_token(config, tokenizer)
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
    bos_token = _bos_token(config, tokenizer)
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
    bos_token = _bos_token(config, tokenizer)
    if config.source == "tokens":
        rows = token_rows(config)
        return torch.cat(_rows_without(bos_token)(rows)), bos_token
    return _encoder(tokenizer, bos_token)([_joined_text(config)])[0], bos_token


def _joined_text(config: CorpusConfig) -> str:
    if config.source == "stdlib":
        texts = [document.text for document in _stdlib_halves()[1]]
    else:
        texts = [document.text for document in every_document(config)]
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
    encode = (
        _rows_without(bos_token) if config.source == "tokens" else _encoder(tokenizer, bos_token)
    )
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
    if config.source == "tokens":
        for row in token_rows(config):
            yield _split_of(row.numpy().tobytes(), quotas), row
    elif config.source == "stdlib":
        trained, held_out = _stdlib_halves()
        for part, names in (
            (trained, ("train", "calibration")),
            (held_out, ("eval_first", "eval_second")),
        ):
            own = {s: quotas[s] for s in names if s in quotas}
            for document in part if own else ():
                yield _split_of(document.text.encode(), own), document.text
    else:
        most = max(_PIECE, _MOST_OF_TOKEN * max(quotas.values()))
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


def _stdlib_halves() -> tuple[list[Document], list[Document]]:
    """Modules that the bundled model was trained on, and held-out ones that copy none of those."""
    modules = stdlib_documents()
    trained = [document for document in modules if not stdlib_held_out(document.name)]
    seen = {document.text for document in trained}
    return trained, [d for d in modules if stdlib_held_out(d.name) and d.text not in seen]


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
    if num_documents < _LEAST_DOCUMENTS * len(quotas) and config.source != "tokens":
        why = (
            f" (corpus.document: {config.document!r} makes {num_documents} of it, each in one split"
            " alone)"
        )
        fixes.insert(0, "set another document: or cut the text into more")
    return (
        f"corpus.{field}: {getattr(config, field)} is more than the text holds: {found} of"
        f" {quotas[worst]} tokens for {worst}{why}; {', or '.join(fixes)}"
    )


# --- tokens -------------------------------------------------------------------------------------


def _bos_token(config: CorpusConfig, tokenizer: Tokenizer | None) -> int | None:
    if config.source == "tokens":
        return _bos_of_rows(config)
    if tokenizer is None:
        raise UserError(
            f"corpus.source: {config.source!r} is text, and the model has no tokenizer;"
            " add one to the model's folder, or use source 'tokens'"
        )
    if config.bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("corpus.bos: 'always', but the tokenizer has no BOS; use 'auto' or 'never'")
    return None if config.bos == "never" else tokenizer.bos_token_id


def _encoder(
    tokenizer: Tokenizer, bos_token: int | None
) -> Callable[[list[str]], list[Int32[Tensor, " tokens"]]]:
    """Texts to token ids, without special tokens and without BOS ids that the text spells out."""

    def tokenised(texts: list[str]) -> list[Tensor]:
        if not texts:
            return []
        name = getattr(tokenizer, "name_or_path", "")
        with panics_told(
            f"models.name: the tokenizer of {name!r} cannot read the text", TOKENIZER_FIX
        ):
            encoded = tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        streams = [torch.from_numpy(np.array(ids, dtype=np.int32)) for ids in encoded]
        return streams if bos_token is None else [ids[ids != bos_token] for ids in streams]

    def encode(texts: list[str]) -> list[Tensor]:
        short = iter(tokenised([text for text in texts if len(text) <= _PIECE]))
        return [
            next(short)
            if len(text) <= _PIECE
            else torch.cat([tokenised([piece])[0] for piece in _pieces(text, tokenised)])
            for text in texts
        ]

    return encode


def _pieces(text: str, tokenised: Callable[[list[str]], list[Tensor]]) -> Iterator[str]:
    """A long text in parts that have the tokens of the whole.

    It is cut where the text around has the same tokens in two parts; between words if it can be.
    A tokenizer that puts a space before every text gets the one at the cut from that. Where no
    place is found, the tokens at a cut may differ.
    """
    first = 0
    while len(text) - first > _PIECE:
        last = first + _PIECE
        places = ((place, place + gap) for place in _between_words(text, last) for gap in (0, 1))
        end, begin = next(
            (cut for cut in places if _is_seamless(text, *cut, tokenised)), (last, last)
        )
        yield text[first:end]
        first = begin
    yield text[first:]


def _between_words(text: str, last: int) -> list[int]:
    """Places to cut at, up to `last`: spaces between words before all others."""
    places = range(last, max(last - _PLACES, _AROUND), -1)
    return sorted(places, key=lambda n: not _SPACE.fullmatch(text, n - 1, n + 2))


def _is_seamless(
    text: str, end: int, begin: int, tokenised: Callable[[list[str]], list[Tensor]]
) -> bool:
    """Whether what lies around a cut has the same tokens with it and without."""
    if text[end:begin].strip(" "):
        return False
    left, right = slice(end - _AROUND, end), slice(begin, begin + _AROUND)
    whole, *parts = tokenised([text[left.start : right.stop], text[left], text[right]])
    return torch.equal(whole, torch.cat(parts))


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


# --- ready-made token ids -----------------------------------------------------------------------


def token_rows(config: CorpusConfig) -> Int32[Tensor, "windows context_tokens"]:
    """The tensor `tokens` of every file of a `tokens` corpus, one below the other.

    Raises: UserError where a file is no safetensors file or its tensor is not of that shape.
    """
    return torch.cat([_read_tokens(path, config) for path in matching_files(config)])


def _read_tokens(path: pathlib.Path, config: CorpusConfig) -> Tensor:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"corpus.paths: {path.name} is no safetensors file ({error}); write it again"
        ) from None
    if "tokens" not in tensors:
        raise UserError(
            f"corpus.paths: {path.name} has no tensor 'tokens' but {sorted(tensors)}; rename it"
        )
    tokens = tensors["tokens"]
    if tokens.ndim != 2 or tokens.dtype not in _TOKEN_DTYPES or tokens.numel() == 0:
        raise UserError(
            f"corpus.paths: 'tokens' of {path.name} is {tokens.dtype} {list(tokens.shape)};"
            " it must hold token ids as integers [windows, context_tokens]"
        )
    if tokens.shape[1] != config.context_tokens:
        raise UserError(
            f"corpus.context_tokens: {config.context_tokens}, but the windows of {path.name} are"
            f" {tokens.shape[1]} wide; set context_tokens to {tokens.shape[1]}"
        )
    if tokens.dtype in (torch.uint16, torch.uint32):  # torch finds no minimum of those
        tokens = tokens.long()
    largest = torch.iinfo(torch.int32).max
    if int(tokens.min()) < 0 or int(tokens.max()) > largest:
        raise UserError(
            f"corpus.paths: 'tokens' of {path.name} holds ids below 0 or above {largest}; write it"
            " again"
        )
    return tokens.int()


def _bos_of_rows(config: CorpusConfig) -> int | None:
    """The id that opens every row and stands nowhere else; ready-made windows get no other BOS."""
    if config.bos == "never":
        return None
    rows = token_rows(config)
    first = int(rows[0, 0])
    if bool((rows[:, 0] == first).all()) and not bool((rows[:, 1:] == first).any()):
        return first
    if config.bos == "always":
        raise UserError(
            "corpus.bos: 'always', but the rows of the tokens file do not open with one id that"
            " stands nowhere else; write them with their BOS, or use 'auto'"
        )
    return None


def _rows_without(bos_token: int | None) -> Callable[[Iterable[Tensor]], list[Tensor]]:
    """Rows as stream pieces: the BOS column is dropped where there is one."""
    return lambda rows: [row if bos_token is None else row[1:] for row in rows]
