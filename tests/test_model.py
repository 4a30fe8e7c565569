from __future__ import annotations

import pathlib
import shutil

import pytest
import torch
import transformers

import conftest
from prunelens import checkpoint
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.model import (
    LanguageModel,
    as_language_model,
    load_model,
    load_tokenizer,
    logits,
    model_fingerprint,
    replace_at_site,
    run_to_site,
    run_to_sites,
    site_module,
)

SITES = ("resid_post", "mlp_out", "attn_out")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(
        1, conftest.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1)
    )


# --- sites --------------------------------------------------------------------------------------


def test_resid_post_is_hugging_faces_hidden_state(tiny_lm: LanguageModel, tokens: torch.Tensor):
    with torch.no_grad():
        hidden = tiny_lm.model(
            input_ids=tokens, use_cache=False, output_hidden_states=True
        ).hidden_states
    for layer in range(len(tiny_lm.blocks) - 1):  # above the last one stands the final norm
        torch.testing.assert_close(
            run_to_site(tiny_lm, tokens, "resid_post", layer), hidden[layer + 1], rtol=0, atol=0
        )


def test_sublayer_sites_are_what_is_added_to_the_residual_stream(
    tiny_lm: LanguageModel, tokens: torch.Tensor
):
    before = run_to_site(tiny_lm, tokens, "resid_post", 0)
    added = sum(run_to_site(tiny_lm, tokens, site, 1) for site in ("attn_out", "mlp_out"))
    torch.testing.assert_close(before + added, run_to_site(tiny_lm, tokens, "resid_post", 1))


@pytest.mark.parametrize("site", SITES)
def test_replacing_a_site_by_itself_changes_nothing_and_by_zeros_does(
    tiny_lm: LanguageModel, tokens: torch.Tensor, site: str
):
    plain = logits(tiny_lm, tokens)
    captured = run_to_site(tiny_lm, tokens, site, 1)
    assert captured.shape == (2, 20, tiny_lm.d_model)
    assert torch.equal(replace_at_site(tiny_lm, tokens, site, 1, lambda _: captured), plain)
    zeroed = replace_at_site(tiny_lm, tokens, site, 1, torch.zeros_like)
    assert (zeroed - plain).abs().max() > 1e-3
    assert torch.equal(logits(tiny_lm, tokens), plain)  # no hook is left behind


@pytest.mark.parametrize("site", SITES)
def test_nothing_above_the_site_runs_and_no_hook_stays(
    tiny_lm: LanguageModel, tokens: torch.Tensor, site: str
):
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(tiny_lm.blocks)
    ]
    run_to_site(tiny_lm, tokens, site, 1)
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in tiny_lm.model.modules())


PLACES = [(site, layer) for layer in (2, 0, 1) for site in SITES]


@pytest.mark.parametrize(
    "places",
    [PLACES, PLACES[::-1], PLACES[3:5], [("mlp_out", 1), ("resid_post", 0), ("mlp_out", 1)]],
    ids=["all", "backwards", "of one block", "one of them twice"],
)
def test_several_sites_in_one_pass_are_those_of_a_pass_each(
    tiny_lm: LanguageModel, tokens: torch.Tensor, places: list[tuple[str, int]]
):
    together = run_to_sites(tiny_lm, tokens, places)
    assert len(together) == len(places)
    for place, states in zip(places, together, strict=True):
        assert torch.equal(states, run_to_site(tiny_lm, tokens, *place)), place


def test_a_block_that_adds_in_place_does_not_change_what_was_captured(tokens: torch.Tensor):
    """Falcon's parallel sublayers: the attention's output is added onto the MLP's, in place."""
    config = transformers.FalconConfig(
        vocab_size=conftest.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        parallel_attn=True,
        new_decoder_architecture=False,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    lm = as_language_model(transformers.AutoModelForCausalLM.from_config(config), label="falcon")
    places = [(site, layer) for layer in range(2) for site in SITES]
    for place, states in zip(places, run_to_sites(lm, tokens, places), strict=True):
        assert torch.equal(states, run_to_site(lm, tokens, *place)), place


def test_one_pass_stops_at_the_highest_site_and_leaves_no_hook(
    tiny_lm: LanguageModel, tokens: torch.Tensor
):
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(tiny_lm.blocks)
    ]
    run_to_sites(tiny_lm, tokens, [("mlp_out", 1), ("resid_post", 0)])
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    with pytest.raises(UserError, match="layer 40"):
        run_to_sites(tiny_lm, tokens, [("mlp_out", 1), ("resid_post", 40)])
    assert not any(module._forward_hooks for module in tiny_lm.model.modules())


def other_model(kind: str, **fields: object) -> LanguageModel:
    """A small random model of another architecture, of two blocks."""
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    common = {"vocab_size": conftest.VOCABULARY, **ids}
    config = transformers.AutoConfig.for_model(kind, **(common | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return as_language_model(transformers.AutoModelForCausalLM.from_config(config), label=kind)


def in_blocks(hidden: str, layers: str, heads: str = "") -> dict[str, int]:
    return {hidden: 16, layers: 2} | ({heads: 2} if heads else {})


OTHERS = {
    "openai-gpt": in_blocks("n_embd", "n_layer", "n_head"),  # its blocks give lists
    "bloom": in_blocks("hidden_size", "n_layer", "n_head"),  # tuples
    "mamba": in_blocks("hidden_size", "num_hidden_layers"),
    "mamba2": {
        **in_blocks("hidden_size", "num_hidden_layers"),
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
    },
    "falcon_mamba": in_blocks("hidden_size", "num_hidden_layers"),
    "rwkv": in_blocks("hidden_size", "num_hidden_layers"),
    "modernbert-decoder": {  # whose `get_decoder` is its head
        **in_blocks("hidden_size", "num_hidden_layers", "num_attention_heads"),
        "intermediate_size": 24,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_of_other_kinds_are_captured_and_replaced(kind: str, tokens: torch.Tensor):
    lm = other_model(kind, **OTHERS[kind])
    captured = run_to_site(lm, tokens, "resid_post", 0)
    with torch.no_grad():
        own = lm.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    assert any(torch.equal(captured, states) for states in own[:2])  # Mamba leaves out the first
    plain = logits(lm, tokens)
    assert torch.equal(replace_at_site(lm, tokens, "resid_post", 0, lambda _: captured), plain)
    assert (replace_at_site(lm, tokens, "resid_post", 0, torch.zeros_like) - plain).abs().max() > 0


def test_two_residual_streams_are_refused(tokens: torch.Tensor):
    lm = conftest.tiny_language_model("llama")
    lm.blocks[0].register_forward_hook(lambda _module, _inputs, output: (output, output))
    with pytest.raises(UserError, match=r"gives two streams of \[2, 20, 16\]"):
        run_to_site(lm, tokens, "resid_post", 0)


def test_a_forward_pass_that_fails_is_told_in_one_line(
    tiny_llama: LanguageModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    def fails_with(kind: type[Exception], told: str) -> None:
        def fail(*_: object, **__: object) -> None:
            raise kind(told)

        monkeypatch.setattr(tiny_llama.blocks[1].mlp, "forward", fail)

    fails_with(IndexError, "index out of range\nin self")
    for run in (logits, lambda *given: run_to_site(*given, "resid_post", 2)):
        with pytest.raises(UserError, match=r"LlamaForCausalLM.* fails on 20 tokens \(IndexError"):
            run(tiny_llama, tokens)
    fails_with(torch.OutOfMemoryError, "no room")
    with pytest.raises(torch.OutOfMemoryError):
        logits(tiny_llama, tokens)


def test_a_block_that_is_not_run_is_told(tiny_llama: LanguageModel, tokens: torch.Tensor):
    tiny_llama.model.config.num_hidden_layers = 2  # transformers runs so many
    with pytest.raises(UserError, match="of block 2 of tiny-llama is no part of its forward pass"):
        run_to_site(tiny_llama, tokens, "resid_post", 2)


@pytest.mark.parametrize(
    ("kind", "fields", "longest"),
    [
        ("gpt2", {"n_positions": 7}, 7),
        ("mpt", {"max_seq_len": 7}, 7),
        ("whisper", {"max_target_positions": 7}, 7),
        ("dbrx", {"max_seq_len": 7}, 7),
        ("bloom", {"seq_length": 7}, 7),
        ("rwkv", {"context_length": 7}, 7),
        ("xlnet", {}, None),  # says -1
        ("mamba", {}, None),
    ],
)
def test_the_longest_window_is_known_by_any_name(
    kind: str, fields: dict[str, int], longest: int | None
):
    config = transformers.AutoConfig.for_model(kind, **fields)
    assert checkpoint.longest_context(config) == longest


def test_a_window_too_long_for_biased_attention_is_refused(tokens: torch.Tensor):
    lm = other_model("mpt", d_model=16, n_layers=1, n_heads=2, max_seq_len=19)
    with pytest.raises(UserError, match=r"corpus.context_tokens: 20 .* lower it to 19"):
        logits(lm, tokens)


def test_a_failing_replacement_leaves_no_hook(tiny_llama: LanguageModel, tokens: torch.Tensor):
    with pytest.raises(ZeroDivisionError):
        replace_at_site(tiny_llama, tokens, "resid_post", 0, lambda _: 1 / 0)
    assert not any(module._forward_hooks for module in tiny_llama.model.modules())


def test_gemma2_applies_attention_soft_capping(tokens: torch.Tensor):
    lm = conftest.tiny_language_model("gemma2")
    capped = logits(lm, tokens)
    for block in lm.blocks:
        block.self_attn.attn_logit_softcapping = None
    assert (logits(lm, tokens) - capped).abs().max() > 1e-4
    assert lm.model.config._attn_implementation == "eager"


def test_a_multi_modal_gemma3_is_its_text_decoder():
    text = conftest._tiny_config("gemma3", conftest.VOCABULARY).to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 5,  # deeper than the text decoder
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    lm = as_language_model(transformers.AutoModelForCausalLM.from_config(config), label="both")
    assert len(lm.blocks) == 3 and lm.d_model == 16 and lm.vocabulary_size == conftest.VOCABULARY
    assert run_to_site(lm, torch.ones(1, 5, dtype=torch.long), "mlp_out", 2).shape == (1, 5, 16)


def test_facts_about_the_model(tiny_lm: LanguageModel):
    assert (tiny_lm.d_model, tiny_lm.vocabulary_size, tiny_lm.max_context_tokens) == (16, 128, 64)
    assert tiny_lm.device.type == "cpu" and not tiny_lm.model.training
    assert not any(p.requires_grad for p in tiny_lm.model.parameters())


def test_bfloat16_keeps_its_dtype(tokens: torch.Tensor):
    lm = conftest.tiny_language_model("gemma3", dtype=torch.bfloat16)
    assert run_to_site(lm, tokens, "resid_post", 1).dtype == torch.bfloat16


def test_what_a_model_cannot_take_is_refused(tiny_llama: LanguageModel, tokens: torch.Tensor):
    with pytest.raises(UserError, match=r"models.layers: layer 40 .* 3 blocks, counted from 0"):
        site_module(tiny_llama, "resid_post", 40)
    with pytest.raises(UserError, match="layer -1"):
        site_module(tiny_llama, "resid_post", -1)
    with pytest.raises(UserError, match=r"corpus.context_tokens: 65 .* lower it to 64"):
        logits(tiny_llama, torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(UserError, match="token id 128 is outside the vocabulary"):
        run_to_site(tiny_llama, tokens + conftest.VOCABULARY - int(tokens.max()), "mlp_out", 0)


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_a_saved_model_loads_and_computes_the_same(
    architecture: str, tmp_path: pathlib.Path, tokens: torch.Tensor
):
    lm = conftest.tiny_language_model(architecture)
    lm.model.save_pretrained(tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    assert loaded.label == "saved" and loaded.tokenizer is None
    assert torch.equal(logits(loaded, tokens), logits(lm, tokens))


def test_dtype_device_and_tokenizer(checkpoint_folder: pathlib.Path):
    lm = load_model(ModelConfig(name=str(checkpoint_folder), dtype="bfloat16"), device="cpu")
    assert lm.model.dtype == torch.bfloat16
    assert lm.tokenizer is not None and lm.tokenizer.bos_token_id == 0
    spread = load_model(ModelConfig(name=str(checkpoint_folder), device_map="auto"))
    window = torch.arange(10)[None]
    assert run_to_site(spread, window, "resid_post", 1).shape == (1, 10, 16)


def test_fingerprint_is_the_content(checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoint_folder, copy)
    of_copy = model_fingerprint(ModelConfig(name=str(copy)))
    assert of_copy == model_fingerprint(ModelConfig(name=str(checkpoint_folder)))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert of_copy != model_fingerprint(ModelConfig(name=str(copy)))


def test_bad_checkpoints_give_one_line(checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path):
    def message(change: str) -> str:
        folder = tmp_path / change
        shutil.copytree(checkpoint_folder, folder)
        weights = folder / "model.safetensors"
        if change == "pickled":
            weights.rename(folder / "pytorch_model.bin")
        elif change == "torn":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif change == "unconfigured":
            (folder / "config.json").unlink()
        elif change == "unknown":
            (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')
        elif change == "foreign":
            (folder / "config.json").write_text('{"model_type": "t5"}')
        elif change == "deeper":
            config = transformers.AutoConfig.from_pretrained(folder)
            config.num_hidden_layers += 1
            config.save_pretrained(folder)
        with pytest.raises(UserError) as caught:
            load_model(str(folder))
        return str(caught.value)

    wanted = {
        "pickled": "has no .safetensors weights; convert it",
        "torn": "cannot load",
        "unconfigured": "has no config.json",
        "unknown": "cannot load",
        "foreign": "cannot load",
        "deeper": "lacks 9 of the model's tensors",
    }
    for change, expected in wanted.items():
        text = message(change)
        assert text.startswith("models.name: ") and expected in text and "\n" not in text


def test_missing_models_give_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"models.name: the folder './nowhere' does not exist"):
        load_model("./nowhere")
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match=r"no bundled model; make it with tools/train_demo_lm.py"):
        load_tokenizer(ModelConfig())
    with pytest.raises(UserError, match="device: 'abacus' cannot be used"):
        load_model("bundled", device="abacus")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("GatedRepoError", "'org/it-GatedRepoError' is gated; accept its licence"),
        ("RepositoryNotFoundError", "no public model 'org/it-RepositoryNotFoundError'; check"),
        ("RevisionNotFoundError", "models.revision: .* has no revision 'v9'"),
        ("LocalEntryNotFoundError", "hub cannot be reached .*; connect, or give a local folder"),
    ],
)
def test_hub_failures_are_told_apart(failure: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_args: object, **_named: object) -> None:
        kind = getattr(errors, failure)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=expected) as caught:
        load_model(ModelConfig(name=f"org/it-{failure}", revision="v9"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        model_fingerprint(ModelConfig(name=f"org/it-{failure}", revision="v9"))


def test_offline_without_a_cache_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"models.name: .* hub cannot be reached"):
        load_model("org/never-fetched")
