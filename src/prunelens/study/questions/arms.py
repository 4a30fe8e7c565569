"""The pairs of SAEs that make the arms of RQ2, among the parents of a stage."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from prunelens.activations import Statistics
from prunelens.analyses.survival import (
    Comparison,
    Dictionary,
    StartedT,
    control_arms,
    pruned_arms,
)
from prunelens.sae.architectures import load_sae
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.study.parents import Sae, Training
from prunelens.study.work import Work

CONDITIONS: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")


class Compared(NamedTuple):
    """One SAE among the parents."""

    condition: Literal["dense", "pruned"]
    which: Sae
    folder: pathlib.Path
    untrained: bool = False

    @property
    def init_seed(self) -> int:
        """Of the SAE."""
        return self.which.init_seed

    def sae(self) -> SparseAutoencoder:
        """As it was trained, or as it was at step 0."""
        sae = load_sae(self.folder)
        if not self.untrained:
            return sae
        return type(sae).initialise(sae.d_model, sae.num_latents, sae.k, init_seed=self.init_seed)

    def statistics(self) -> Statistics:
        """The normalisation that it was trained under."""
        return Statistics.load(self.folder / "normalisation.safetensors")


def dictionary(which: Compared) -> Dictionary:
    """Its decoder, as two are matched."""
    decoder, sae = which.sae().decoder_weight.detach(), which.which
    return Dictionary(decoder, which.statistics().sigma, sae.init_seed, sae.data_seed)


def arms(work: Work, load: Callable[[Compared], StartedT]) -> list[Comparison[StartedT]]:
    """The arms of a run, pruned or dense, from the SAEs among the parents."""
    dense, pruned = (
        [Compared(condition, sae, folder) for sae, folder in work.saes(condition).items()]
        for condition in CONDITIONS
    )
    plain = _plain(dense)
    if pruned:
        arms = [plain, _plain(pruned), _reordered(pruned), _others(pruned, training="warm")]
        return pruned_arms(*([load(each) for each in arm] for arm in arms))
    arms = [
        plain,
        _reordered(dense),
        _others(dense, rotated=True),
        [each._replace(untrained=True) for each in plain],
        _others(dense, training="warm"),
        _others(dense, rotated=True, training="warm"),
    ]
    return control_arms(*([load(each) for each in arm] for arm in arms))


def _plain(saes: list[Compared]) -> list[Compared]:
    return [each for each in saes if each.which.is_plain]


def _reordered(saes: list[Compared]) -> list[Compared]:
    """Of an order of the data that is another start's."""
    return [each for each in _others(saes) if not each.which.is_plain]


def _others(
    saes: list[Compared], *, rotated: bool = False, training: Training = "own"
) -> list[Compared]:
    alike = (rotated, training)
    return [each for each in saes if (each.which.rotated, each.which.training) == alike]
