"""A causal language model, its sites, and running it up to a site (methods §4).

A site is a place in the residual architecture, by decoder block counted from 0:

- `resid_post`: the block's output.
- `attn_out`, `mlp_out`: what attention and MLP **add to the residual stream**. Where a block
  normalises a sublayer's output before adding it (Gemma 2 and 3, OLMo 2, GLM-4) the site is after
  that norm, as `hook_attn_out` and `hook_mlp_out` of TransformerLens and SAELens, so that
  block input + attn_out + mlp_out = resid_post everywhere.

No attention mask is passed: windows have no padding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunelens import offload
from prunelens.checkpoint import (
    ModelShape,
    load_tokenizer,
    load_weights,
    longest_context,
    meta_model,
    model_fingerprint,
    model_shape,
    num_blocks,
)
from prunelens.config import ModelConfig, Site
from prunelens.corpus import check_ids
from prunelens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FORWARD_TOKENS",
    "LanguageModel",
    "ModelShape",
    "as_language_model",
    "described_model",
    "forward_tokens",
    "hidden_of",
    "load_model",
    "load_tokenizer",
    "logits",
    "model_fingerprint",
    "model_shape",
    "replace_at_site",
    "run_in_batches",
    "run_to_site",
    "run_to_sites",
    "site_module",
    "usable_device",
    "with_hidden",
]

# Tokens per forward pass. On a CPU 2,048 ran 1.5 times faster than 8,192: they stay in the cache.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16_384}

# Names of sublayers and of the norms on their output, over the architectures of transformers.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
# What foreign code may raise on token ids that it cannot take.
_FORWARD_FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, ArithmeticError, ImportError),
)
_POST_NORMS = {
    "post_feedforward_layernorm": ("post_attention_layernorm",),
    "post_mlp_layernorm": ("post_self_attn_layernorm", "post_attention_layernorm"),
}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, without gradients."""

    model: PreTrainedModel
    """The Hugging Face model."""
    tokenizer: PreTrainedTokenizerBase | None
    """Its tokenizer; None where it has none (then only a `tokens` corpus will do)."""
    label: str
    """Its name in tables and errors."""
    blocks: nn.ModuleList
    """Its decoder blocks, in order."""

    @property
    def device(self) -> torch.device:
        """Where token ids have to be: where the embedding computes."""
        return offload.execution_device(self.model.get_input_embeddings())

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def max_context_tokens(self) -> int | None:
        """The longest window that it was built for; None where its config names none."""
        return longest_context(self.model.config.get_text_config())

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self.model.config.get_text_config().vocab_size


def load_model(config: ModelConfig | str, *, device: str = "cpu") -> LanguageModel:
    """Load a causal language model and its tokenizer from safetensors; no remote code is run.

    Of a multi-modal checkpoint the text decoder is used.

    Args:
        config: the model, or just its name: `bundled`, a local folder or a hub id.
        device: where to put it; `device_map: auto` decides by itself.
    Raises: UserError where it is missing, gated, out of reach, without safetensors, incomplete or
        no causal language model.
    """
    config = ModelConfig(name=config) if isinstance(config, str) else config
    device = usable_device(device)
    model = load_weights(config, device=device)
    if config.device_map is None and getattr(model, "hf_quantizer", None) is None:
        model.to(device)  # a quantised one is there already, and cannot be moved
    return as_language_model(model, load_tokenizer(config), label=config.label)


def as_language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, label: str
) -> LanguageModel:
    """Wrap a Hugging Face causal language model that is already in memory.

    It is put in evaluation mode, its gradients are switched off, and attention soft-capping
    (Gemma 2) gets the eager implementation, the one that applies it everywhere.
    Raises: UserError where no list of decoder blocks is found.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    model.eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, label, _decoder_blocks(model, label))


def described_model(config: ModelConfig) -> LanguageModel:
    """The model that its config describes, with shapes and without weights or tokenizer.

    Whatever only looks at its architecture looks at it as at a loaded one, and refuses the same.
    Raises: UserError as `load_model`, for what a config can tell.
    """
    return as_language_model(meta_model(config), label=config.label)


def site_module(lm: LanguageModel, site: Site, layer: int) -> nn.Module:
    """The module whose output is the site.

    Raises: UserError where the model has no such layer or no such sublayer.
    """
    if not 0 <= layer < len(lm.blocks):
        raise UserError(
            f"models.layers: layer {layer} is not in {lm.label}, which has {len(lm.blocks)}"
            " blocks, counted from 0"
        )
    block = lm.blocks[layer]
    if site == "resid_post":
        return block
    names: tuple[str, ...] = _MLP if site == "mlp_out" else _ATTENTION
    for of_mlp, of_attention in _POST_NORMS.items():
        if hasattr(block, of_mlp):
            names = (of_mlp,) if site == "mlp_out" else of_attention
    for name in names:
        if isinstance(module := getattr(block, name, None), nn.Module):
            return module
    parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in block.named_children())
    raise UserError(
        f"models.site: {site!r} is not found in block {layer} of {lm.label}, which has {parts};"
        " use 'resid_post'"
    )


def run_to_site(
    lm: LanguageModel, tokens: Int[Tensor, "windows context"], site: Site, layer: int
) -> Float[Tensor, "windows context d_model"]:
    """The activations at a site, in the model's dtype; nothing above the site is run.

    Raises: UserError for an unknown site, a token outside the vocabulary or a window too long.
    """
    return run_to_sites(lm, tokens, [(site, layer)])[0]


@torch.no_grad()
def run_to_sites(
    lm: LanguageModel, tokens: Int[Tensor, "windows context"], places: Sequence[tuple[Site, int]]
) -> list[Float[Tensor, "windows context d_model"]]:
    """The activations at several (site, layer) places, in that order, from one pass.

    Nothing above the last place that the pass reaches is run; each result is, bit for bit, what
    `run_to_site` gives.
    Raises: UserError as `run_to_site`.
    """
    if not places:
        return []
    wanted = dict.fromkeys(places)
    reached: dict[tuple[Site, int], Tensor] = {}

    def keep(place: tuple[Site, int], output: Any) -> None:
        if place in reached:  # a module that the model runs twice
            return
        reached[place] = _activations(lm, place, tokens, output)
        if len(reached) == len(wanted):
            raise _AllReachedError
        # What runs on may change it in place, as blocks with parallel sublayers do.
        reached[place] = reached[place].clone()

    tokens = _checked(lm, tokens)
    with contextlib.ExitStack() as hooks:
        for place in wanted:
            hook = site_module(lm, *place).register_forward_hook(
                lambda _module, _inputs, output, place=place: keep(place, output)
            )
            hooks.callback(hook.remove)
        try:
            _forward(lm, tokens)
        except _AllReachedError:
            return [reached[place] for place in places]
    site, layer = next(place for place in wanted if place not in reached)
    raise UserError(
        f"models.site: {site!r} of block {layer} of {lm.label} is no part of its forward pass on"
        " text; use another model"
    )


def run_in_batches(
    lm: LanguageModel, tokens: Int[Tensor, "windows context"], site: Site, layer: int
) -> Float[Tensor, "windows context d_model"]:
    """`run_to_site` on any number of windows; stays on the model's device."""
    at_once = max(1, forward_tokens(lm.device.type) // tokens.shape[1])
    return torch.cat([run_to_site(lm, part, site, layer) for part in tokens.split(at_once)])


def forward_tokens(device_type: str) -> int:
    """How many tokens one forward pass is given."""
    return FORWARD_TOKENS["cpu" if device_type == "cpu" else "cuda"]


@torch.no_grad()
def logits(
    lm: LanguageModel, tokens: Int[Tensor, "windows context"]
) -> Float[Tensor, "windows context vocabulary"]:
    """Scores of the next token at every position, in the model's dtype.

    Raises: UserError as `run_to_site`.
    """
    return _forward(lm, _checked(lm, tokens)).logits


def replace_at_site(
    lm: LanguageModel,
    tokens: Int[Tensor, "windows context"],
    site: Site,
    layer: int,
    replacement: Callable[
        [Float[Tensor, "windows context d_model"]], Float[Tensor, "windows context d_model"]
    ],
) -> Float[Tensor, "windows context vocabulary"]:
    """The logits when `replacement` of the activations at a site goes on in their place.

    Raises: UserError as `run_to_site`.
    """

    def swap(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        before = _activations(lm, (site, layer), tokens, output)
        return with_hidden(output, replacement(before).to(before))

    handle = site_module(lm, site, layer).register_forward_hook(swap)
    try:
        return logits(lm, tokens)
    finally:
        handle.remove()


class _AllReachedError(Exception):
    """Ends a forward pass that need not go on."""


def hidden_of(output: Any) -> Any:
    """What a block or sublayer gives the residual stream; what it returns beside it is left out."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, states: Tensor) -> Any:
    """`output` with `states` where `hidden_of` takes them from."""
    if isinstance(output, list):
        return [states, *output[1:]]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _activations(lm: LanguageModel, place: tuple[Site, int], tokens: Tensor, output: Any) -> Tensor:
    """The states at a site, out of what its module gave.

    Raises: UserError unless they are one vector of the residual stream's width for each token.
    """
    states, expected = hidden_of(output), (*tokens.shape, lm.d_model)
    found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
    others = output[1:] if isinstance(output, tuple | list) else ()
    is_one_of_two = place[0] == "resid_post" and any(
        isinstance(other, Tensor) and other.is_floating_point() and other.shape == expected
        for other in others
    )
    if found == expected and not is_one_of_two:
        return states
    shape = f"{', '.join(map(str, found))}" if isinstance(found, tuple) else found
    what = "two streams of" if found == expected else ""
    module = type(site_module(lm, *place)).__name__
    raise UserError(
        f"models.site: {place[0]!r} of {lm.label} is not supported: {module} of block {place[1]}"
        f" gives {what} [{shape}] for [windows, tokens] of {list(tokens.shape)}, not one vector of"
        f" {lm.d_model} numbers per token; use another site or model"
    )


def _forward(lm: LanguageModel, tokens: Int[Tensor, "windows context"]) -> Any:
    """The model's own forward pass.

    Raises: UserError where it fails in the model's own code; memory that is not there is no fault
        of the model, and what fails in a hook of ours is one of ours.
    """
    try:
        return lm.model(input_ids=tokens, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except _FORWARD_FAILURES as error:
        frames = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        if any(name.startswith("prunelens.") for name in frames[1:]):
            raise
        why = (str(error).strip().splitlines() or [""])[0][:150]
        raise UserError(
            f"models.name: {lm.label} ({type(lm.model).__name__}) cannot be run on text: its own"
            f" forward pass fails on {tokens.shape[-1]} tokens ({type(error).__name__}: {why});"
            " lower corpus.context_tokens, or use a model that transformers runs on token ids alone"
        ) from error


def _checked(lm: LanguageModel, tokens: Tensor) -> Tensor:
    """Tokens on the model's device; what it cannot take is refused while they are on the CPU."""
    limit = lm.max_context_tokens
    if limit is not None and tokens.shape[-1] > limit:
        raise UserError(
            f"corpus.context_tokens: {tokens.shape[-1]} is more than the {limit} that {lm.label}"
            f" takes; lower it to {limit}"
        )
    if tokens.device.type == "cpu":
        check_ids(tokens, lm.vocabulary_size, lm.label)
    return tokens.to(lm.device)


def _decoder_blocks(model: PreTrainedModel, label: str) -> nn.ModuleList:
    """The outermost list of modules with matrices in them, of the length that the config names."""
    # Of a few classes what `get_decoder` gives is the output head.
    lists = [*_outermost_lists(model.get_decoder())] or [*_outermost_lists(model.base_model)]
    depth = num_blocks(model.config.get_text_config())
    lists = [blocks for blocks in lists if len(blocks) == depth] or lists
    if len(lists) == 1:
        return lists[0]
    lengths = f"{len(lists)} lists of decoder blocks" if lists else "no list of decoder blocks"
    raise UserError(
        f"models.name: {label!r} ({type(model).__name__}) has {lengths}, so its layers cannot be"
        " told; use a decoder whose blocks are one list, run once from first to last"
    )


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            if any(len(p.shape) == 2 for block in child for p in block.parameters()):
                yield child
        else:
            yield from _outermost_lists(child)


def usable_device(device: str) -> str:
    """`device`, if it is there. Raises UserError if not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"device: {device!r} cannot be used ({reason}); use 'cpu'") from None
    return device
