"""What is captured, scored and put back is what Hugging Face's own model computes (methods §2, §4).

Four architectures, every site and layer, windows with and without a BOS, whatever the batch. Where
the same batch is run the statement is one of equal bits; another batch size makes float32 sum in
another order.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import ARCHITECTURES, VOCABULARY, _tiny_config, tiny_language_model
from prunelens.activations import Activations, capture
from prunelens.config import ActivationConfig, PruningConfig
from prunelens.corpus import windows
from prunelens.model import (
    as_language_model,
    logits,
    replace_at_site,
    run_in_batches,
    run_to_site,
)
from prunelens.perplexity import measure_perplexity
from prunelens.prune import prune_model
from test_properties import examples

LOCAL_AND_GLOBAL = "gemma3 with a global layer"  # two masks, two rotary embeddings
SITES = ("resid_post", "attn_out", "mlp_out")
BOS = 0
# The norm that reads what attention has added to the residual stream.
NORM_AFTER_ATTENTION = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    LOCAL_AND_GLOBAL: "pre_feedforward_layernorm",
    "gpt2": "ln_2",
}

architectures = st.sampled_from([*ARCHITECTURES, LOCAL_AND_GLOBAL])
sites = st.sampled_from(SITES)
layers = st.integers(0, 2)
bos_tokens = st.sampled_from([BOS, None])


@functools.cache
def model(architecture, dtype=torch.float32):
    """Read only: the tests share it."""
    if architecture != LOCAL_AND_GLOBAL:
        return tiny_language_model(architecture, dtype=dtype)
    config = _tiny_config("gemma3", VOCABULARY)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return as_language_model(own, label=architecture)


def text(seed, tokens):
    """Any token but the BOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (tokens,), generator=generator)


@st.composite
def texts(draw):
    """Windows as a study cuts them: 1 to 6 of 2 to 30 tokens, longer than the sliding ones of 8."""
    context, number, bos_token = draw(st.integers(2, 30)), draw(st.integers(1, 6)), draw(bos_tokens)
    stream = text(draw(st.integers(0, 10**6)), number * (context - (bos_token is not None)))
    cut = windows(stream, context, bos_token)
    assert cut.shape == (number, context)
    assert bos_token is None or bool((cut[:, 0] == BOS).all())
    return cut


class OwnStates(NamedTuple):
    """What Hugging Face's model says of one batch."""

    hidden: tuple
    """The embeddings, then every block's output; the last one has gone through the final norm."""
    middles: list
    """Of every block: the residual stream between attention and MLP."""
    logits: torch.Tensor


@torch.no_grad()
def own_states(lm, architecture, tokens, **options):
    """From whole forward passes with the model's own arguments; no site of prunelens is asked."""
    middles = []
    handles = [
        getattr(block, NORM_AFTER_ATTENTION[architecture]).register_forward_pre_hook(
            lambda _, arguments: middles.append(arguments[0])
        )
        for block in lm.blocks
    ]
    found = lm.model(input_ids=tokens, output_hidden_states=True, use_cache=False, **options)
    for handle in handles:
        handle.remove()
    return OwnStates(found.hidden_states, middles, found.logits)


def final_norm(lm):
    """What stands between the last block and the head."""
    decoder = lm.model.get_decoder()
    return decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm


def assert_is_the_site(lm, own, captured, site, layer):
    """Bit for bit; of a sublayer, what it adds to the stream, as the model itself adds it up."""
    before, middle = own.hidden[layer], own.middles[layer]
    if site == "attn_out":
        assert torch.equal(before + captured, middle)
        return
    after = captured if site == "resid_post" else middle + captured
    if layer == len(lm.blocks) - 1:
        after = final_norm(lm)(after)
    assert torch.equal(after, own.hidden[layer + 1])


# --- activations ----------------------------------------------------------------------------------


@given(architectures, sites, layers, texts())
@examples(40)
def test_captured_activations_are_hugging_faces_own(architecture, site, layer, tokens):
    lm = model(architecture)
    own = own_states(lm, architecture, tokens)
    assert_is_the_site(lm, own, run_to_site(lm, tokens, site, layer), site, layer)


@given(architectures, layers, texts())
@examples(15)
def test_no_padding_means_no_mask_and_positions_from_zero(architecture, layer, tokens):
    """What prunelens leaves to the model, spelled out, changes no bit."""
    lm = model(architecture)
    spelled_out = {
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
    }
    own = own_states(lm, architecture, tokens, **spelled_out)
    assert_is_the_site(lm, own, run_to_site(lm, tokens, "resid_post", layer), "resid_post", layer)
    assert torch.equal(logits(lm, tokens), own.logits)


@given(architectures, sites, layers, texts(), st.integers(1, 200), st.integers(0, 1))
@examples(30)
def test_the_store_holds_them_row_by_row_whatever_the_batch(
    tmp_path_factory, architecture, site, layer, tokens, tokens_at_once, skip_first
):
    """Row after row, window after window, the first positions left out; nothing between windows."""
    lm, path = model(architecture), tmp_path_factory.mktemp("store") / "a.safetensors"
    config = ActivationConfig(skip_first=skip_first)
    with mock.patch.dict("prunelens.model.FORWARD_TOKENS", {"cpu": tokens_at_once}):
        norms = capture(lm, tokens, path, site=site, layer=layer, config=config)
    alone = [run_to_site(lm, window[None], site, layer)[0, skip_first:] for window in tokens]
    expected = torch.cat(alone)
    stored = Activations(path).raw_rows(torch.arange(len(expected)))
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms, expected.norm(dim=1), rtol=1e-4, atol=1e-5)
    at_once = max(1, tokens_at_once // tokens.shape[1])
    batches = [run_to_site(lm, part, site, layer)[:, skip_first:] for part in tokens.split(at_once)]
    assert torch.equal(stored, torch.cat(batches).flatten(0, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES)
def test_in_bfloat16_the_store_holds_the_models_own_bits(tmp_path, architecture, site):
    lm, tokens = model(architecture, torch.bfloat16), windows(text(0, 63), 22, BOS)
    own, path = own_states(lm, architecture, tokens), tmp_path / "a.safetensors"
    config = ActivationConfig(storage="bfloat16", skip_first=0)
    capture(lm, tokens, path, site=site, layer=1, config=config)
    stored = load_file(path)["activations"]
    assert stored.dtype == torch.bfloat16
    assert_is_the_site(lm, own, stored.view(3, 22, 16), site, 1)


@given(architectures, sites, layers, texts(), st.integers(0, 10**6))
@examples(20)
def test_a_token_sees_its_own_window_and_only_what_is_before_it(
    architecture, site, layer, tokens, seed
):
    """A shorter window, other neighbours in the batch and another future change no activation."""
    lm = model(architecture)
    whole = run_to_site(lm, tokens, site, layer)
    cut = 1 + seed % tokens.shape[1]
    shorter = run_to_site(lm, tokens[:, :cut], site, layer)
    torch.testing.assert_close(whole[:, :cut], shorter, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        run_to_site(lm, tokens[order], site, layer), whole[order], rtol=1e-4, atol=1e-5
    )
    other = tokens.clone()
    other[:, cut:] = text(seed, other[:, cut:].numel()).view_as(other[:, cut:])
    assert torch.equal(run_to_site(lm, other, site, layer)[:, :cut], whole[:, :cut])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bos_matters_as_far_as_attention_reaches(architecture):
    """So that windows with and without one cannot be mixed up unnoticed."""
    lm, stream = model(architecture), text(5, 7)  # the sliding window is of 8
    with_bos = run_to_site(lm, windows(stream, 8, BOS), "resid_post", 1)[:, 1:]
    without = run_to_site(lm, windows(stream, 7, None), "resid_post", 1)
    assert (with_bos - without).abs().amax(2).min() > 1e-4


# --- replacement ----------------------------------------------------------------------------------


@given(architectures, sites, layers, texts())
@examples(40)
def test_putting_back_what_was_captured_changes_no_logit(architecture, site, layer, tokens):
    lm = model(architecture)
    captured, plain = run_to_site(lm, tokens, site, layer), logits(lm, tokens)
    assert torch.equal(plain, own_states(lm, architecture, tokens).logits)
    assert torch.equal(replace_at_site(lm, tokens, site, layer, lambda _: captured), plain)
    assert torch.equal(replace_at_site(lm, tokens, site, layer, lambda given: given), plain)
    seen = []
    replace_at_site(lm, tokens, site, layer, lambda given: seen.append(given) or given)
    assert torch.equal(seen[0], captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES)
def test_putting_back_what_the_store_holds_changes_no_logit(tmp_path, architecture, site, dtype):
    """Through the disk, in the precision of the model."""
    lm, tokens = model(architecture, dtype), windows(text(1, 57), 20, BOS)
    path, storage = tmp_path / "a.safetensors", str(dtype).removeprefix("torch.")
    config = ActivationConfig(storage=storage, skip_first=0)
    for layer in range(3):
        capture(lm, tokens, path, site=site, layer=layer, config=config)
        stored = Activations(path).raw_rows(torch.arange(60)).view(3, 20, 16)
        found = replace_at_site(lm, tokens, site, layer, lambda _, rows=stored: rows)
        assert torch.equal(found, logits(lm, tokens))


@given(architectures, sites, layers, texts(), st.integers(0, 10**6))
@examples(15)
def test_a_replacement_is_what_the_layers_above_see(architecture, site, layer, tokens, seed):
    """Put what other text leaves at the site into this text: the logits go on from there."""
    lm, context = model(architecture), tokens.shape[1]
    other = text(seed, tokens.numel()).view_as(tokens)
    states = run_in_batches(lm, other, site, layer)
    found = replace_at_site(lm, tokens, site, layer, lambda _: states)
    if site == "resid_post":  # all that the layers above know of the text
        assert torch.equal(found, logits(lm, other))
        half = torch.arange(context)[:, None] < context // 2
        mixed = replace_at_site(lm, tokens, site, layer, lambda own: torch.where(half, own, states))
        plain = logits(lm, tokens)
        assert torch.equal(mixed[:, : context // 2], plain[:, : context // 2])
    else:
        assert not torch.equal(found, logits(lm, tokens))


# --- perplexity -----------------------------------------------------------------------------------


@torch.no_grad()
def own_loss(lm, window):
    """Hugging Face's loss of one window: mean over all tokens but the first."""
    return float(lm.model(input_ids=window[None], labels=window[None], use_cache=False).loss)


@given(
    architectures, st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5),
    bos_tokens, st.integers(1, 5), st.booleans(),
)  # fmt: skip
@examples(30)
def test_perplexity_is_exp_of_the_models_own_loss(
    architecture, seed, context, number, bos_token, windows_at_once, pruned
):
    """Window by window, of the model as it is and of a pruned one; a partial window is dropped."""
    lm = pruned_model(architecture) if pruned else model(architecture)
    step = context - (bos_token is not None)
    stream = text(seed, number * step + seed % step)
    limit = {"cpu": windows_at_once * context * VOCABULARY}
    with mock.patch("prunelens.perplexity.LOGITS_AT_ONCE", limit):
        found = measure_perplexity(lm, stream, context_tokens=context, bos_token=bos_token)
    losses = [own_loss(lm, window) for window in windows(stream, context, bos_token)]
    assert found.num_tokens == number * (context - 1)
    assert found.window_nll.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.nll == pytest.approx(math.fsum(losses) / number, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(losses) / number), rel=1e-4)


@functools.cache
def pruned_model(architecture):
    """A copy of its own."""
    lm = model.__wrapped__(architecture)
    prune_model(lm, PruningConfig(criterion="magnitude", scope="global", sparsity=0.5))
    return lm
