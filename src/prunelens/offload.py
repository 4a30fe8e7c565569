"""Weights that accelerate keeps in the machine's memory or on disk and brings in for each call.

Between two calls such a weight of a module is on torch's `meta` device: it has a shape and nothing
else. What comes in is looked up in the `weights_map` of the module's hook, so that is the place to
read it from, and to put another one.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from prunelens import tensor_files


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of this very module are brought in for each call."""
    return bool(_hooks(module))


def any_offloaded(model: nn.Module) -> bool:
    """Whether a part of the model is."""
    return any(is_offloaded(module) for module in model.modules())


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight, or what is brought in for it.

    Of an offloaded one that `make_editable` has seen, and of one that waits in the machine's memory
    it is the thing itself, so that edits last; else it is a copy, read from disk.
    """
    weight = module.get_parameter("weight")
    if not weight.is_meta or not is_offloaded(module):
        return weight
    [hook] = _hooks(module)
    assert hook.weights_map is not None
    return hook.weights_map["weight"]


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes: not always where its weights are between two calls."""
    for hook in _hooks(module):
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


def make_editable(model: nn.Module, names: list[str]) -> None:
    """Copy weights that are on disk to files of their own, where edits last as long as the model.

    The files have no name and take the disk's room until the model is gone. What is not on disk is
    left as it is.

    Args:
        model: any part of it offloaded, or none.
        names: of modules with a weight.
    """
    copied: dict[tuple[str, str], Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        for hook in _hooks(module):
            loader = _loader(hook)
            key = f"{_prefix(hook)}weight"
            if loader is None or key in loader.state_dict:
                continue
            place = loader.index[key]
            source = place.get("safetensors_file", ""), place.get("weight_name", key)
            if source not in copied:
                found = loader[key]
                folder = pathlib.Path(loader.save_folder or tempfile.gettempdir())
                copied[source] = tensor_files.scratch(folder, found.dtype, tuple(found.shape))
                copied[source].copy_(found)
            loader.state_dict[key] = copied[source]


@contextlib.contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Bring in all weights of a module and what is in it once, for many calls."""
    found = [(part, hook) for part in module.modules() for hook in _hooks(part)]
    for part, hook in found:
        hook.pre_forward(part)
        hook.offload = False  # so that calls meanwhile neither bring in nor take away
    try:
        yield
    finally:
        for part, hook in found:
            hook.offload = True
            hook.post_forward(part, None)


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """While a model is spread: accelerate need not warn of what was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hook that brings in the weights of this module, if one does."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def _loader(hook: AlignDevicesHook) -> OffloadedWeightsLoader | None:
    held = hook.weights_map
    held = held.dataset if isinstance(held, PrefixedDataset) else held
    return held if isinstance(held, OffloadedWeightsLoader) else None


def _prefix(hook: AlignDevicesHook) -> str:
    return hook.weights_map.prefix if isinstance(hook.weights_map, PrefixedDataset) else ""
