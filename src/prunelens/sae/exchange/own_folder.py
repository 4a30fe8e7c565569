"""The folder of an SAE that prunelens trained, read as a `GivenSae`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, get_args

from safetensors import SafetensorError

from prunelens.activations import Statistics
from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.sae.architectures import load_sae
from prunelens.sae.exchange.formats import GivenSae, given

PLACE_FILE = "place.json"  # site and layer that an SAE of ours was trained at


def own_sae(folder: pathlib.Path, *, name: str, device: str = "cpu") -> GivenSae:
    """An SAE that prunelens trained, from a folder with its weights and its normalisation.

    Its nominal L0 is the one measured after training (`quality.json`, in a study's artifact),
    else its k.
    Raises: UserError where the folder is incomplete or damaged, or holds a control of a study that
        was trained in a rotated space.
    """
    sae = load_sae(folder).to(device)
    _refuse_rotated(folder)
    normalisation = _normalisation(folder, sae.d_model)
    found = given(sae, normalisation, name=name, nominal_l0=_measured_l0(folder, sae.k))
    site, layer = _place(folder / PLACE_FILE)
    return dataclasses.replace(found, site=site, layer=layer)


def _refuse_rotated(folder: pathlib.Path) -> None:
    """A study's folder says so in its `meta.json`; elsewhere nothing is rotated."""
    path = folder / "meta.json"
    config = _read(path).get("config") if path.exists() else None
    if isinstance(config, dict) and config.get("rotated"):
        raise UserError(
            f"sae: {str(folder)!r} is the study's control in a rotated space, which knows nothing"
            " of the model's own; give an SAE whose `rotated` in sae_training.csv is False"
        )


def _normalisation(folder: pathlib.Path, d_model: int) -> Statistics:
    path = folder / "normalisation.safetensors"
    if not path.exists():
        raise UserError(
            f"sae: {str(folder)!r} lacks normalisation.safetensors, without which raw activations"
            " cannot be encoded; give the SAE's folder in a study's artifacts"
        )
    try:
        found = Statistics.load(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise _unreadable(path, error) from None
    if found.mean.shape != (d_model,) or found.sigma.shape != (d_model,):
        raise UserError(
            f"sae: {path} is of width {found.mean.numel()}, its SAE of {d_model}; make it again"
        )
    if not all(part.isfinite().all() for part in found):
        raise UserError(f"sae: {path} holds NaN or infinity; make it again")
    return found


def _place(path: pathlib.Path) -> tuple[Site | None, int | None]:
    """Site and layer of an SAE, as far as its file knows them; what else it says is not ours."""
    if not path.exists():
        return None, None
    found = _read(path)
    site, layer = found.get("site"), found.get("layer")
    if site not in (None, *get_args(Site)) or type(layer) not in (int, type(None)):
        raise UserError(
            f"sae: {path} names site {site!r} and layer {layer!r}; give one of"
            f" {', '.join(get_args(Site))} and the number of a block"
        )
    return site, layer


def _measured_l0(folder: pathlib.Path, k: int) -> float:
    path = folder / "quality.json"
    if not path.exists():
        return float(k)
    try:
        return float(_read(path)["l0"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from None


def _read(path: pathlib.Path) -> dict[str, Any]:
    """An object of JSON. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__} where an object should be")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from None
    return found


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    problem = " ".join(str(error).split())[:150]
    return UserError(f"sae: {path} cannot be read ({problem}); make the SAE again")
