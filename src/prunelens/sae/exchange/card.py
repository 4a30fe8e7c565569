"""The model card of one SAE or of several."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from prunelens import cards
from prunelens.cards import Sharing
from prunelens.prune.card import base_models, data_sets
from prunelens.prune.record import PruningRecord
from prunelens.sae.architectures import ARCHITECTURES
from prunelens.sae.exchange.export import formats_of
from prunelens.sae.exchange.record import SaeRecord

OWN = "prunelens"  # folder of an SAE's own layout; the others are called after their format


def sae_card(saes: Mapping[str, SaeRecord], sharing: Sharing) -> str:
    """The README.md of a hub folder.

    Args:
        saes: by their folder within the repository; "" for the repository itself.
        sharing: license, repository and what the user says of the model.
    """
    known = [record.training for record in saes.values() if record.training]
    titles = [record.training.model.title if record.training else "" for record in saes.values()]
    prunings = prunings_of(saes)
    architecture = next(iter(saes.values())).architecture  # a study has SAEs of one
    facts = {
        "saes": saes,
        "models": list(dict.fromkeys(titles)),
        "trainings": _trainings(saes, sharing),
        "runs": {training.run: training for training in known},  # whose SAEs are judged together
        "prunings": prunings,
        "own": OWN,
        "kind": ARCHITECTURES[architecture].title,
        "formats": formats_of(architecture),
    }
    texts = [training.text for training in known]
    return cards.card(
        "saes",
        facts,
        sharing=sharing,
        library="saelens",
        tags=["sparse-autoencoder", "interpretability", *formats_of(architecture)]
        + ["pruning"] * bool(prunings),
        base_models=base_models([training.model for training in known], sharing),
        datasets=data_sets(*texts, *(pruning.calibration for pruning in prunings)),
    )


def prunings_of(saes: Mapping[str, SaeRecord]) -> list[PruningRecord]:
    """The prunings of the models that SAEs were trained on, each once."""
    found = [record.training.pruning for record in saes.values() if record.training]
    return list({(p.label, p.masks_sha256): p for p in found if p}.values())


def _trainings(saes: Mapping[str, SaeRecord], sharing: Sharing) -> dict[Markup | None, list[str]]:
    """The SAEs of each way of training, which is told in a table; None: it is not known."""
    groups: dict[Markup | None, list[str]] = {}
    for path, record in saes.items():
        told = None
        if record.training:
            told = cards.part("training", training=record.training, sharing=sharing)
        groups.setdefault(told, []).append(path or ".")
    return groups
