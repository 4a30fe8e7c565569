"""The Python standard library as text: what the bundled model was trained on, and what not."""

from __future__ import annotations

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.text.reader import Document, Reader, digest

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


def stdlib_held_out(name: str) -> bool:
    """Whether the bundled model never saw this module: every tenth, by hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def _stdlib_halves() -> tuple[list[Document], list[Document]]:
    """Modules that the bundled model was trained on, and held-out ones that copy none of those."""
    modules = stdlib_documents()
    trained = [document for document in modules if not stdlib_held_out(document.name)]
    seen = {document.text for document in trained}
    return trained, [d for d in modules if stdlib_held_out(d.name) and d.text not in seen]


def _stdlib_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Installed packages lie beside the library and are many more files: they are not walked."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_TEXT]
        found += [pathlib.Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found)


def _read_stdlib(config: CorpusConfig, most: int) -> Iterator[Document]:
    yield from (Document(name, text[:most]) for name, text in stdlib_documents())


STDLIB = Reader(
    "stdlib",
    "the Python standard library's sources",
    _read_stdlib,
    lambda _: digest((d.name.encode(), d.text.encode()) for d in stdlib_documents()),
    halves=_stdlib_halves,
)
