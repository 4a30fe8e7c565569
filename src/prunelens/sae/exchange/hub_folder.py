"""A folder for the hub: SAEs in the layouts of prunelens, SAELens and sparsify, with a card."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import NamedTuple

from prunelens.cards import CARD_FILE, RECORD_FILE, Sharing, version
from prunelens.prune.checkpoint import check_target
from prunelens.sae.exchange.card import OWN, prunings_of, sae_card
from prunelens.sae.exchange.export import export_sae, formats_of
from prunelens.sae.exchange.own_folder import PLACE_FILE
from prunelens.sae.exchange.record import QUALITY_FILE, SaeRecord, TrainingRecord, sae_record
from prunelens.temporary import new_folder

# Of an SAE's artifact, what it needs to be used; the others are about the study.
_NEEDED = ("sae.json", "sae.safetensors", "normalisation.safetensors")
_OPTIONAL = (PLACE_FILE, QUALITY_FILE)


class SaeSource(NamedTuple):
    """One SAE to be passed on."""

    folder: pathlib.Path
    """Its files, as prunelens wrote them."""
    training: TrainingRecord | None
    """What the study that made it knows; None where it lies outside one."""


class HubFolder(NamedTuple):
    """What `write_hub_folder` wrote."""

    folder: pathlib.Path
    """Where it is."""
    saes: tuple[str, ...]
    """The folder of each SAE within it; `.` for one that is alone."""


def write_hub_folder(
    sources: Mapping[str, SaeSource],
    out: str | pathlib.Path,
    *,
    sharing: Sharing,
) -> HubFolder:
    """Write SAEs as a folder that can be uploaded to the hub as it is.

    Every SAE has the folders `prunelens/`, `saelens/` and, where it is TopK, `sparsify/`, which
    hold the same weights; README.md is the card and prunelens.json says the same to programs. They
    are written beside `out`, flushed to disk and renamed, so `out` is whole or not there.

    Args:
        sources: by folder within the repository; the key "" stands for the repository itself.
        out: a new folder.
        sharing: license, repository and what the user says of the model.
    Raises: UserError where a folder holds no SAE with its normalisation, or as `check_target`.
    """
    assert sources and ("" not in sources or len(sources) == 1)
    out = pathlib.Path(out).expanduser().absolute()
    records = {path: sae_record(*source) for path, source in sources.items()}
    card = sae_card(records, sharing)
    check_target(out)
    with new_folder(out) as partial:
        for path, source in sources.items():
            _write_layouts(source.folder, partial / path, records[path], sharing)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        facts = {
            "kind": "sparse autoencoders",
            "prunelens": version(),
            "stated_model": sharing.base_model,
            "prunings": [pruning.as_json() for pruning in prunings_of(records)],
            "saes": [{"folder": path or ".", **r.as_json()} for path, r in records.items()],
        }
        text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
        (partial / RECORD_FILE).write_text(text, encoding="utf-8")
    return HubFolder(out, tuple(path or "." for path in sources))


def _write_layouts(
    folder: pathlib.Path, out: pathlib.Path, record: SaeRecord, sharing: Sharing
) -> None:
    own = out / OWN
    own.mkdir(parents=True)
    for name in (*_NEEDED, *_OPTIONAL):
        if name in _NEEDED or (folder / name).exists():
            shutil.copyfile(folder / name, own / name)
    for name in formats_of(record.architecture):
        export_sae(folder, out / name, format=name, model=_model_name(record, sharing))


def _model_name(record: SaeRecord, sharing: Sharing) -> str | None:
    """What SAELens is told to load: only a name that others can load too."""
    if sharing.base_model:
        return sharing.base_model
    known = record.training
    return known.model.name if known and known.model.origin == "hub" else None
