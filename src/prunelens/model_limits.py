"""What a model's files may ask for: refused before memory is reserved or other code is read.

A config may speak of any size and name code of its own, and an index may name any file. Whoever
loads the model would believe them.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prunelens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_BLOCKS = 1000  # the deepest open models have under 200
MOST_PARTS = 100_000  # blocks x experts: each may be built one by one
MOST_CONFIG_BYTES = 10_000_000
_UNREAD = 2  # a model may hold so many times the numbers in its files: tied or computed ones
_PACKED = 32  # of quantised weights: that many in one stored number, at most


def check_config(folder: pathlib.Path, name: str) -> None:
    """Raises UserError where config.json, or generation_config.json, is no plain description.

    Args:
        folder: of the model.
        name: what the study calls it.
    """
    found = _described(folder / "config.json", name)
    if (folder / "generation_config.json").exists():
        _described(folder / "generation_config.json", name)
    for key, value in _pairs(found):
        # transformers fetches `org/kernel` from the hub and runs it
        if "_implementation" in key and isinstance(value, str) and "/" in value:
            raise _refused(
                name, f"it needs code of its own ({value}), which prunelens does not run"
            )


def _described(path: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MOST_CONFIG_BYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(name, f"its {path.name} cannot be read: {error}") from None
    return found


def check_sizes(config: PreTrainedConfig, name: str) -> None:
    """Raises UserError for a language model of more parts than can be built one by one."""
    blocks = getattr(config, "num_hidden_layers", None)
    if blocks is None:
        raise UserError(
            f"models.name: {name!r} ({config.model_type}) has no number of decoder blocks"
            " (num_hidden_layers), so its layers cannot be told; use a decoder whose blocks are"
            " one list"
        )
    if not isinstance(blocks, int) or not 1 <= blocks <= MOST_BLOCKS:
        raise _refused(name, f"its config speaks of {blocks!r} blocks; 1 to {MOST_BLOCKS} are read")
    for key, value in config.to_dict().items():
        is_count = key.startswith("num_") and type(value) is int
        if is_count and key != "num_hidden_layers" and blocks * value > MOST_PARTS:
            raise _refused(name, f"its config speaks of {blocks} blocks of {value} ({key})")


def check_weights(
    folder: pathlib.Path, name: str, *, num_parameters: int, is_quantised: bool
) -> None:
    """Raises UserError where the files are not safetensors of this folder, or hold far too little.

    Args:
        folder: of the model.
        name: what the study calls it.
        num_parameters: of the model that its config describes; what the files lack would be made up
            at random, in memory.
        is_quantised: several weights share a stored number.
    """
    if (folder / "adapter_config.json").exists():
        raise _refused(name, "it is an adapter of another model; merge the two and save the whole")
    for path in folder.glob("*.index.json"):
        _check_index(path, name)
    held = _num_held(folder, name)
    most = held * (_PACKED if is_quantised else _UNREAD)
    if num_parameters > most + 1_000_000:  # small models lack tensors by name, which says more
        raise _refused(
            name, f"its config speaks of {num_parameters} weights, and its files hold {held}"
        )


def _check_index(path: pathlib.Path, name: str) -> None:
    """An index names the file of each tensor; any that is no safetensors would be unpickled."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(name, f"{path.name} is no index of its files: {error!r}") from None
    for file in files:
        plain = isinstance(file, str) and file == pathlib.PurePath(file).name
        if not plain or not file.endswith(".safetensors"):
            raise _refused(name, f"{path.name} names {file!r}, no .safetensors file of its folder")


def _num_held(folder: pathlib.Path, name: str) -> int:
    """Numbers in all tensors, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    held = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                held += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _refused(name, f"{path.name} is no whole safetensors file: {error}") from None
    return held


def _pairs(found: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    if isinstance(found, dict):
        yield from found.items()
    for value in inner:
        yield from _pairs(value)


def _refused(name: str, why: str) -> UserError:
    return UserError(
        f"models.name: cannot load {name!r} ({why[:250]}); name a checkpoint that"
        " AutoModelForCausalLM loads"
    )
