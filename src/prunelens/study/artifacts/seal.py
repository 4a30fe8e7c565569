"""What shows that an artifact is what was written: identities, checksums, a sealed `meta.json`."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

LIBRARIES = (
    *("prunelens", "torch", "transformers", "tokenizers", "numpy", "pandas", "safetensors"),
    *("scipy", "scikit-learn", "numba"),
)
SEAL, CLOSE = ',\n "sha256": "', "\n}"
UNSEALED = {
    *("stage", "version", "label", "config", "parents", "libraries", "platform", "files"),
    *("device", "wall_seconds"),
}


def identity_of(name: Any, version: Any, config: Any, parents: Any) -> str:
    """SHA-256 of what makes a stage the one that it is; `parents` are identities by role."""
    content = json.dumps([name, version, config, parents], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def sealed(meta: dict[str, Any]) -> str:
    """JSON that ends with the SHA-256 of itself without that entry."""
    text = json.dumps(meta, indent=1)
    return text.removesuffix(CLOSE) + SEAL + hashlib.sha256(text.encode()).hexdigest() + f'"{CLOSE}'


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError where a letter has changed.

    Artifacts of earlier versions have no seal, and nothing else that is not known.
    """
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError("it is no JSON object")
    head, seal, told = text.rpartition(SEAL)
    expected = hashlib.sha256((head + CLOSE).encode()).hexdigest() + f'"{CLOSE}'
    if told != expected if seal else not set(meta) <= UNSEALED:
        raise ValueError("it is not as it was written")
    meta.pop("sha256", None)
    return meta


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
