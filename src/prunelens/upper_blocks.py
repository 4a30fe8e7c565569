"""Only the blocks above a site, run again and again with changed activations there.

What stands below a site does not change when the site does, and what stands before the first
changed position does not either (attention is causal). So after one pass over the prompts that
keeps keys and values, a change costs the blocks above the site, from the first changed position to
the one that is read. The Hugging Face model itself runs: its lower blocks are told to hand over
what they are given, so masks, sliding windows, rotary angles, the last norm and the head stay its.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.model import (
    LanguageModel,
    forward_tokens,
    hidden_of,
    logits,
    run_in_batches,
    site_module,
    with_hidden,
)

# Keys per block that one forward pass attends to (about items x context).
CACHED_TOKENS = {"cpu": 2**15, "cuda": 2**18}


class Baseline(NamedTuple):
    """What one pass over the prompts leaves for later ones."""

    keys: list[Float[Tensor, "prompts context heads width"]]
    """Of every block that is run; with `values` the bulk of the memory."""
    values: list[Float[Tensor, "prompts context heads width"]]
    """Of every block that is run."""
    top: Float[Tensor, "prompts context d_model"]
    """The last block's output: what the last norm and the head turn into logits."""


class UpperBlocks:
    """A model above one site, for a fixed set of prompts.

    With site `resid_post` of block L the blocks L+1.. are run. A sublayer's output enters inside
    its block, so for `attn_out` and `mlp_out` block L is run too, on its unchanged input.
    """

    def __init__(
        self, lm: LanguageModel, tokens: Int[Tensor, "prompts context"], *, site: Site, layer: int
    ) -> None:
        """Run the blocks below once, and check on the first prompt that skipping them is exact.

        Raises: UserError as `run_to_site`, without prompts, or where the model's own logits do not
            come out again (an architecture with other state than keys and values).
        """
        if not tokens.numel():
            raise UserError("causal.prompts: there are no prompts; give at least one window")
        self.states = run_in_batches(lm, tokens, site, layer)
        """[prompts, context, d_model], the model's dtype: the unchanged activations at the site."""
        self._lm, self._tokens = lm, tokens.to(lm.device)
        self._first = layer + 1 if site == "resid_post" else layer
        self._module = None if site == "resid_post" else site_module(lm, site, layer)
        self._entering = self.states  # of block `_first`
        if self._module is not None and layer > 0:
            self._entering = run_in_batches(lm, tokens, "resid_post", layer - 1)
        self._in_tuple = False  # some architectures' blocks return (states,)
        self._refuse_if_inexact()

    @functools.cached_property
    def unchanged(self) -> Baseline:
        """The baseline of the model as it is, run once."""
        return self.baseline(self.states)

    @torch.no_grad()
    def baseline(self, states: Float[Tensor, "prompts context d_model"]) -> Baseline:
        """One pass over all prompts with `states` at the site."""
        num_prompts, context = self._tokens.shape
        at_once = max(1, _limits(self._lm)[0] // context)
        parts = [self._pass(rows, states[rows]) for rows in _rows(num_prompts, at_once)]
        return Baseline(
            [torch.cat(blocks) for blocks in zip(*(part.keys for part in parts), strict=True)],
            [torch.cat(blocks) for blocks in zip(*(part.values for part in parts), strict=True)],
            torch.cat([part.top for part in parts]),
        )

    @torch.no_grad()
    def logits_at(
        self,
        baseline: Baseline,
        prompts: Int[Tensor, " items"],
        positions: Int[Tensor, " items"],
    ) -> Float[Tensor, "items vocabulary"]:
        """The baseline's own logits, in the model's dtype: only the head is run."""
        top = _at(baseline.top, prompts, positions)[:, None]
        with _handing_on(self._lm.blocks, top, self._in_tuple):
            token = _at(self._tokens, prompts, positions)[:, None]
            return self._lm.model(input_ids=token, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def rerun(
        self,
        baseline: Baseline,
        prompts: Int[Tensor, " items"],
        last: Int[Tensor, " items"],
        states: Float[Tensor, "items positions d_model"],
    ) -> Float[Tensor, "items vocabulary"]:
        """Logits at position `last` of each item, in the model's dtype.

        Args:
            baseline: what every position before the given ones is.
            prompts: which prompt each item changes.
            last: its last given position, which is read.
            states: at the site, for the `positions` positions that end there.

        Items may end at different positions: their caches are aligned on the right and masked on
        the left, as in generation from prompts of different lengths.
        """
        prompts, last = prompts.to(self._tokens.device), last.to(self._tokens.device)
        num_new = states.shape[1]
        starts = last - num_new + 1
        positions = starts[:, None] + torch.arange(num_new, device=starts.device)
        width = int(starts.max())
        column = torch.arange(width + num_new, device=starts.device) - width + starts[:, None]
        known = column >= 0
        ragged = not bool(known.all())
        where = prompts[:, None] * self._tokens.shape[1] + column.clamp_min(0)
        entering = states
        if self._module is not None:
            entering = _at(self._entering, prompts[:, None], positions)
        with self._entered(entering, states):
            return self._lm.model(
                input_ids=self._tokens[prompts[:, None], positions],
                attention_mask=known.long() if ragged else None,
                position_ids=positions if ragged else positions[:1],
                past_key_values=self._cache(baseline, where, width),
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def batches(
        self, first: Int[Tensor, " items"], last: Int[Tensor, " items"]
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Items (first changed and last position of each) cut into batches of similar ones.

        Every batch fits one `rerun` over as many positions as its longest item has.
        """
        num_tokens, num_cached = _limits(self._lm)
        order = torch.argsort(last - first, descending=True, stable=True)
        if bool((last == first).all()):
            order = torch.argsort(last, stable=True)  # equal lengths: sort by cache instead
        start = 0
        while start < len(order):
            longest = int(last[order[start]] - first[order[start]]) + 1
            most = min(num_tokens // longest, num_cached // self._tokens.shape[1])
            batch = order[start : start + max(1, most)]
            start += len(batch)
            yield batch

    def _pass(self, rows: slice, states: Tensor) -> Baseline:
        cache = DynamicCache()  # without the config all layers keep everything, windows included
        tops: list[Tensor] = []
        read = self._lm.blocks[-1].register_forward_hook(
            lambda _module, _inputs, output: tops.append(hidden_of(output))
        )
        try:
            entering = states if self._module is None else self._entering[rows]
            with self._entered(entering, states):
                for layer in range(self._first):  # so that the blocks' numbers are right
                    cache.update(*torch.zeros(2, 1, 1, 0, 1), layer)
                self._lm.model(
                    input_ids=self._tokens[rows],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            read.remove()
        run = cache.layers[self._first :]
        return Baseline(
            [layer.keys.transpose(1, 2).contiguous() for layer in run],
            [layer.values.transpose(1, 2).contiguous() for layer in run],
            tops[0],
        )

    def _cache(self, baseline: Baseline, where: Tensor, width: int) -> Cache:
        """Each item's keys and values; blocks that are skipped only know how many there are."""
        skipped = [_Known(width) for _ in range(self._first)]
        run = [
            _Gathered(width, keys, values, where)
            for keys, values in zip(baseline.keys, baseline.values, strict=True)
        ]
        return Cache(layers=[*skipped, *run])

    @contextlib.contextmanager
    def _entered(self, entering: Tensor, states: Tensor) -> Iterator[None]:
        """Blocks below `_first` give `entering`, the sublayer (if it is one) gives `states`."""
        with contextlib.ExitStack() as stack:
            # Nothing is below block 0: the embedding of the right tokens is its right input.
            stack.enter_context(
                _handing_on(self._lm.blocks[: self._first], entering, self._in_tuple)
            )
            if self._module is not None:
                hook = self._module.register_forward_hook(
                    lambda _module, _inputs, output: with_hidden(output, states)
                )
                stack.callback(hook.remove)
            yield

    @torch.no_grad()
    def _refuse_if_inexact(self) -> None:
        """From the cache of one prompt, unchanged states must give the model's own logits."""
        if not bool(self.states.isfinite().all()):
            dtype = str(self._lm.model.dtype).removeprefix("torch.")
            raise UserError(
                f"activations: {self._lm.label} in {dtype} gives NaN or infinity at the site; set"
                " models.dtype to bfloat16 or float32"
            )
        outputs: list[Any] = []
        read = self._lm.blocks[-1].register_forward_hook(lambda *passed: outputs.append(passed[-1]))
        own = logits(self._lm, self._tokens[:1])[0].float()
        read.remove()
        self._in_tuple = isinstance(outputs[0], tuple | list)
        try:
            # The same sums in another order: 1e-6 or so in float32, in 16 bits about three digits.
            wide = self._lm.model.dtype in (torch.float32, torch.float64)
            difference = self._difference_from(own) / float(own.std())
            problem = f"its logits differ by {difference:.1e} of their spread"
            if difference <= (1e-3 if wide else 0.2):
                return
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # Foreign code that is given a cache it does not know may fail in any of these ways.
            problem = f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise UserError(
            f"models.name: {self._lm.label} cannot be run from block {self._first} on with cached"
            f" keys and values ({problem}); leave 'causal' out of questions"
        )

    def _difference_from(self, own: Float[Tensor, "context vocabulary"]) -> float:
        """Largest difference of any logit of prompt 0, by each way of getting it."""
        end, middle = len(own) - 1, len(own) // 2
        prompts, ends = torch.zeros(2, dtype=torch.long), torch.tensor([end, middle])
        baseline = self._pass(slice(1), self.states[:1])
        single = _at(self.states, prompts, ends)[:, None]
        found = [
            self.logits_at(baseline, prompts, ends) - own[ends],
            self.rerun(baseline, prompts, ends, single) - own[ends],
            self.rerun(baseline, prompts[:1], ends[:1], self.states[:1, middle:]) - own[end],
        ]
        return max(float(part.abs().max()) for part in found)


class _Known(DynamicLayer):
    """The cache of a block that is skipped: its length, from which the model makes its masks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._width = width

    def get_seq_length(self) -> int:
        return self._width


class _Gathered(_Known):
    """The cache of a block that is run: rows of a baseline, gathered when the new ones arrive."""

    def __init__(self, width: int, keys: Tensor, values: Tensor, where: Tensor) -> None:
        super().__init__(width)
        self._stored, self._where = (keys, values), where

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """[items, heads, width + new, head width] each."""
        new = (key_states, value_states)
        return tuple(self._joined(*pair) for pair in zip(self._stored, new, strict=True))

    def _joined(self, stored: Tensor, new: Tensor) -> Tensor:
        # Gathering room for the new ones as well saves a second copy of everything.
        rows = stored.flatten(0, 1).index_select(0, self._where.flatten().to(stored.device))
        joined = rows.view(*self._where.shape, *stored.shape[2:])
        joined[:, self._width :] = new.transpose(1, 2)
        return joined.transpose(1, 2)


@contextlib.contextmanager
def _handing_on(blocks: nn.ModuleList, states: Tensor, in_tuple: bool) -> Iterator[None]:
    """While open, each of `blocks` does nothing but return `states`."""
    before = [block.__dict__.get("forward") for block in blocks]  # accelerate may have put one
    try:
        for block in blocks:
            block.forward = lambda *_, **__: (states,) if in_tuple else states
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.forward = forward


def _at(values: Tensor, prompts: Tensor, positions: Tensor) -> Tensor:
    """values[prompts, positions], wherever the indices are."""
    return values[prompts.to(values.device), positions.to(values.device)]


def _limits(lm: LanguageModel) -> tuple[int, int]:
    """Positions per forward pass and keys per block for the model's device."""
    kind = "cpu" if lm.device.type == "cpu" else "cuda"
    return forward_tokens(kind), CACHED_TOKENS[kind]


def _rows(count: int, at_once: int) -> Iterator[slice]:
    for start in range(0, count, at_once):
        yield slice(start, start + at_once)
