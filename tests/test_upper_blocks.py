import itertools

import pytest
import torch
import transformers

from conftest import ARCHITECTURES, VOCABULARY, tiny_language_model
from prunelens.errors import UserError
from prunelens.model import as_language_model, logits, replace_at_site, run_to_site
from prunelens.upper_blocks import UpperBlocks

PROMPTS, CONTEXT = 3, 24  # longer than conftest's window of 8
PLACES = [("resid_post", 0), ("resid_post", 1), ("resid_post", 2), ("mlp_out", 0), ("mlp_out", 1)]
PLACES += [("attn_out", 0), ("attn_out", 2)]


def prompts(seed=0, shape=(PROMPTS, CONTEXT)):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def changed_from(states, first, seed=1):
    """`states` with a change at every position from first[item] on."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
    later = torch.arange(states.shape[1]) >= first[:, None]
    return states + noise * later[..., None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_rerun_equals_the_whole_model_with_the_site_replaced(architecture, site, layer):
    lm, tokens = tiny_language_model(architecture), prompts()
    upper = UpperBlocks(lm, tokens, site=site, layer=layer)
    assert torch.equal(upper.states, run_to_site(lm, tokens, site, layer))
    # The baseline itself is not the model's own: other states at every position.
    states = changed_from(upper.states, torch.zeros(PROMPTS), seed=2)
    baseline = upper.baseline(states)
    own = replace_at_site(lm, tokens, site, layer, lambda _: states)
    everywhere = torch.cartesian_prod(torch.arange(PROMPTS), torch.arange(CONTEXT))
    found = upper.logits_at(baseline, *everywhere.T).view_as(own)
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)

    items = torch.tensor([2, 0, 1, 1])
    for start in (0, 1, 7, 9, 17, CONTEXT - 1):  # before, in and beyond the window
        after = changed_from(states[items], torch.full((4,), start))
        last = torch.full((4,), CONTEXT - 1)
        fast = upper.rerun(baseline, items, last, after[:, start:])
        slow = replace_at_site(lm, tokens[items], site, layer, lambda _, new=after: new)[:, -1]
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_new", [1, 3])
def test_items_that_end_at_different_positions_share_a_batch(architecture, num_new):
    lm, tokens = tiny_language_model(architecture), prompts()
    upper = UpperBlocks(lm, tokens, site="resid_post", layer=0)
    baseline = upper.baseline(upper.states)
    items, last = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([23, 2, 9, 10, 15])
    starts = last - num_new + 1
    after = changed_from(upper.states[items], starts)
    new = torch.stack([a[s : s + num_new] for a, s in zip(after, starts, strict=True)])
    fast = upper.rerun(baseline, items, last, new)
    slow = replace_at_site(lm, tokens[items], "resid_post", 0, lambda _: after)
    torch.testing.assert_close(fast, slow[torch.arange(5), last], atol=1e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    lm, tokens = tiny_language_model("gemma2"), prompts()
    before = logits(lm, tokens)
    lm.blocks[0].forward = lm.blocks[0].forward  # as accelerate puts one there
    upper = UpperBlocks(lm, tokens, site="mlp_out", layer=1)
    baseline = upper.baseline(upper.states)
    with pytest.raises(RuntimeError):
        upper.rerun(baseline, torch.tensor([0]), torch.tensor([3]), torch.zeros(1, 1, 5))
    assert torch.equal(logits(lm, tokens), before)
    assert "forward" in lm.blocks[0].__dict__
    assert not any("forward" in block.__dict__ for block in lm.blocks[1:])
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_batches_hold_every_item_once_and_stay_within_the_limits(monkeypatch):
    monkeypatch.setattr("prunelens.model.FORWARD_TOKENS", {"cpu": 64})
    monkeypatch.setattr("prunelens.upper_blocks.CACHED_TOKENS", {"cpu": 5 * CONTEXT})
    lm = tiny_language_model("llama")
    upper = UpperBlocks(lm, prompts(), site="resid_post", layer=0)
    first = torch.tensor([5, 0, 23, 20, 20, 7, 22, 21, 22, 21, 23, 23, 20])
    for last in (torch.full_like(first, CONTEXT - 1), first):
        found = list(upper.batches(first, last))
        assert sorted(torch.cat(found).tolist()) == list(range(len(first)))
        assert max(map(len, found)) == 5
        for batch in found:
            assert len(batch) * int((last - first)[batch].max() + 1) <= 64
    assert [int(first[b].max()) <= int(first[c].min()) for b, c in itertools.pairwise(found)]
    assert not list(upper.batches(first[:0], first[:0]))


SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": None}
NAMED = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WITH_TUPLES = {
    "falcon": NAMED,  # one key head, attention and MLP in parallel
    "gptj": {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2},  # positions as a bias of attention
}


def other_architecture(kind, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SMALL, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return as_language_model(model, label=kind)


@pytest.mark.parametrize("kind", WITH_TUPLES)
def test_blocks_that_return_tuples(kind):
    lm, tokens = other_architecture(kind, **WITH_TUPLES[kind]), prompts()
    upper = UpperBlocks(lm, tokens, site="resid_post", layer=1)
    baseline = upper.baseline(upper.states)
    after = changed_from(upper.states, torch.full((PROMPTS,), 10))
    last = torch.full((PROMPTS,), CONTEXT - 1)
    fast = upper.rerun(baseline, torch.arange(PROMPTS), last, after[:, 10:])
    slow = replace_at_site(lm, tokens, "resid_post", 1, lambda _: after)[:, -1]
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_model_without_keys_and_values_is_refused(kind):
    lm = other_architecture(kind, hidden_size=16, num_hidden_layers=3)
    with pytest.raises(UserError, match=rf"models.name: {kind} cannot .* leave 'causal' out"):
        UpperBlocks(lm, prompts(), site="resid_post", layer=0)


def test_no_prompts_are_refused():
    with pytest.raises(UserError, match=r"causal\.prompts"):
        UpperBlocks(tiny_language_model("llama"), prompts(shape=(0, 8)), site="resid_post", layer=0)
