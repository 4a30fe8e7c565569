"""Ready-made token ids in the place of text."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import torch
from jaxtyping import Int32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.text.reader import Document, Reader, files_digest, matching_files

_TOKEN_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
)


_FILES = (".safetensors",)


def _token_rows(config: CorpusConfig) -> Int32[Tensor, "windows context_tokens"]:
    """The tensor `tokens` of every file of a `tokens` corpus, one below the other.

    Raises: UserError where a file is no safetensors file or its tensor is not of that shape.
    """
    return torch.cat([_read_tokens(path, config) for path in matching_files(config, _FILES)])


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


def _no_text(config: CorpusConfig, most: int) -> Iterator[Document]:
    raise UserError("corpus.source: 'tokens' holds token ids, no text; use stdlib, files or hub")


TOKENS = Reader(
    "tokens",
    "ready-made token ids",
    _no_text,
    lambda config: files_digest(matching_files(config, _FILES)),
    needs="paths",
    rows=_token_rows,
)
