"""What a source of text is, told once (methods §1), and what readers share."""

from __future__ import annotations

import glob
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prunelens.config import CorpusConfig
from prunelens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Document(NamedTuple):
    """A piece of text that no two splits share."""

    name: str
    """Where it comes from: a module, a file and a number, a row."""
    text: str
    """The text as it stands there."""


@dataclass(frozen=True)
class Reader:
    """How a source is read. All of it raises UserError where the source is missing or broken."""

    name: str
    """As `corpus.source` has it."""
    means: str
    """In words, for a model card."""
    documents: Callable[[CorpusConfig, int], Iterator[Document]]
    """The documents in their own order, blank ones too, of each at most so many characters."""
    fingerprint: Callable[[CorpusConfig], str]
    """What stands for the text in identities: its content or a commit, never where it lies."""
    needs: str = ""
    """The field of `corpus` that says where the text is, if any does."""
    halves: Callable[[], tuple[list[Document], list[Document]]] | None = None
    """The documents to train on and those to measure on, where the text has such; None: the content
    of each decides."""
    fields: Callable[[CorpusConfig, str], Iterator[tuple[str, str, Any]]] | None = None
    """Of every row where it is, its text, and what another field holds, where it has rows."""
    rows: Callable[[CorpusConfig], Tensor] | None = None
    """Token ids [windows, context_tokens], where it holds those and no documents."""


def matching_files(config: CorpusConfig, known: Sequence[str]) -> list[pathlib.Path]:
    """The files that `paths` names, each once, a glob's in sorted order.

    Args:
        config: of a source that has paths.
        known: how their names may end, in any case.
    Raises: UserError for a missing file, a folder, an empty glob or an unknown extension.
    """
    found: dict[pathlib.Path, None] = {}
    for given in config.paths:
        pattern = str(pathlib.Path(given).expanduser())
        is_glob = glob.has_magic(pattern) and not pathlib.Path(pattern).exists()
        names = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]  # noqa: PTH207
        paths = [p for p in map(pathlib.Path, names) if p.is_file() or not is_glob]
        if not paths:
            raise UserError(f"corpus.paths: {given!r} matches no file; check the pattern")
        for path in paths:
            if path.is_dir():
                raise UserError(
                    f"corpus.paths: {given!r} is a folder; name files, e.g. '{given}/*.txt'"
                )
            if not path.is_file():
                raise UserError(f"corpus.paths: {given!r} does not exist; check the path")
            if not path.name.lower().endswith(tuple(known)):
                raise UserError(
                    f"corpus.paths: {path.name!r} ends in {path.suffix!r}; source"
                    f" {config.source!r} reads {', '.join(known)}"
                )
            found[path] = None
    return list(found)


def digest(parts: Iterable[tuple[bytes, bytes]]) -> str:
    """SHA-256 over pairs, each length first, so that no two lists run into each other."""
    digest = hashlib.sha256()
    for pair in parts:
        for part in pair:
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def files_digest(paths: Iterable[pathlib.Path]) -> str:
    """Names and contents count; the folders they lie in do not."""
    return digest((path.name.encode(), _file_digest(path)) for path in paths)


def _file_digest(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
