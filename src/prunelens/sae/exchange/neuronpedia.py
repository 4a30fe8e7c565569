"""Which SAEs have pages on Neuronpedia, where people have put labels on their latents."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import re
from typing import Any

from prunelens.config import PretrainedSaeConfig

_PLAIN = r"[A-Za-z0-9][\w.-]*"


def neuronpedia_id(config: PretrainedSaeConfig) -> str | None:
    """`MODEL/SAE` on Neuronpedia, where each of its latents has a page; None where none is known.

    From SAELens' registry or the SAE's own cfg.json, in a folder or in the hub's cache: the network
    is not asked.
    """
    if config.folder is not None:
        return _described_neuronpedia_id(pathlib.Path(config.folder).expanduser() / "cfg.json")
    assert config.release and config.sae_id
    if importlib.util.find_spec("sae_lens") is not None:
        directory = importlib.import_module(
            "sae_lens.loading.pretrained_saes_directory"
        ).get_pretrained_saes_directory()
        if known := directory.get(config.release):
            return _checked_neuronpedia_id(known.neuronpedia_id.get(config.sae_id))
    if "/" not in config.release:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.release, f"{config.sae_id}/cfg.json")
    return _described_neuronpedia_id(pathlib.Path(cached)) if isinstance(cached, str) else None


def _described_neuronpedia_id(path: pathlib.Path) -> str | None:
    """Of an SAE's cfg.json; None where the file is none or does not say."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict):
        return None
    metadata = described.get("metadata")
    places = [metadata if isinstance(metadata, dict) else {}, described]  # the older place last
    found = (_checked_neuronpedia_id(place.get("neuronpedia_id")) for place in places)
    return next((name for name in found if name), None)


def _checked_neuronpedia_id(name: Any) -> str | None:
    """Two plain names: it becomes part of an address."""
    is_plain = isinstance(name, str) and re.fullmatch(f"{_PLAIN}/{_PLAIN}", name, re.ASCII)
    return name if is_plain else None
