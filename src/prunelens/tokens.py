"""Documents as token ids, without special tokens; what opens every window."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.panics import TOKENIZER_FIX, panics_told
from prunelens.text import reader_of

Tokenizer = Any
"""A transformers PreTrainedTokenizerBase; named loosely, because importing transformers is slow."""
PIECE = 2_000_000  # characters that are tokenised in one go, in some 200 bytes of memory each
_AROUND, _PLACES = 64, 1000  # characters to either side of a cut; places that are tried
_SPACE = re.compile(r"\S \S")

Encode = Callable[[list[Any]], list[Tensor]]


def encoder(config: CorpusConfig, tokenizer: Tokenizer | None, bos_token: int | None) -> Encode:
    """What turns documents, or rows of token ids, into pieces of a stream."""
    return _rows_without(bos_token) if reader_of(config).rows else _encoder(tokenizer, bos_token)


def token_rows(config: CorpusConfig) -> Int32[Tensor, "windows context_tokens"]:
    """The token ids of a source that holds those, e.g. `tokens`.

    Raises: UserError where a file is no safetensors file or its tensor is not of that shape.
    """
    rows = reader_of(config).rows
    assert rows
    return rows(config)


def bos_of(config: CorpusConfig, tokenizer: Tokenizer | None) -> int | None:
    """What opens every window; None: nothing does."""
    if reader_of(config).rows:
        return _bos_of_rows(config)
    if tokenizer is None:
        raise UserError(
            f"corpus.source: {config.source!r} is text, and the model has no tokenizer;"
            " add one to the model's folder, or use source 'tokens'"
        )
    if config.bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("corpus.bos: 'always', but the tokenizer has no BOS; use 'auto' or 'never'")
    return None if config.bos == "never" else tokenizer.bos_token_id


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
        short = iter(tokenised([text for text in texts if len(text) <= PIECE]))
        return [
            next(short)
            if len(text) <= PIECE
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
    while len(text) - first > PIECE:
        last = first + PIECE
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


def _rows_without(bos_token: int | None) -> Callable[[Iterable[Tensor]], list[Tensor]]:
    """Rows as stream pieces: the BOS column is dropped where there is one."""
    return lambda rows: [row if bos_token is None else row[1:] for row in rows]
