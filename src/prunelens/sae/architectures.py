"""The architectures of our SAEs by name, and an SAE of any of them from its folder."""

from __future__ import annotations

import json
import pathlib

from prunelens.sae.autoencoder import DESCRIPTION_FILE, SparseAutoencoder
from prunelens.sae.batchtopk import BatchTopKSAE
from prunelens.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    each.architecture: each for each in (TopKSAE, BatchTopKSAE)
}
"""By their names in studies (`config.features.Architecture`) and files."""


def load_sae(folder: str | pathlib.Path) -> SparseAutoencoder:
    """The SAE that `SparseAutoencoder.save` wrote, whatever its architecture.

    Raises: UserError as `SparseAutoencoder.load`, and where the architecture is not known.
    """
    try:
        described = json.loads((pathlib.Path(folder) / DESCRIPTION_FILE).read_text("utf-8"))
        kind = ARCHITECTURES[described["architecture"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = TopKSAE  # which says what is wrong
    return kind.load(folder)
