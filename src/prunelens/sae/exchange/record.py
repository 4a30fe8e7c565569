"""What is known of an SAE: what its own files say, and what the study that made it says."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from prunelens.config import ActivationConfig, SaeConfig, Site
from prunelens.errors import UserError
from prunelens.prune.record import ModelRecord, PruningRecord, TextRecord
from prunelens.sae.exchange.formats import NormalisedSae
from prunelens.sae.exchange.own_folder import PLACE_FILE, own_sae

QUALITY = ("fvu", "fvu_raw", "fvu_dense_var", "l0", "alive", "num_latents", "mean_init_retention")
QUALITY_FILE = "quality.json"


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """How an SAE was trained, as the study that made it knows."""

    run: str
    """As in tables, e.g. `gemma-3-1b/L12/wanda-row-0.30`."""
    model: ModelRecord
    """The dense model."""
    pruning: PruningRecord | None
    """What had been done to the model; None: nothing, it is the dense one."""
    text: TextRecord
    """What the activations were made from."""
    training: SaeConfig
    """Its settings, with the steps that this SAE took."""
    init_seed: int
    """Of its first weights."""
    data_seed: int
    """Of the order of the data."""
    start: Literal["own", "warm", "doubled"]
    """`warm`: begun from the dense SAE of that seed; `doubled`: trained twice as long as usual."""
    activations: ActivationConfig
    """Which activations count, and whose mean and deviation they are normalised by."""
    enough: bool | None
    """Whether the run's SAEs were trained enough; None where that was not judged or is open."""
    enough_reason: str
    """Why, in words."""
    libraries: Mapping[str, str]
    """Versions that it was made with."""

    def as_json(self) -> dict[str, Any]:
        """All of it, for `prunelens.json`; of the pruning the name, which several SAEs share."""
        return {
            "run": self.run,
            "model": dataclasses.asdict(self.model),
            "pruning": self.pruning and self.pruning.reference,
            "text": self.text.as_json(),
            "training": self.training.model_dump(mode="json", exclude=set(_OF_A_STUDY)),
            "init_seed": self.init_seed,
            "data_seed": self.data_seed,
            "start": self.start,
            "activations": self.activations.model_dump(mode="json"),
            "trained_enough": self.enough,
            "trained_enough_reason": self.enough_reason,
            "libraries": dict(self.libraries),
        }


_OWN = ("architecture", "d_model", "num_latents", "k")
_OF_A_STUDY = ("seeds", "control_seeds", "checkpoint_every", "warm_steps")


@dataclasses.dataclass(frozen=True)
class SaeRecord:
    """One SAE, as a card tells of it."""

    architecture: str
    """Its name as studies have it."""
    d_model: int
    """Width of the activations."""
    num_latents: int
    """Size of the dictionary."""
    k: int
    """Latents kept per token; of batchtopk in the mean."""
    site: Site | None
    """Where it belongs; None where its files do not say."""
    layer: int | None
    """The decoder block; None where its files do not say."""
    quality: Mapping[str, float]
    """By the names of `sae_quality.csv`; NaN for what was not measured."""
    training: TrainingRecord | None
    """None where the SAE lies outside the study that made it."""

    def as_json(self) -> dict[str, Any]:
        """All of it, for `prunelens.json`; what is not a number becomes null."""
        own = {name: getattr(self, name) for name in _OWN}
        quality = {name: x if math.isfinite(x) else None for name, x in self.quality.items()}
        return {
            **own,
            "site": self.site,
            "layer": self.layer,
            "quality": quality,
            "training": self.training and self.training.as_json(),
        }


def sae_record(folder: pathlib.Path, training: TrainingRecord | None) -> SaeRecord:
    """What the files of one of our SAEs say, with what is known of its training.

    Raises: UserError as `own_sae`, and where place.json or quality.json is not what we write.
    """
    _check_place(folder / PLACE_FILE)
    given = own_sae(folder, name=folder.name)
    assert isinstance(given.coder, NormalisedSae)
    return SaeRecord(
        given.architecture,
        given.d_model,
        given.num_latents,
        given.coder.sae.k,
        given.site,
        given.layer,
        _quality(folder / QUALITY_FILE),
        training,
    )


def _check_place(path: pathlib.Path) -> None:
    """A place goes into file names and examples, so it has to be one."""
    if not path.exists():
        return
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
        site, layer = place.get("site"), place.get("layer")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if site not in (None, *get_args(Site)) or not isinstance(layer, int | None):
        raise UserError(
            f"sae: {path} names site {site!r} and layer {layer!r}; give one of"
            f" {', '.join(get_args(Site))} and the number of a block"
        )


def _quality(path: pathlib.Path) -> dict[str, float]:
    """What was measured of an SAE; all NaN without a file."""
    if not path.exists():
        return dict.fromkeys(QUALITY, math.nan)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(found.get(name, math.nan)) for name in QUALITY}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    problem = " ".join(str(error).split())[:150]
    return UserError(f"sae: {path} cannot be read ({problem}); make the SAE again")
