"""A checkpoint that is pruned where it lies: a copy of its files, mapped, and a model on top.

The model is built without weights; what a call needs of them accelerate brings in from the copy,
one module after the other. Whatever changes its weights changes the copy, so once a model is pruned
the new checkpoint is there. Nothing of it is ever in memory as a whole, whatever the criterion.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prunelens import offload, tensor_files
from prunelens.checkpoint import (
    FAILURES,
    is_quantised,
    load_tokenizer,
    model_folder,
    model_shape,
)
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.model import LanguageModel, as_language_model, usable_device
from prunelens.model_limits import check_weights
from prunelens.prune.scores import NARROW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_M_MMAP_THRESHOLD, _MAPPED_FROM = -3, 1 << 17  # of glibc's malloc.h; bytes
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class NotOnDiskError(UserError):
    """A checkpoint whose tensors are not, one for one, those of its model."""

    def __init__(self, model: ModelConfig, reason: str) -> None:
        super().__init__(
            f"models.name: {model.name!r} cannot be pruned block by block ({reason}); leave out"
            " --block-by-block"
        )
        self.reason = reason


def copy_to_disk(
    model: ModelConfig, folder: pathlib.Path, *, device: str = "cpu", keep_narrow: bool = False
) -> LanguageModel:
    """Copy a checkpoint's weights, and give the model whose weights are that copy.

    Files and tensors keep their names. A quarter of a million numbers at a time is read, converted
    to the model's dtype and written. Tied weights are one tensor; tensors that the model has no use
    for are left out.

    Args:
        model: a folder, the bundled one, or a hub id, whose files are fetched first.
        folder: where the copy goes, and config.json and generation_config.json with it.
        device: where a call computes; weights are brought there and taken away again.
        keep_narrow: whether a tensor of fewer bits than the model's dtype is copied as it is. The
            model computes in its dtype all the same.

    From then on glibc's malloc gives freed pieces of a megabyte or more back at once, in the whole
    process: left to itself it kept three times the model (docs/large-models.md).
    Raises: NotOnDiskError where the checkpoint has to be loaded to know its weights: quantised,
        stacked or split ones, and those that stay in float32 by themselves. UserError as
        `load_model`, and where the disk has no room.
    """
    source = model_folder(model)
    _check(model, source)
    _give_freed_memory_back()
    skeleton = _skeleton(model, source)
    found = _tensors(model, skeleton, source)
    weights = _copied(found, skeleton, source, folder, keep_narrow)
    skeleton.config.dtype = weights[next(name for name, _ in skeleton.named_parameters())].dtype
    _save_configs(skeleton, folder)
    return as_language_model(
        _served(skeleton, weights, usable_device(device)), load_tokenizer(model), label=model.label
    )


class _Source(NamedTuple):
    """Where a tensor of the model comes from."""

    file: str
    """Name of the file within the checkpoint."""
    name: str
    """Its name there."""


def _give_freed_memory_back() -> None:
    """Stop glibc from raising the size from which it maps pieces one by one; nothing elsewhere.

    Between the activations that a pass frees lie small objects that accelerate makes for each call.
    They keep the heap from shrinking, which then grows with every pass.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def _check(model: ModelConfig, source: pathlib.Path) -> None:
    """Refuse what is not plain, and what `load_weights` refuses before it loads."""
    if is_quantised(model, source):
        raise NotOnDiskError(model, "its weights are quantised")
    if not any((source / name).is_file() for name in (_SINGLE, _INDEX)):
        raise NotOnDiskError(model, f"it has neither {_SINGLE} nor {_INDEX}")
    claimed = model_shape(model).parameters
    check_weights(source, model.name, num_parameters=claimed, is_quantised=False)


def _skeleton(model: ModelConfig, source: pathlib.Path) -> PreTrainedModel:
    """The model with buffers, and with parameters that are shapes only."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, model.dtype)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        if (source / "generation_config.json").is_file():
            skeleton.generation_config = GenerationConfig.from_pretrained(source)
    except FAILURES as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NotOnDiskError(model, f"its model cannot be built from its config: {why}") from None
    wide = {*(skeleton._keep_in_fp32_modules or ()), *(skeleton._keep_in_fp32_modules_strict or ())}
    if wide and dtype != torch.float32:
        raise NotOnDiskError(model, "parts of it stay in float32")
    return skeleton


def _tensors(
    model: ModelConfig, skeleton: PreTrainedModel, source: pathlib.Path
) -> dict[str, _Source]:
    """Where each tensor of the model's state comes from, by transformers' own renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.integrations.accelerate import accelerate_disk_offload

    files = _files(model, source)
    index = accelerate_disk_offload(
        skeleton,
        None,
        [str(source / file) for file in sorted(set(files.values()))],
        {"": "disk"},
        {"weight_map": files},
        get_model_conversion_mapping(skeleton),
    )
    found = {
        name: _Source(pathlib.Path(entry["safetensors_file"]).name, entry["weight_name"])
        for name, entry in index.items()
    }
    for target, tied in skeleton.all_tied_weights_keys.items():
        here, there = found.get(target), found.get(tied)
        if here and there and here != there:
            raise NotOnDiskError(
                model, f"it stores {target} and {tied}, which are one weight, twice"
            )
        found.update({name: here or there for name in (target, tied) if here or there})
    if missing := sorted(set(skeleton.state_dict()) - set(found)):
        raise NotOnDiskError(model, f"no single tensor of it is {missing[0]}")
    return found


def _files(model: ModelConfig, source: pathlib.Path) -> dict[str, str]:
    """The file of every tensor of the checkpoint; one file goes before many, as in transformers."""
    if (source / _SINGLE).is_file():
        return dict.fromkeys(tensor_files.layout(source / _SINGLE), _SINGLE)
    try:
        files = json.loads((source / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"models.name: {_INDEX} of {model.name!r} cannot be read; fetch it again"
        ) from None
    for file in set(names.values()):
        if pathlib.PurePath(file).name != file or not (source / file).is_file():
            raise UserError(f"models.name: {model.name!r} lacks its file {file!r}; fetch it again")
    return names


def _copied(
    found: Mapping[str, _Source],
    skeleton: PreTrainedModel,
    origin: pathlib.Path,
    folder: pathlib.Path,
    keep_narrow: bool,
) -> dict[str, Tensor]:
    """Every tensor of the model's state as what the new files hold; writes them and their index."""
    state = skeleton.state_dict()
    names = {source: name for name, source in found.items()}
    copies: dict[_Source, Tensor] = {}
    for file in sorted({source.file for source in names}):
        places = tensor_files.layout(origin / file)
        wanted = {}
        for source, name in names.items():
            if source.file == file:
                _check_shape(name, places.get(source.name), state[name], source)
                dtype, stored = state[name].dtype, places[source.name].dtype
                if keep_narrow and dtype == torch.float32 and stored in NARROW:
                    dtype = stored
                wanted[source.name] = (dtype, tuple(state[name].shape))
        made = tensor_files.create(folder / file, wanted)
        for name, tensor in made.items():
            tensor_files.fill(tensor, origin / file, places[name])
            copies[_Source(file, name)] = tensor
    if {source.file for source in names} != {_SINGLE}:
        total = sum(tensor.nbytes for tensor in copies.values())
        by_name = {source.name: source.file for source in sorted(names, key=lambda s: s.name)}
        index = {"metadata": {"total_size": total}, "weight_map": by_name}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {name: copies[source] for name, source in found.items()}


def _check_shape(
    name: str, place: tensor_files.Place | None, expected: Tensor, source: _Source
) -> None:
    if place is None or place.shape != tuple(expected.shape):
        shape = "absent" if place is None else list(place.shape)
        raise UserError(
            f"models.name: {source.name} in {source.file} is {shape}, the model's {name} is"
            f" {list(expected.shape)}; fetch the checkpoint again"
        )


def _save_configs(skeleton: PreTrainedModel, folder: pathlib.Path) -> None:
    """As `save_pretrained` does, which would also want the weights."""
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)
    if skeleton.can_generate() and skeleton.generation_config is not None:
        skeleton.generation_config.save_pretrained(folder)


def _served(skeleton: PreTrainedModel, weights: dict[str, Tensor], device: str) -> PreTrainedModel:
    """The model with accelerate's hooks, which bring in `weights` for each call."""
    from accelerate import dispatch_model

    for name, buffer in skeleton.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    with offload.expected():
        return dispatch_model(
            skeleton,
            {"": "disk"},
            main_device=device,
            state_dict=weights,
            offload_index={},
            skip_keys=skeleton._skip_keys_device_placement,
        )
