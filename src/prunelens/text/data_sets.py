"""A data set of the hub, or a folder that holds one, as text."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from prunelens import hub
from prunelens.config import CorpusConfig
from prunelens.text.files import row_fields, row_texts
from prunelens.text.reader import Document, Reader, files_digest


def _read_hub(config: CorpusConfig, most: int) -> Iterator[Document]:
    for number, text in enumerate(row_texts(_named_rows(config), config, most)):
        yield Document(f"{config.dataset}:{number}", text)


def _named_rows(config: CorpusConfig) -> Iterator[tuple[str, Any]]:
    assert config.dataset is not None  # CorpusConfig sees to it
    rows = hub.dataset_rows(
        config.dataset, subset=config.subset, split=config.split, revision=config.revision
    )
    return ((f"row {n} of {config.dataset}", row) for n, row in enumerate(rows, start=1))


def _fingerprint(config: CorpusConfig) -> str:
    assert config.dataset is not None
    folder = pathlib.Path(config.dataset)
    if not folder.is_dir():
        return hub.commit(
            config.dataset, field="corpus.dataset", kind="dataset", revision=config.revision
        )
    return files_digest(sorted(path for path in folder.rglob("*") if path.is_file()))


HUB = Reader(
    "hub",
    "a local data set",
    _read_hub,
    _fingerprint,
    needs="dataset",
    fields=lambda config, field: row_fields(_named_rows(config), config, field),
)
