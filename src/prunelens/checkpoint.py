"""Checkpoints: a model's files, found or fetched, and what stands for them in identities."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import pathlib
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunelens import hub, offload, planted, tensor_files
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.model_limits import check_config, check_sizes, check_weights
from prunelens.panics import TOKENIZER_FIX, panics_told
from prunelens.paper import shipped_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = pathlib.Path(__file__).parent / "data" / "model"

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "*.jinja",
)
_QUANTISERS = {  # quant_method of a config -> the package that reads such weights
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
}
# What transformers raises on files that are not what they should be.
FAILURES = (
    *(OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, AssertionError, StrictDataclassError),
)
# Under one of these a config has the longest window; the first that it knows counts.
_CONTEXT_FIELDS = (
    *("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len"),
    *("max_sequence_length", "model_max_length", "seq_length", "context_length", "n_ctx"),
)
_WEIGHT_FILES = ("config.json", "generation_config.json", "model*.safetensors*")


def load_weights(config: ModelConfig, *, device: str = "cpu") -> PreTrainedModel:
    """The Hugging Face model of a checkpoint, from safetensors; no remote code is run.

    Args:
        config: the model; without `device_map` it is left on the CPU.
        device: where a quantised one is put at once, as it cannot be moved.
    Raises: UserError where it is missing, gated, out of reach, without safetensors, incomplete, no
        causal language model, or quantised by a package that is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = model_folder(config)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"models.name: {config.name!r} has no .safetensors weights; convert it once with"
            " AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) and name that folder"
        )
    quantised = is_quantised(config, folder)
    claimed = model_shape(config).parameters
    check_weights(folder, config.name, num_parameters=claimed, is_quantised=quantised)
    try:
        with contextlib.ExitStack() as stack, without_progress_bars(), offload.expected():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                device_map=config.device_map or ({"": device} if quantised else None),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **(_offload(config, stack) if config.device_map else {}),
            )
            weakref.finalize(model, stack.pop_all().close)
    except (*FAILURES, SafetensorError) as error:
        raise _cannot_load(config, "it as a causal language model", error) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"models.name: {config.name!r} lacks {len(missing)} of the model's tensors, e.g."
            f" {missing[0]}; save the whole model (adapters merged) and name that folder"
        )
    return model


def _offload(config: ModelConfig, stack: contextlib.ExitStack) -> dict[str, Any]:
    """What accelerate is told; the folder for what is offloaded to disk goes with the stack."""
    try:
        scratch = tempfile.TemporaryDirectory(dir=config.offload_folder, prefix="prunelens-")
    except OSError as error:
        raise UserError(
            f"models.offload_folder: cannot write to {config.offload_folder!r} ({error.strerror});"
            " name a folder that you can write to"
        ) from None
    places = {int(k) if k.isdigit() else k: v for k, v in (config.max_memory or {}).items()}
    return {"offload_folder": stack.enter_context(scratch), "max_memory": places or None}


def is_quantised(config: ModelConfig, folder: pathlib.Path) -> bool:
    """Whether weights are quantised; raises UserError where the package for it is missing."""
    check_config(folder, config.name)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    how = content.get("quantization_config")
    if not isinstance(how, dict):
        return False
    method = str(how.get("quant_method"))
    package = _QUANTISERS.get(method)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"models.name: {config.name!r} is quantised by {method}, which is not installed; pip"
            f" install {package.replace('_', '-')}"
        )
    return True


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where it comes without. Raises UserError as `load_weights`."""
    from transformers import AutoTokenizer

    folder = _folder(config, ("config.json", *_TOKENIZER_FILES))
    if not any(path.name != "config.json" for path in _files(folder, _TOKENIZER_FILES)):
        return None
    try:
        with panics_told(
            f"models.name: cannot load the tokenizer of {config.name!r}", TOKENIZER_FIX
        ):
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except FAILURES as error:
        raise _cannot_load(config, "its tokenizer", error) from None
    except Exception as error:
        if type(error) is not Exception:  # what tokenizers raises on a file that it cannot read
            raise
        raise _cannot_load(config, "its tokenizer", error) from None


def model_folder(config: ModelConfig) -> pathlib.Path:
    """Where weights and tokenizer are; a hub model's are fetched. Raises as `load_weights`."""
    return _folder(config, (*_WEIGHT_FILES, *_TOKENIZER_FILES))


def stored_dtype(folder: pathlib.Path) -> torch.dtype | None:
    """What most of the floating-point numbers of a checkpoint's files are; None where it has none.

    Raises: UserError as `tensor_files.layout`.
    """
    held: Counter[torch.dtype] = Counter()
    for path in folder.glob("*.safetensors"):
        for place in tensor_files.layout(path).values():
            if place.dtype.is_floating_point:
                held[place.dtype] += math.prod(place.shape)
    return max(held, key=held.__getitem__, default=None)


class ModelShape(NamedTuple):
    """What a plan needs to know of a model before it is loaded."""

    d_model: int
    num_blocks: int
    vocabulary_size: int
    max_context_tokens: int | None
    """None where the config names none."""
    attention_width: int
    """Width of all query heads together."""
    linear_weights: int
    """Weights of the linear layers of all decoder blocks together: what may be pruned."""
    parameters: int
    """All parameters; tied ones count once."""
    products: int = 0
    """Entries of X Xᵀ of the inputs of every one of those linear layers, all blocks together."""
    widest_input: int = 0
    """Inputs of the widest of those linear layers."""


def model_shape(config: ModelConfig) -> ModelShape:
    """Width, depth, vocabulary and weights from the config. Raises UserError as `load_weights`.

    The planted world has a width and nothing else.
    """
    if config.is_planted:
        return ModelShape(planted.D_MODEL, 1, 1, None, 0, 0, 0)
    model = meta_model(config)
    text = model.config.get_text_config()
    text.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose layers differ
    layers = _linear_layers(model)
    inputs = [
        layer.in_features
        if isinstance(layer, nn.Linear)
        else layer.get_parameter("weight").shape[0]
        for layer in layers
    ]
    try:
        heads = getattr(text, "num_attention_heads", None) or 0  # without attention
        return ModelShape(
            text.hidden_size,
            num_blocks(text) or 0,
            text.vocab_size,
            longest_context(text),
            heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)),
            sum(layer.get_parameter("weight").numel() for layer in layers),
            sum(parameter.numel() for parameter in model.parameters()),
            sum(size**2 for size in inputs),
            max(inputs, default=0),
        )
    except FAILURES as error:
        raise _cannot_load(config, "a language model's config", error) from None


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model that its config describes, with shapes and without memory (torch's `meta` device).

    Raises: UserError as `load_weights`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    described = text_config(config)
    if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # its text part is no model by itself
        described = _whole_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                described, dtype=getattr(torch, config.dtype), trust_remote_code=False
            )
    except FAILURES as error:
        raise _cannot_load(config, "a language model's config", error) from None


def num_blocks(text: PreTrainedConfig) -> int | None:
    """How many decoder blocks a config speaks of; None where it names no number."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((getattr(text, name) for name in names if hasattr(text, name)), None)


def longest_context(text: PreTrainedConfig) -> int | None:
    """The longest window that a model was built for, whatever its config calls it.

    None where the config names none, as of models without positions (Mamba, XLNet).
    """
    found = (getattr(text, name, None) for name in _CONTEXT_FIELDS)
    return next((each for each in found if isinstance(each, int) and each > 0), None)


def text_config(config: ModelConfig) -> PreTrainedConfig:
    """The config of the language model (of a multi-modal one: its text part).

    The shapes of the paper's models ship with prunelens: for those the hub is not asked, though a
    config that was fetched before goes first.
    Raises: UserError as `load_weights`.
    """
    try:
        text = _whole_config(config).get_text_config()
    except ValueError as error:  # of several, it is not known which one speaks
        raise _cannot_load(config, "a language model's config", error) from None
    check_sizes(text, config.name)
    return text


def _whole_config(config: ModelConfig) -> PreTrainedConfig:
    from transformers import AutoConfig

    shipped = None if is_local(config.name) else shipped_shape(config.name)
    try:
        if shipped and not _is_cached(config):
            return AutoConfig.for_model(**shipped)
        folder = _folder(config, ("config.json",))
        check_config(folder, config.name)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAILURES as error:
        raise _cannot_load(config, "a language model's config", error) from None


def _is_cached(config: ModelConfig) -> bool:
    """Whether a hub model's config was fetched before; asks no hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    return isinstance(found, str)


def _linear_layers(model: PreTrainedModel) -> list[nn.Module]:
    """All linear layers but the output embedding."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def model_fingerprint(config: ModelConfig, *, field: str = "models.name") -> str:
    """What stands for the weights in artifact identities.

    The resolved commit of a hub model; else a SHA-256 over config, weights and tokenizer files.
    Raises: UserError as `load_weights`; `field` is what it names.
    """
    if not is_local(config.name):
        return hub.commit(config.name, field=field, kind="model", revision=config.revision)
    names = ("config.json", "*.safetensors*", *_TOKENIZER_FILES)
    return files_fingerprint(_files(_folder(config, (), field=field), names))


def files_fingerprint(paths: Iterable[pathlib.Path]) -> str:
    """A SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _folder(
    config: ModelConfig, patterns: tuple[str, ...], *, field: str = "models.name"
) -> pathlib.Path:
    """Where the model's files are; a hub model's are fetched first."""
    if not is_local(config.name):
        return hub.snapshot(
            config.name,
            field=field,
            kind="model",
            revision=hub.commit(config.name, field=field, kind="model", revision=config.revision),
            patterns=patterns,
        )
    folder = BUNDLED if config.name == "bundled" else pathlib.Path(config.name).expanduser()
    if not (folder / "config.json").is_file():
        if config.name == "bundled":
            raise UserError(
                "models.name: 'bundled', but this installation has no bundled model; make it with"
                " tools/train_demo_lm.py, or name a hub id or a local folder"
            )
        state = "has no config.json" if folder.exists() else "does not exist"
        raise UserError(
            f"{field}: the folder {config.name!r} {state}; name a folder that save_pretrained"
            " wrote, or a hub id"
        )
    return folder


def is_local(name: str) -> bool:
    """Whether a model's name means the bundled one or a folder, not a hub id."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return name == "bundled" or looks_like_path or pathlib.Path(name).is_dir()


def is_here(config: ModelConfig) -> bool:
    """Whether a model's files are on this machine: local, or all in the hub's cache."""
    return (
        is_local(config.name) or hub.cached_model(config.name, revision=config.revision) is not None
    )


def _files(folder: pathlib.Path, patterns: tuple[str, ...]) -> list[pathlib.Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def _cannot_load(config: ModelConfig, what: str, error: Exception) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "trust_remote_code" in str(error):
        lines = ["it needs code of its own, which prunelens does not run"]
    return UserError(
        f"models.name: cannot load {what} from {config.name!r} ({lines[0].strip()[:200]});"
        " name a checkpoint that AutoModelForCausalLM loads"
    )


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Transformers draws a bar per model loaded or saved; a study has its own.

    Nor does it list what a file lacks, with names as the file has them: that is told in one line.
    """
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
