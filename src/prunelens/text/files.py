"""Local files as text: plain, JSONL or Parquet, compressed or not."""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.text.reader import Document, Reader, files_digest, matching_files

_TEXT_FILES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")  # in any case
_MOST_IN_ROW = 2**28  # characters of a line of JSON, which is parsed as a whole
_FIELDS_TOLD = 20
_HEADING = re.compile(r" ?= [^=].* =\s*")  # WikiText's title of an article; sections have `= =`


def _read_files(config: CorpusConfig, most: int) -> Iterator[Document]:
    for path in matching_files(config, _TEXT_FILES):
        name = path.name.lower()
        if name.endswith((".txt", ".txt.gz")):
            texts = _grouped(_lines(path, most), config.document, most)
        else:
            is_parquet = name.endswith(".parquet")
            rows = _parquet_rows(path, config.text_field) if is_parquet else _jsonl_rows(path)
            texts = row_texts(rows, config, most)
        for number, text in enumerate(texts):
            yield Document(f"{path.name}:{number}", text)


def _labelled_files(config: CorpusConfig, field: str) -> Iterator[tuple[str, str, Any]]:
    for path in matching_files(config, _TEXT_FILES):
        name = path.name.lower()
        if name.endswith((".txt", ".txt.gz")):
            raise UserError(
                f"probes.concepts: {path.name} has no rows with a field {field!r}; give JSONL or"
                " Parquet"
            )
        is_parquet = name.endswith(".parquet")
        rows = _parquet_rows(path, config.text_field, field) if is_parquet else _jsonl_rows(path)
        yield from row_fields(rows, config, field)


def row_fields(
    rows: Iterable[tuple[str, Any]], config: CorpusConfig, field: str
) -> Iterator[tuple[str, str, Any]]:
    """Of every named row its name, its text and what a field holds."""
    for where, row in rows:
        text = _text_of(row, config.text_field, where)
        try:
            yield where, text, _value(row, field)
        except KeyError:
            raise UserError(
                f"probes.concepts: {where} has no field {field!r}; name the one with its labels"
            ) from None


def row_texts(rows: Iterable[tuple[str, Any]], config: CorpusConfig, most: int) -> Iterator[str]:
    """The text of every named row: a document, or a line under `blank_line` and `heading`."""
    texts = (_text_of(row, config.text_field, where)[:most] for where, row in rows)
    if config.document in ("file", "line"):
        return texts
    lines = (t if t.endswith("\n") else f"{t}\n" for t in texts)
    return _grouped(lines, config.document, most)


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


FILES = Reader(
    "files",
    "local files",
    _read_files,
    lambda config: files_digest(matching_files(config, _TEXT_FILES)),
    needs="paths",
    fields=_labelled_files,
)
