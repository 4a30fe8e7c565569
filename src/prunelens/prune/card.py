"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from prunelens import cards
from prunelens.cards import Sharing
from prunelens.prune.masks import MASKS_FILE
from prunelens.prune.record import ModelRecord, PruningRecord, TextRecord


def checkpoint_card(record: PruningRecord, sharing: Sharing) -> str:
    """The README.md of a pruned checkpoint on the hub."""
    return cards.card(
        "pruned_model",
        {"record": record, "masks_file": MASKS_FILE},
        sharing=sharing,
        library="transformers",
        tags=["pruning", "sparsity", record.pruning.criterion],
        base_models=base_models([record.model], sharing),
        datasets=data_sets(record.calibration),
        pipeline="text-generation",
    )


def base_models(models: Sequence[ModelRecord], sharing: Sharing) -> list[str]:
    """Hub ids for the front matter: the stated one, else the models' own."""
    if sharing.base_model_id:
        return [sharing.base_model_id]
    return list(dict.fromkeys(model.name for model in models if model.origin == "hub"))


def data_sets(*texts: TextRecord | None) -> list[str]:
    """The hub's data sets among some texts, each once."""
    return list(dict.fromkeys(text.dataset for text in texts if text and text.dataset))
