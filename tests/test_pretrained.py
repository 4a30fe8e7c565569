"""SAELens' own loading code, offline: SAEs of other people laid into the hub cache's layout."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prunelens.activations import Statistics
from prunelens.config import CorpusConfig, ModelConfig, PretrainedSaeConfig, PruningConfig
from prunelens.errors import UserError
from prunelens.sae.exchange.formats import check_fits, check_l0
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.sae.topk import TopKSAE

D, LATENTS, K = 12, 40, 5
GEMMA_2 = {"release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_12/width_16k/canonical"}
GEMMA_3 = {"release": "gemma-scope-2-1b-pt-res-all", "sae_id": "layer_12_width_16k_l0_small"}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that lays a repository into an empty hub cache; there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def lay(repo, folder):
        commit = "0123456789abcdef0123456789abcdef01234567"
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit, encoding="utf-8")
        inner = root / "snapshots" / commit / folder
        inner.mkdir(parents=True)
        return inner

    return lay


@pytest.fixture
def small_gemma_2(sae_lens, monkeypatch):
    """SAELens takes the sizes of Gemma Scope from the folder's name; an override shrinks them."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    lookup = get_pretrained_saes_directory()[GEMMA_2["release"]]
    monkeypatch.setattr(lookup, "config_overrides", {"d_in": D, "d_sae": LATENTS})


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "w_enc": draw(D, LATENTS),
        "w_dec": draw(LATENTS, D),
        "b_enc": draw(LATENTS),
        "b_dec": draw(D),
        "threshold": 1 + draw(LATENTS).abs(),
    }


def inputs(seed=9):
    return torch.randn(50, D, generator=torch.Generator().manual_seed(seed))


def lay_gemma_2(hub_cache):
    folder = hub_cache("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    p = parameters()
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    np.savez(folder / "params.npz", **{names.get(name, name): t.numpy() for name, t in p.items()})
    return p


def lay_gemma_3(hub_cache):
    folder = hub_cache("google/gemma-scope-2-1b-pt", "resid_post_all/layer_12_width_16k_l0_small")
    p = parameters(1)
    save_file(p, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return p


def assert_jump_relu(sae, p):
    """z = pre where pre > threshold; x_rec = z W_dec + b_dec; nothing is subtracted from x."""
    x = inputs()
    pre = x @ p["w_enc"] + p["b_enc"]
    for factor in (1.0, 0.5, 2.0):
        scaled = sae if factor == 1.0 else sae.with_threshold_scale(factor)
        z = torch.where(pre > factor * p["threshold"], pre, torch.zeros(()))
        latents = scaled.encode(x)
        assert latents.dtype == torch.float32
        assert torch.allclose(latents, z, atol=1e-5) and 0 < (z != 0).sum() < z.numel()
        assert torch.allclose(scaled.decode(latents), z @ p["w_dec"] + p["b_dec"], atol=1e-4)
        assert torch.allclose(scaled.threshold, factor * p["threshold"])
    assert (sae.architecture, sae.d_model, sae.num_latents) == ("jumprelu", D, LATENTS)
    assert (sae.site, sae.layer) == ("resid_post", 12)


def test_gemma_scope(hub_cache, small_gemma_2):
    p = lay_gemma_2(hub_cache)
    sae = load_given_sae(PretrainedSaeConfig(layer=12, **GEMMA_2))
    assert_jump_relu(sae, p)
    assert sae.nominal_l0 == 82  # the release says it in the folder's name only
    assert sae.name == "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"
    stated = PretrainedSaeConfig(layer=12, nominal_l0=70.5, **GEMMA_2)
    assert load_given_sae(stated).nominal_l0 == 70.5


def test_gemma_scope_2(hub_cache, sae_lens):
    from sae_lens.loading import pretrained_sae_loaders

    before = pretrained_sae_loaders.get_safetensors_tensor_shapes
    p = lay_gemma_3(hub_cache)
    sae = load_given_sae(PretrainedSaeConfig(layer=12, **GEMMA_3))
    assert_jump_relu(sae, p)
    assert sae.nominal_l0 == 20  # as the release says
    assert pretrained_sae_loaders.get_safetensors_tensor_shapes is before


def saved(sae_lens, folder, *, architecture="TopK", hook="blocks.3.hook_mlp_out", **options):
    """An SAE with nothing at its initial value, saved by SAELens itself."""
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook)
    if architecture == "TopK":
        options = {"k": K, **options}
    name = architecture if architecture == "Transcoder" else f"{architecture}SAE"
    config, kind = getattr(sae_lens, f"{name}Config"), getattr(sae_lens, name)
    sae = kind(config(d_in=D, d_sae=LATENTS, metadata=metadata, **options))
    p = parameters(2)
    values = {"W_enc": p["w_enc"], "W_dec": p["w_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    sae.load_state_dict(sae.state_dict() | values)
    sae.save_model(folder)
    return p


def local(folder, **options):
    return load_given_sae(PretrainedSaeConfig(layer=3, folder=str(folder), **options))


def top_k(pre):
    kept = pre.topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values.clamp_min(0))


@pytest.mark.parametrize("centred", [True, False])
def test_a_top_k_sae_that_saelens_saved(sae_lens, tmp_path, centred):
    p = saved(sae_lens, tmp_path / "mine", apply_b_dec_to_input=centred)
    sae = local(tmp_path / "mine")
    x = inputs()
    z = top_k((x - centred * p["b_dec"]) @ p["w_enc"] + p["b_enc"])
    assert torch.allclose(sae.encode(x), z, atol=1e-5)
    assert torch.allclose(sae.decode(z), z @ p["w_dec"] + p["b_dec"], atol=1e-4)
    assert (sae.architecture, sae.nominal_l0, sae.name) == ("topk", K, "mine")
    assert (sae.site, sae.layer, sae.threshold) == ("mlp_out", 3, None)
    # A shifted decoder bias leaves the latents as they are, also where it is subtracted from x.
    shifted = sae.with_decoder_shift(torch.ones(D)).with_decoder_shift(torch.ones(D))
    assert torch.equal(shifted.encode(x), sae.encode(x))
    assert torch.allclose(shifted.decode(z), sae.decode(z) + 2)


def test_a_hub_repository_that_no_registry_knows(sae_lens, hub_cache):
    p = saved(sae_lens, hub_cache("someone/saes", "layer_3"), hook="blocks.4.hook_resid_pre")
    config = PretrainedSaeConfig(layer=3, release="someone/saes", sae_id="layer_3")
    sae = load_given_sae(config)
    x = inputs()
    assert torch.allclose(
        sae.encode(x), top_k((x - p["b_dec"]) @ p["w_enc"] + p["b_enc"]), atol=1e-5
    )
    assert (sae.site, sae.layer) == ("resid_post", 3)  # what enters block 4 is what left block 3
    assert sae.nominal_l0 == K


def test_an_sae_that_normalises_each_token(sae_lens, tmp_path):
    p = saved(sae_lens, tmp_path, architecture="Standard", normalize_activations="layer_norm")
    sae, x = local(tmp_path), 3 + 5 * inputs()
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    x_hat = (x - mean) / (spread + 1e-5)
    z = ((x_hat - p["b_dec"]) @ p["w_enc"] + p["b_enc"]).relu()
    latents = sae.encode(x)
    assert torch.allclose(latents, z, atol=1e-4)
    expected = (z @ p["w_dec"] + p["b_dec"]) * spread + mean
    assert torch.allclose(sae.decode(latents), expected, atol=1e-3)
    assert math.isnan(sae.nominal_l0) and "was not checked" in check_l0(sae, 20.0)


def test_a_top_k_sae_loaded_as_relu_is_found_out(sae_lens, tmp_path):
    saved(sae_lens, tmp_path, architecture="Standard")
    described = json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))
    described["activation_fn_kwargs"] = {"k": K}
    (tmp_path / "cfg.json").write_text(json.dumps(described), encoding="utf-8")
    sae = local(tmp_path)
    assert sae.architecture == "standard" and sae.nominal_l0 == K
    measured = float((sae.encode(inputs()) != 0).sum(1).float().mean())
    with pytest.raises(UserError, match="nominal L0 is 5: wrong activation function"):
        check_l0(sae, measured)


def test_what_training_aimed_at_is_nominal(sae_lens, tmp_path):
    """SAELens saves a BatchTopK SAE as JumpReLU and keeps its k in the metadata."""
    saved(sae_lens, tmp_path, architecture="JumpReLU")
    described = json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))
    described["metadata"]["training_architecture_details"] = {"k": 33}
    (tmp_path / "cfg.json").write_text(json.dumps(described), encoding="utf-8")
    assert local(tmp_path).nominal_l0 == 33


def test_our_own_folder(tmp_path):
    TopKSAE.initialise(D, LATENTS, K, init_seed=0).save(tmp_path)
    Statistics(torch.zeros(D), torch.ones(D)).save(tmp_path / "normalisation.safetensors")
    assert local(tmp_path).nominal_l0 == K
    assert local(tmp_path, nominal_l0=7.5).nominal_l0 == 7.5
    assert local(tmp_path).name == tmp_path.name
    assert local(tmp_path, name="mine").name == "mine"
    (tmp_path / "place.json").write_text('{"site": "resid_post", "layer": 2}')
    sae = local(tmp_path)
    assert (sae.site, sae.layer) == ("resid_post", 2)
    check_fits(sae, "m", d_model=D, site="resid_post", layer=2)
    with pytest.raises(UserError, match=r"layer: 5, but .* was trained at layer 2"):
        check_fits(sae, "m", d_model=D, site="resid_post", layer=5)
    with pytest.raises(UserError, match=r"models.site: 'mlp_out', but .* at 'resid_post'"):
        check_fits(sae, "m", d_model=D, site="mlp_out", layer=2)
    (tmp_path / "place.json").write_text("{")
    with pytest.raises(UserError, match=r"place.json cannot be read"):
        local(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "fold the factor into its weights"),
        (
            {"hook": "blocks.3.attn.hook_z"},
            r"trained at 'blocks.3.attn.hook_z'; SAEs of resid_post",
        ),
        ({"hook": "blocks.0.hook_resid_pre"}, r"trained at 'blocks.0.hook_resid_pre'"),
        (
            {"architecture": "Transcoder", "d_out": D, "apply_b_dec_to_input": False},
            "'transcoder', which does not rebuild",
        ),
    ],
)
def test_what_cannot_stand_in_for_a_site_is_refused(sae_lens, tmp_path, options, message):
    saved(sae_lens, tmp_path, **options)
    with pytest.raises(UserError, match=message):
        local(tmp_path)


def test_wrong_names_are_told_with_the_nearest(sae_lens, hub_cache):
    def loading(release, sae_id):
        load_given_sae(PretrainedSaeConfig(layer=12, release=release, sae_id=sae_id))

    with pytest.raises(UserError, match=r"release: 'gemma-scope-2b-res-canonical' .* mean 'gemma-"):
        loading("gemma-scope-2b-res-canonical", "x")
    with pytest.raises(UserError, match=r"sae_id: 'layer_12/width_16k/canon' .*16k/canonical'\?"):
        loading(GEMMA_2["release"], "layer_12/width_16k/canon")
    with pytest.raises(UserError, match=r"not in the local cache and the hub cannot be reached"):
        loading(**GEMMA_3)
    with pytest.raises(UserError, match=r"not in the local cache and the hub cannot be reached"):
        loading("someone/else", "layer_3")


def test_wrong_folders_are_told(sae_lens, tmp_path):
    with pytest.raises(UserError, match=r"folder: .* holds neither sae.json .* nor cfg.json"):
        local(tmp_path)
    saved(sae_lens, tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded by SAELens"):
        local(tmp_path)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"pip install 'prunelens\[saelens\]'"):
        load_given_sae(PretrainedSaeConfig(layer=12, **GEMMA_2))


def test_an_sae_of_others_on_a_model(hub_cache, sae_lens, checkpoint_folder, tmp_path):
    """From its name to verdicts; its layer is read off its files."""
    from prunelens.study.single import transfer_sae

    folder = hub_cache("google/gemma-scope-2-1b-pt", "resid_post_all/layer_1_width_16k_l0_small")
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=1)
    p = {"w_enc": rows.T.contiguous(), "w_dec": rows, "b_enc": torch.zeros(60)}
    p |= {"b_dec": torch.zeros(16), "threshold": torch.full((60,), 0.7)}
    save_file(p, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = torch.randint(1, 100, (60, 16), generator=generator)
    save_file({"tokens": ids}, tmp_path / "ids.safetensors")
    corpus = CorpusConfig(
        source="tokens",
        paths=(str(tmp_path / "ids.safetensors"),),
        context_tokens=16,
        train_tokens=160,
        eval_tokens=160,
        calibration_tokens=160,
    )
    model = ModelConfig(name=str(checkpoint_folder))
    pruning = PruningConfig(criterion="magnitude", scope="global", sparsity=0.2)
    options = {"layer": None, "pruning": pruning, "device": "cpu"}
    name = "gemma-scope-2-1b-pt-res-all:layer_1_width_16k_l0_small"
    found = transfer_sae(name, model, corpus, **options)
    assert found["condition"].unique().tolist() == ["dense", "magnitude-global-0.20"]
    assert found["refit"].value_counts().to_dict() == {"none": 6, "b_dec": 6, "threshold": 6}
    assert found["nominal_l0"].unique().tolist() == [11]
    with pytest.raises(UserError, match=r"pretrained.layer: 2, but .* trained at layer 1"):
        transfer_sae(name, model, corpus, **(options | {"layer": 2}))
    p["threshold"] = torch.zeros(60)  # as good as ReLU
    save_file(p, folder / "params.safetensors")
    with pytest.raises(UserError, match=r"nominal L0 is 11: wrong activation function"):
        transfer_sae(name, model, corpus, **options)
