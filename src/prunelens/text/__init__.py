"""Where text comes from: the standard library, local files, the hub (methods §1).

`documents` reads a corpus document by document; a new source is one `Reader` in a file of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from prunelens.config import SOURCES, CorpusConfig
from prunelens.errors import UserError
from prunelens.text.data_sets import HUB
from prunelens.text.files import FILES
from prunelens.text.reader import Document, Reader
from prunelens.text.stdlib import STDLIB, stdlib_documents, stdlib_held_out
from prunelens.text.token_ids import TOKENS

__all__ = [
    "READERS",
    "Document",
    "Reader",
    "documents",
    "every_document",
    "fingerprint",
    "labelled_rows",
    "named",
    "reader_of",
    "register",
    "stdlib_documents",
    "stdlib_held_out",
]

READERS = {reader.name: reader for reader in (STDLIB, FILES, TOKENS, HUB)}


def register(reader: Reader) -> None:
    """Let `corpus.source` name one more source of text.

    For what lives outside this package, from Python: in a script that runs the study itself. The
    command line and workers in other processes know nothing of it.
    Raises: UserError where the name is taken.
    """
    if reader.name in READERS:
        raise UserError(f"source: {reader.name!r} is there already; name it otherwise")
    READERS[reader.name] = reader
    SOURCES[reader.name] = reader.needs


def reader_of(config: CorpusConfig) -> Reader:
    """How a corpus is read."""
    return READERS[config.source]


def documents(config: CorpusConfig, *, most: int = sys.maxsize) -> Iterator[Document]:
    """The documents of a corpus in its own order, blank ones left out.

    Args:
        config: where they are.
        most: characters of each, from its start; what goes beyond is not kept in memory.
    Raises: UserError where a source is missing, unreadable or empty, or is no text (`tokens`).
    """
    found = False
    for document in every_document(config, most=most):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise UserError(f"{named(config)} holds no text; give a source that does")


def every_document(config: CorpusConfig, *, most: int = sys.maxsize) -> Iterator[Document]:
    """As `documents`, blank ones included (WikiText-2's convention joins those too)."""
    return reader_of(config).documents(config, most)


def labelled_rows(config: CorpusConfig, field: str) -> Iterator[tuple[str, str, Any]]:
    """Of every row of a corpus where it is, its text, and what a field holds.

    Raises: UserError where the corpus has no rows, or a row no such field.
    """
    read = reader_of(config).fields
    if read is None:
        raise UserError(
            f"probes.concepts: corpus.source {config.source!r} has no rows with a field {field!r};"
            " use 'python', or give a probes.corpus of files"
        )
    return read(config, field)


def fingerprint(config: CorpusConfig) -> str:
    """What stands for the text in artifact identities: a content hash, or the hub's commit.

    Names, order and contents count; the folders they lie in do not.
    Raises: UserError where the source is missing or out of reach.
    """
    return reader_of(config).fingerprint(config)


def named(config: CorpusConfig) -> str:
    """The field that says where the text is, with its value, to open an error with."""
    field = reader_of(config).needs or "source"
    value = getattr(config, field)
    return f"corpus.{field}: {list(value) if isinstance(value, tuple) else value!r}"
