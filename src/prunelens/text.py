"""Where text comes from: the standard library, local files, the hub (methods §1).

`documents` reads a corpus document by document; a new source is one reader in `_READERS`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prunelens import hub
from prunelens.config import CorpusConfig
from prunelens.errors import UserError

_NOT_TEXT = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_TEXT_FILES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")  # in any case
_MOST_IN_ROW = 2**28  # characters of a line of JSON, which is parsed as a whole
_FIELDS_TOLD = 20
_HEADING = re.compile(r" ?= [^=].* =\s*")  # WikiText's title of an article; sections have `= =`


class Document(NamedTuple):
    """A piece of text that no two splits share."""

    name: str
    """Where it comes from: a module, a file and a number, a row."""
    text: str
    """The text as it stands there."""


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
    return _READERS[config.source](config, most)


def labelled_rows(config: CorpusConfig, field: str) -> Iterator[tuple[str, str, Any]]:
    """Of every row of JSONL, Parquet or the hub where it is, its text, and what a field holds.

    Raises: UserError where the corpus has no rows, or a row no such field.
    """
    for where, row in _rows(config, field):
        text = _text_of(row, config.text_field, where)
        try:
            yield where, text, _value(row, field)
        except KeyError:
            raise UserError(
                f"probes.concepts: {where} has no field {field!r}; name the one with its labels"
            ) from None


def fingerprint(config: CorpusConfig) -> str:
    """What stands for the text in artifact identities: a content hash, or the hub's commit.

    Names, order and contents count; the folders they lie in do not.
    Raises: UserError where the source is missing or out of reach.
    """
    if config.source == "stdlib":
        return _digest((d.name.encode(), d.text.encode()) for d in stdlib_documents())
    if config.source == "hub":
        assert config.dataset is not None  # CorpusConfig sees to it
        folder = pathlib.Path(config.dataset)
        if not folder.is_dir():
            return hub.commit(
                config.dataset, field="corpus.dataset", kind="dataset", revision=config.revision
            )
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        paths = matching_files(config)
    return _digest((path.name.encode(), _file_digest(path)) for path in paths)


def stdlib_documents() -> list[Document]:
    """The modules of this interpreter's standard library, in path order.

    Tests, `encodings`, `pydoc_data` and installed packages are left out. The bundled language
    model was trained on this selection: changing it would leak held-out text.
    Raises: UserError where the interpreter has no library sources.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    out = []
    for path in _stdlib_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            out.append(Document(name, text))
    if not out:
        raise UserError(
            "corpus.source: 'stdlib' needs the standard library's .py files, and this interpreter"
            " has none; install them, or use source 'files'"
        )
    return out


def _stdlib_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Installed packages lie beside the library and are many more files: they are not walked."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_TEXT]
        found += [pathlib.Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found)


def stdlib_held_out(name: str) -> bool:
    """Whether the bundled model never saw this module: every tenth, by hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def matching_files(config: CorpusConfig) -> list[pathlib.Path]:
    """The files that `paths` names, each once, a glob's in sorted order.

    Raises: UserError for a missing file, a folder, an empty glob or an unknown extension.
    """
    known = _TEXT_FILES if config.source == "files" else (".safetensors",)
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
            if not path.name.lower().endswith(known):
                raise UserError(
                    f"corpus.paths: {path.name!r} ends in {path.suffix!r}; source"
                    f" {config.source!r} reads {', '.join(known)}"
                )
            found[path] = None
    return list(found)


def named(config: CorpusConfig) -> str:
    """The field that says where the text is, with its value, to open an error with."""
    if config.source == "stdlib":
        return "corpus.source: 'stdlib'"
    if config.source == "hub":
        return f"corpus.dataset: {config.dataset!r}"
    return f"corpus.paths: {list(config.paths)}"


# --- readers ------------------------------------------------------------------------------------


def _read_stdlib(config: CorpusConfig, most: int) -> Iterator[Document]:
    yield from (Document(name, text[:most]) for name, text in stdlib_documents())


def _read_files(config: CorpusConfig, most: int) -> Iterator[Document]:
    for path in matching_files(config):
        name = path.name.lower()
        if name.endswith((".txt", ".txt.gz")):
            texts = _grouped(_lines(path, most), config.document, most)
        else:
            is_parquet = name.endswith(".parquet")
            rows = _parquet_rows(path, config.text_field) if is_parquet else _jsonl_rows(path)
            texts = _row_texts(rows, config, most)
        for number, text in enumerate(texts):
            yield Document(f"{path.name}:{number}", text)


def _read_hub(config: CorpusConfig, most: int) -> Iterator[Document]:
    for number, text in enumerate(_row_texts(_hub_rows(config), config, most)):
        yield Document(f"{config.dataset}:{number}", text)


def _hub_rows(config: CorpusConfig) -> Iterator[tuple[str, Any]]:
    assert config.dataset is not None  # CorpusConfig sees to it
    rows = hub.dataset_rows(
        config.dataset, subset=config.subset, split=config.split, revision=config.revision
    )
    return ((f"row {n} of {config.dataset}", row) for n, row in enumerate(rows, start=1))


def _read_tokens(config: CorpusConfig, most: int) -> Iterator[Document]:
    raise UserError("corpus.source: 'tokens' holds token ids, no text; use stdlib, files or hub")


_READERS: dict[str, Callable[[CorpusConfig, int], Iterator[Document]]] = {
    "stdlib": _read_stdlib,
    "files": _read_files,
    "hub": _read_hub,
    "tokens": _read_tokens,
}


def _rows(config: CorpusConfig, field: str) -> Iterator[tuple[str, Any]]:
    if config.source == "hub":
        yield from _hub_rows(config)
    paths = matching_files(config) if config.source == "files" else []
    for path in paths:
        name = path.name.lower()
        if name.endswith(".parquet"):
            yield from _parquet_rows(path, config.text_field, field)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(path)
        else:
            raise UserError(
                f"probes.concepts: {path.name} has no rows with a field {field!r}; give JSONL or"
                " Parquet"
            )
    if config.source not in ("hub", "files"):
        raise UserError(
            f"probes.concepts: corpus.source {config.source!r} has no rows with a field {field!r};"
            " use 'python', or give a probes.corpus of files"
        )


def _lines(path: pathlib.Path, most: int) -> Iterator[str]:
    """Lines with their ends, so that joining gives the file back; at most `most` of each.

    A BOM is no text, and a compressed file is unpacked as it is read.
    """
    packed = path.name.lower().endswith(".gz")
    opened = gzip.open if packed else pathlib.Path.open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            while line := file.readline(most):
                yield line
                while len(line) == most and not line.endswith("\n"):
                    line = file.readline(most)
    except UnicodeDecodeError as error:
        raise UserError(
            f"corpus.paths: {path.name} is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"corpus.paths: {path.name} is no whole gzip file ({error}); compress it again"
        ) from None


def _grouped(lines: Iterable[str], document: str, most: int) -> Iterator[str]:
    """Lines to documents. A blank line is an empty one, as in the hub's WikiText rows."""
    if document == "file":
        yield _joined(lines, most)
        return
    if document == "line":
        yield from (line if line.strip() else "" for line in lines)
        return
    number = 0

    def number_of(line: str) -> int:
        nonlocal number
        number += bool(_HEADING.fullmatch(line)) if document == "heading" else not line.strip()
        return number

    for _, group in itertools.groupby(lines, number_of):
        kept = (line for line in group if document == "heading" or line.strip())
        if text := _joined(kept, most):
            yield text


def _joined(lines: Iterable[str], most: int) -> str:
    held: list[str] = []
    for line in lines:
        held.append(line[:most])
        most -= len(held[-1])
        if not most:
            break
    return "".join(held)


def _row_texts(rows: Iterable[tuple[str, Any]], config: CorpusConfig, most: int) -> Iterator[str]:
    """The text of every named row: a document, or a line under `blank_line` and `heading`."""
    texts = (_text_of(row, config.text_field, where)[:most] for where, row in rows)
    if config.document in ("file", "line"):
        return texts
    lines = (t if t.endswith("\n") else f"{t}\n" for t in texts)
    return _grouped(lines, config.document, most)


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"corpus.paths: {where} is no JSON object; each line must be one")
    try:
        text = _value(row, field)
    except KeyError:
        has = ", ".join([*map(str, row)][:_FIELDS_TOLD])
        raise UserError(
            f"corpus.text_field: {where} has no field {field!r}; it has {has}"
        ) from None
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"corpus.text_field: {field!r} of {where} holds {type(text).__name__}, not text;"
            " name a field that holds text"
        )
    # JSON may hold half of a pair of surrogates, which no encoding can write.
    return (text or "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _value(row: Any, field: str) -> Any:
    """A field, or, where none is called so, `outer.inner`. Raises KeyError where it is not there.

    Of an outer one that is null, the inner ones are, too.
    """
    if row is None:
        return None
    outer, _, inner = field.partition(".")
    if not isinstance(row, dict) or not (field in row or (inner and outer in row)):
        raise KeyError(field)
    return row[field] if field in row else _value(row[outer], inner)


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path, _MOST_IN_ROW), start=1):
        where = f"line {number} of {path.name}"
        if len(line) == _MOST_IN_ROW:
            raise UserError(
                f"corpus.paths: {where} is longer than {_MOST_IN_ROW:,} characters; cut it up"
            )
        if line.strip():
            try:
                # int() refuses numbers of more than 4,300 digits.
                yield where, json.loads(line, parse_int=lambda digits: int(digits[:20]))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"corpus.paths: {where} is not JSON ({error.msg}); mend it"
                ) from None
            except RecursionError:
                raise UserError(
                    f"corpus.paths: {where} is nested too deeply; mend it or leave it out"
                ) from None


def _parquet_rows(path: pathlib.Path, *fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(n).path for n in range(len(file.schema))]
            for field in fields:
                named_by = "corpus.text_field" if field == fields[0] else "probes.concepts"
                if field not in (*file.schema_arrow.names, *leaves):
                    raise UserError(
                        f"{named_by}: {path.name} has no field {field!r}; it has"
                        f" {', '.join(leaves[:_FIELDS_TOLD])}"
                    )
            batches = file.iter_batches(1024, columns=list(fields))
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"row {n} of {path.name}", row) for n, row in enumerate(rows, start=1))
    except MemoryError:  # which Arrow's is, too
        raise
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus.paths: {path.name} is no Parquet file ({error})") from None


# --- digests ------------------------------------------------------------------------------------


def _digest(parts: Iterable[tuple[bytes, bytes]]) -> str:
    """SHA-256 over pairs, each length first, so that no two lists run into each other."""
    digest = hashlib.sha256()
    for pair in parts:
        for part in pair:
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _file_digest(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
