"""SAEs between prunelens, SAELens and sparsify: those libraries' own code computes the other side.

Errors are relative to a scale that is told in each test: `latent_scale` is the root mean square of
the active latents; reconstructions are judged per dimension, against the spread (sigma) of the
activations in it or, where the mean is far larger, against their root mean square.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from independent import interchange
from prunelens.activations import Activations, Statistics, capture, statistics
from prunelens.cli import main
from prunelens.config import ActivationConfig, PretrainedSaeConfig, SaeConfig
from prunelens.errors import UserError
from prunelens.model import load_model
from prunelens.sae.exchange.export import export_format, export_sae
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.sae.exchange.sparsify import hookpoint
from prunelens.sae.topk import TopKSAE
from prunelens.sae.train import train_sae

# What SAELens says of each SAE that names how to load its model, its own included.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained")

D, LATENTS, K, TOKENS = 24, 120, 6, 400
LIBRARIES = ("saelens", "sparsify")
CLOSE = 1e-5


class World(NamedTuple):
    folder: object
    sae: TopKSAE
    mean: torch.Tensor
    sigma: torch.Tensor
    x: torch.Tensor

    @property
    def weights(self):
        return [weight.detach().double().numpy() for weight in self.sae.weights]

    @property
    def normalisation(self):
        return self.mean.double().numpy(), self.sigma.double().numpy()


def own_world(folder, *, offset=3.0, seed=0, place=("resid_post", 3)):
    """An SAE as after training, under a strong normalisation, and activations to match.

    Deviations span 1e-2 to 1e2; means are about `offset` deviations from 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    sae = TopKSAE.initialise(D, LATENTS, K, init_seed=seed)
    with torch.no_grad():
        sae.encoder_weight.copy_(0.8 * sae.decoder_weight + 0.3 * draw(LATENTS, D) / D**0.5)
        sae.encoder_bias.copy_(-1.3 + 0.2 * draw(LATENTS))
        sae.decoder_bias.copy_(0.3 * draw(D))
    sigma = 10 ** (4 * torch.rand(D, generator=generator) - 2)
    mean = offset * sigma * draw(D)
    sae.save(folder)
    Statistics(mean, sigma).save(folder / "normalisation.safetensors")
    if place:
        text = json.dumps({"site": place[0], "layer": place[1]})
        (folder / "place.json").write_text(text, encoding="utf-8")
    return World(folder, sae, mean, sigma, mean + sigma * draw(TOKENS, D))


def loaded(folder, **options):
    return load_given_sae(PretrainedSaeConfig(layer=3, folder=str(folder), **options))


def theirs(library, folder, x, request):
    """(z, x_rec) by the library's own code, from the library's own loading."""
    module = request.getfixturevalue({"saelens": "sae_lens"}.get(library, library))
    with torch.no_grad():
        if library == "saelens":
            sae = module.SAE.load_from_disk(folder)
            z = sae.encode(x)
            return z, sae.decode(z)
        sae = module.Sae.load_from_disk(folder)
        found = sae.encode(x)
        z = torch.zeros(len(x), sae.num_latents).scatter(1, found.top_indices, found.top_acts)
        return z, sae.decode(found.top_acts, found.top_indices)


def latent_scale(z):
    return float(z[z > 0].square().mean().sqrt())


def assert_same_latents(z, expected, world, *, ties=range(1)):
    """`assert_latents`, with the ties of a world's own SAE."""
    w_enc, b_enc, *_ = world.weights
    x, k = world.x.double().numpy(), world.sae.k
    gaps = interchange.gaps(x, *world.normalisation, w_enc, b_enc, k)
    return assert_latents(z, expected, gaps, ties=ties)


def assert_latents(z, expected, gaps, *, ties=range(1)):
    """Equal to 1e-5 of the scale on every token whose k-th latent is not nearly tied. On one that
    is either latent may win, with the same value.

    `gaps` tell by how much the k-th pre-activation is ahead of the next, `ties` how many tokens may
    be nearly tied. Gives the tokens that are not.
    """
    scale = latent_scale(expected)
    tied = torch.from_numpy(gaps <= 2 * CLOSE * scale)
    assert int(tied.sum()) in ties
    assert float((z - expected)[~tied].abs().max()) <= CLOSE * scale
    assert float((z.sort(1).values - expected.sort(1).values).abs().max()) <= CLOSE * scale
    return ~tied


# ---- ours to theirs ----


@pytest.mark.parametrize("library", LIBRARIES)
def test_exported_files_mean_the_same_by_definition(library, tmp_path):
    """In float64, without the library: what is left is the rounding of the stored weights."""
    world = own_world(tmp_path / "own", offset=10.0)
    export_sae(world.folder, tmp_path / "out", format=library)
    x = world.x[:60].double().numpy()
    z, x_rec = interchange.exported_forward(
        x, *interchange.read_exported(tmp_path / "out", library)
    )
    expected_z, expected = interchange.own_forward(x, *world.normalisation, *world.weights, K)
    assert ((z > 0) == (expected_z > 0)).all()
    assert np.abs(z - expected_z).max() <= 1e-6
    assert np.abs((x_rec - expected) / world.normalisation[1]).max() <= 3e-6


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("library", LIBRARIES)
def test_their_library_computes_what_ours_does(library, offset, tmp_path, request):
    """Latents, and reconstructions against sigma, dimension by dimension."""
    world = own_world(tmp_path / "own", offset=offset)
    export_sae(world.folder, tmp_path / "out", format=library)
    ours = loaded(world.folder)
    expected = ours.encode(world.x)
    z, x_rec = theirs(library, tmp_path / "out", world.x, request)
    kept = assert_same_latents(z, expected, world)
    assert 0 < int((z > 0).sum()) < TOKENS * K  # the ReLU matters too
    error = ((x_rec - ours.decode(expected)) / world.sigma)[kept]
    assert float(error.abs().max()) <= CLOSE


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mean_of_thousands_of_deviations_costs_no_latent(library, tmp_path, request):
    """Their latents stay exact. Reconstructions do against the activations' size: float32 itself
    holds a number near the mean to no more than mean / sigma * 6e-8 of sigma, ours as theirs."""
    world = own_world(tmp_path / "own", offset=3000.0)
    export_sae(world.folder, tmp_path / "out", format=library)
    ours = loaded(world.folder)
    expected = ours.encode(world.x)
    z, x_rec = theirs(library, tmp_path / "out", world.x, request)
    kept = assert_same_latents(z, expected, world)
    size = world.x.square().mean(0).sqrt()
    assert float(((x_rec - ours.decode(expected)) / size)[kept].abs().max()) <= CLOSE
    assert float(((x_rec - ours.decode(expected)) / world.sigma)[kept].abs().max()) > CLOSE


@pytest.mark.parametrize("library", LIBRARIES)
def test_where_latents_are_nearly_tied_either_may_win(library, tmp_path, request):
    """Each latent has a twin 1e-7 away: many k-th places are tied, no other token differs."""
    world = own_world(tmp_path / "own")
    with torch.no_grad():
        half = LATENTS // 2
        noise = torch.randn(half, D, generator=torch.Generator().manual_seed(1))
        world.sae.encoder_weight[half:] = world.sae.encoder_weight[:half] + 1e-7 * noise
        world.sae.encoder_bias[half:] = world.sae.encoder_bias[:half] = -0.9
        world.sae.encoder_bias[0] = 0.5  # with its twin not: so that pairs straddle the k-th place
    world.sae.save(world.folder)
    export_sae(world.folder, tmp_path / "out", format=library)
    expected = loaded(world.folder).encode(world.x)
    z, _ = theirs(library, tmp_path / "out", world.x, request)
    assert_same_latents(z, expected, world, ties=range(TOKENS // 10, TOKENS))


@pytest.fixture(scope="module")
def real_world(tmp_path_factory):
    """An SAE that was trained on what the bundled model does, and those activations as captured."""
    folder = tmp_path_factory.mktemp("real")
    lm = load_model("bundled")
    text = pathlib.Path(argparse.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor(lm.tokenizer(text)["input_ids"][: 32 * 100]).view(32, 100)
    store, place = folder / "activations.safetensors", {"site": "resid_post", "layer": 2}
    capture(lm, tokens, store, **place, config=ActivationConfig())
    raw = Activations(store)
    normalisation = statistics(raw, num_tokens=raw.num_tokens)
    config = SaeConfig(expansion=4, k=16, steps=60, batch_tokens=512, learning_rate=2e-3)
    data = Activations(store, statistics=normalisation)
    trained = train_sae(data, config, init_seed=0, data_seed=0)
    assert trained.log[-1].fvu < 0.7 * trained.log[0].fvu
    trained.sae.save(folder / "own")
    normalisation.save(folder / "own" / "normalisation.safetensors")
    (folder / "own" / "place.json").write_text(json.dumps(place), encoding="utf-8")
    x = raw.raw_rows(torch.arange(raw.num_tokens))
    return World(folder / "own", trained.sae, *normalisation, x)


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_sae_trained_on_a_real_model_means_the_same_to_them(
    library, real_world, tmp_path, request
):
    out = tmp_path / "layers.2"
    export_sae(real_world.folder, out, format=library, model="bundled")
    ours = loaded(real_world.folder)
    expected = ours.encode(real_world.x)
    z, x_rec = theirs(library, out, real_world.x, request)
    # 8 of 3,168 tokens were nearly tied, and 1 of them differed; the text is this Python's.
    kept = assert_same_latents(z, expected, real_world, ties=range(len(z) // 200))
    error = (x_rec - ours.decode(expected)) / real_world.sigma
    assert float(error[kept].abs().max()) <= CLOSE


def test_what_saelens_reads_of_an_exported_sae(sae_lens, tmp_path):
    world = own_world(tmp_path / "own", place=("mlp_out", 7))
    told = export_sae(world.folder, tmp_path / "out", format="saelens", model="gpt2")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert told == (tmp_path / "out", "saelens", "blocks.7.hook_mlp_out")
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name) == (told.hook, "gpt2")
    assert (sae.cfg.architecture(), sae.cfg.k, sae.cfg.dtype) == ("topk", K, "float32")
    stored = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert torch.equal(sae.W_dec, stored["W_dec"])  # nothing was scaled to unit norm
    assert float(sae.W_dec.detach().norm(dim=1).max()) > 2
    assert export_sae(world.folder, tmp_path / "again", format="saelens").hook == told.hook


def test_what_sparsify_reads_of_an_exported_sae(sparsify, tmp_path, capsys):
    world = own_world(tmp_path / "own")
    told = export_sae(world.folder, tmp_path / "run" / "layers.3", format="sparsify", model="gpt2")
    assert told == (tmp_path / "run" / "layers.3", "sparsify", "layers.3")
    capsys.readouterr()
    (name, sae), *others = sparsify.Sae.load_many(str(tmp_path / "run"), local=True).items()
    assert (name, others) == ("layers.3", [])
    assert capsys.readouterr().out == ""  # it would tell of fields that it does not know
    assert (sae.d_in, sae.num_latents, sae.cfg.k) == (D, LATENTS, K)
    stored = load_file(tmp_path / "run" / "layers.3" / "sae.safetensors")
    assert torch.equal(sae.W_dec, stored["W_dec"]) and not sae.cfg.normalize_decoder
    sae.save_to_disk(tmp_path / "saved")  # its own files have the same names, tensors and fields
    again = load_file(tmp_path / "saved" / "sae.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    fields = [json.loads((f / "cfg.json").read_text()) for f in (tmp_path / "saved", told.folder)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_exported_files_hold_tensors_and_json_alone(library, tmp_path):
    world = own_world(tmp_path / "own")
    export_sae(world.folder, tmp_path / "out", format=library)
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert path.suffix == ".safetensors"
            assert {t.dtype for t in load_file(path).values()} == {torch.float32}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own"]  # nothing left beside it


@pytest.mark.parametrize("library", LIBRARIES)
def test_exported_files_are_on_disk_before_they_get_their_name(library, tmp_path, monkeypatch):
    """Each file and the folder that lists them, by inode, while `out` is not there."""
    world, flushed = own_world(tmp_path / "own"), set()
    real_fsync = os.fsync

    def fsync(handle):
        assert not (tmp_path / "out").exists()
        flushed.add(os.fstat(handle).st_ino)
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    export_sae(world.folder, tmp_path / "out", format=library)
    written = [tmp_path / "out", *(tmp_path / "out").iterdir()]
    assert flushed >= {path.stat().st_ino for path in written}


# ---- theirs to ours ----


@pytest.fixture
def seeded():
    """Their SAEs start at random, from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_an_sae_that_saelens_made(sae_lens, tmp_path, centred, rescale):
    generator = torch.Generator().manual_seed(5)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    options = {"apply_b_dec_to_input": centred, "rescale_acts_by_decoder_norm": rescale}
    config = sae_lens.TopKSAEConfig(d_in=D, d_sae=LATENTS, k=K, metadata=metadata, **options)
    sae = sae_lens.TopKSAE(config)
    x = disturb(sae, generator)
    sae.save_model(tmp_path / "sae")
    with torch.no_grad():
        norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(LATENTS)
        start = sae.b_dec if centred else torch.zeros(D)
        gaps = gaps_of(x, start, sae.W_enc.T * norms[:, None], sae.b_enc * norms)
        assert_imported(loaded(tmp_path / "sae"), x, sae.encode(x), sae(x), gaps)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_sae_that_sparsify_made(sparsify, tmp_path, dtype, multi):
    """Half-precision files are used in float32, as the library does after `.float()`."""
    generator = torch.Generator().manual_seed(6)
    config = sparsify.SparseCoderConfig(expansion_factor=LATENTS // D, k=K, multi_topk=multi)
    sae = sparsify.SparseCoder(D, config, dtype=dtype)
    x = disturb(sae, generator)
    sae.save_to_disk(tmp_path / "layers.3")
    sae.float()
    with torch.no_grad():
        found = sae.encode(x)
        z = torch.zeros(len(x), LATENTS).scatter(1, found.top_indices, found.top_acts)
        x_rec = sae.decode(found.top_acts, found.top_indices)
        gaps = gaps_of(x, sae.b_dec, sae.encoder.weight, sae.encoder.bias)
        assert_imported(loaded(tmp_path / "layers.3"), x, z, x_rec, gaps)
        assert torch.equal(sae(x).sae_out, x_rec) != multi  # then its forward takes 4 k latents


def disturb(module, generator):
    """Give every parameter of their SAE a value that matters; returns inputs far from 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * 0.3)
    return 4 + 3 * torch.randn(TOKENS, D, generator=generator)


def gaps_of(x, start, w_enc, b_enc):
    """`interchange.gaps` of their SAE, which takes `start` off its input."""
    x, start, w_enc, b_enc = (part.double().numpy() for part in (x, start, w_enc, b_enc))
    return interchange.gaps(x, start, np.ones(D), w_enc, b_enc, K)


def assert_imported(sae, x, z, x_rec, gaps):
    ours = sae.encode(x)
    same = assert_latents(ours, z, gaps)
    error = (sae.decode(ours) - x_rec)[same]
    assert float(error.abs().max()) <= CLOSE * float(x_rec.square().mean().sqrt())
    assert (sae.architecture, sae.d_model, sae.num_latents) == ("topk", D, LATENTS)
    assert (sae.nominal_l0, sae.site, sae.layer, sae.threshold) == (K, "resid_post", 3, None)


@pytest.mark.parametrize("library", LIBRARIES)
def test_there_and_back_again(library, tmp_path, request):
    """Latents, reconstructions, place and L0 survive a round trip through a library's files."""
    if library == "saelens":
        request.getfixturevalue("sae_lens")
    world = own_world(tmp_path / "own", place=("attn_out", 2), offset=10.0)
    (world.folder / "quality.json").write_text('{"l0": 2.5}', encoding="utf-8")
    export_sae(world.folder, tmp_path / "out", format=library)
    ours, back = loaded(world.folder), loaded(tmp_path / "out")
    z = ours.encode(world.x)
    kept = assert_same_latents(back.encode(world.x), z, world)
    assert float(((back.decode(z) - ours.decode(z)) / world.sigma)[kept].abs().max()) <= CLOSE
    assert (back.site, back.layer, back.nominal_l0) == ("attn_out", 2, 2.5)
    shifted = back.with_decoder_shift(torch.ones(D))
    assert torch.equal(shifted.encode(world.x), back.encode(world.x))
    assert loaded(tmp_path / "out", nominal_l0=7.5, name="mine").nominal_l0 == 7.5


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_place_that_is_not_known_stays_unknown(library, tmp_path, request):
    if library == "saelens":
        request.getfixturevalue("sae_lens")
    world = own_world(tmp_path / "own", place=None)
    assert export_sae(world.folder, tmp_path / "out", format=library).hook is None
    back = loaded(tmp_path / "out")
    assert (back.site, back.layer, back.nominal_l0) == (None, None, K)
    if library == "sparsify":  # then its folder's name is all there is
        back = loaded((tmp_path / "out").rename(tmp_path / "layers.4"))
        assert (back.site, back.layer) == ("resid_post", 4)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("layers.10", (10, "")),
        ("model.layers.10", (10, "")),
        ("h.0.mlp", (0, "mlp")),
        ("run/layers.3.self_attn.o_proj/seed1", (3, "self_attn.o_proj")),
        ("embed_tokens", None),
        ("layers.x", None),
        ("mine", None),
    ],
)
def test_what_a_folders_name_says(folder, expected, tmp_path):
    found = hookpoint(tmp_path / folder)
    assert (found and found[1:]) == expected


def test_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    world = own_world(tmp_path / "own", place=None)
    (tmp_path / "layers.6").mkdir()
    monkeypatch.chdir(tmp_path / "layers.6")
    with pytest.raises(UserError, match=r"out: .* is the folder that you are in"):
        export_sae("../own", ".", format="sparsify")
    monkeypatch.chdir(tmp_path)
    assert export_sae("own", "layers.6", format="sparsify").hook == "layers.6"
    monkeypatch.chdir(tmp_path / "layers.6")
    sae = loaded(".", name="here")
    assert (sae.site, sae.layer, sae.d_model) == ("resid_post", 6, world.sae.d_model)


def test_a_module_within_a_block_gives_the_layer_alone(tmp_path):
    """Whether `mlp` is our mlp_out depends on whether the model normalises its output."""
    world = own_world(tmp_path / "own")
    export_sae(world.folder, tmp_path / "out", format="sparsify")
    (tmp_path / "out" / "place.json").unlink()
    sae = loaded((tmp_path / "out").rename(tmp_path / "layers.5.mlp"))
    assert (sae.site, sae.layer) == (None, 5)


# ---- mistakes ----


def without(name):
    return lambda folder: (folder / name).unlink()


def damaged(name):
    return lambda folder: (folder / name).write_bytes(b"no such thing")


def statistics_of(mean, sigma):
    return lambda folder: Statistics(mean, sigma).save(folder / "normalisation.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("normalisation.safetensors"), r"lacks normalisation.safetensors"),
        (
            without("sae.safetensors"),
            r"lacks sae.safetensors; give a folder that TopKSAE.save wrote",
        ),
        (damaged("normalisation.safetensors"), r"normalisation.safetensors cannot be read"),
        (damaged("sae.safetensors"), r"is damaged or incomplete"),
        (damaged("place.json"), r"place.json cannot be read"),
        (statistics_of(torch.zeros(5), torch.ones(5)), r"is of width 5, its SAE of 24"),
        (
            statistics_of(torch.zeros(D), torch.zeros(D)),
            r"no number in float32 .*sigma from 0 to 0",
        ),
        (
            lambda folder: (folder / "meta.json").write_text('{"config": {"rotated": true}}'),
            r"control in a rotated space",
        ),
    ],
)
def test_what_cannot_be_exported_is_told_and_leaves_nothing(spoil, message, tmp_path):
    world = own_world(tmp_path / "own")
    spoil(world.folder)
    with pytest.raises(UserError, match=message) as told:
        export_sae(world.folder, tmp_path / "out", format="sparsify")
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_where_and_how_to_export_is_checked(tmp_path):
    world = own_world(tmp_path / "own")
    with pytest.raises(UserError, match=r"--format: 'gguf' is neither saelens nor sparsify"):
        export_format("gguf")
    with pytest.raises(UserError, match=r"out: .* exists and is not an empty folder"):
        export_sae(world.folder, world.folder, format="saelens")
    for name in ("layers.4", "layers.3.mlp"):
        with pytest.raises(UserError, match=rf"out: '{name}' is another place than resid_post"):
            export_sae(world.folder, tmp_path / name, format="sparsify")
    export_sae(world.folder, tmp_path / "layers.4", format="saelens")  # to SAELens just a name
    (tmp_path / "empty").mkdir()
    assert export_sae(world.folder, tmp_path / "empty", format="sparsify").hook is None


@pytest.mark.parametrize(
    ("site", "fitting", "wrong"),
    [
        ("resid_post", ["layers.3", "h.3"], ["layers.3.mlp", "layers.3.attn", "layers.3.other"]),
        (
            "mlp_out",
            ["h.3.mlp", "layers.3.mlp.down_proj", "layers.3.post_feedforward_layernorm"],
            ["layers.3", "layers.3.self_attn", "h.3.attn", "h.3.attn.c_proj", "layers.4.mlp"],
        ),
        (
            "attn_out",
            ["layers.3.self_attn", "h.3.attn", "layers.3.self_attn.o_proj", "layers.3.mixer"],
            ["layers.3", "layers.3.mlp", "h.3.mlp.c_proj", "layers.4.self_attn"],
        ),
    ],
)
def test_an_export_to_sparsify_is_named_after_its_own_place(site, fitting, wrong, tmp_path):
    """A module that is not known may be any place within its block."""
    world = own_world(tmp_path / "own", place=(site, 3))
    for name in fitting:
        assert export_sae(world.folder, tmp_path / name, format="sparsify").hook == name
    for name in wrong:
        with pytest.raises(UserError, match=rf"out: '{name}' is another place than {site}") as told:
            export_sae(world.folder, tmp_path / name, format="sparsify")
        assert "\n" not in str(told.value) and not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": True}, r"'?out'? is a transcoder"),
        ({"skip_connection": True}, r"a skip connection"),
        ({"signed": True}, r"keeps negative latents"),
        ({"activation": "groupmax"}, r"an SAE with activation 'groupmax'"),
        ({"k": LATENTS + 1}, r"has k 121 and only 120 latents"),
        ({"k": "many"}, r"cfg.json is no file of a sparsify SAE \(k: "),
        ({"d_in": None}, r"cfg.json is no file of a sparsify SAE \(d_in: "),
        ({"num_latents": 0, "expansion_factor": 4}, r"speaks of W_dec \[96, 24\]"),
    ],
)
def test_sparsify_saes_that_cannot_be_used_are_told(change, message, tmp_path):
    folder = exported(tmp_path)
    described = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    (folder / "cfg.json").write_text(json.dumps(described | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        loaded(folder)


def test_damaged_sparsify_files_are_told(tmp_path):
    folder = exported(tmp_path)
    (folder / "place.json").write_text('{"layer": -1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"place.json is no file .*layer: "):
        loaded(folder)
    tensors = load_file(folder / "sae.safetensors")
    save_file(tensors | {"W_skip": torch.eye(D)}, folder / "sae.safetensors")
    with pytest.raises(UserError, match=r"holds .*W_skip \[24, 24\]"):
        loaded(folder)
    (folder / "sae.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"sae.safetensors is no file of a sparsify SAE"):
        loaded(folder)
    (folder / "cfg.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"cfg.json is no file of a sparsify SAE"):
        loaded(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"nor cfg.json and sae.safetensors \(sparsify\)"):
        loaded(folder)


def exported(tmp_path):
    world = own_world(tmp_path / "own")
    return export_sae(world.folder, tmp_path / "out", format="sparsify").folder


def test_the_command(tmp_path, monkeypatch, capsys):
    world = own_world(tmp_path / "own")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prunelens", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    out = tmp_path / "out"
    to_saelens = (world.folder, "--out", out, "--format", "saelens", "--model", "gpt2", "--json")
    code, told = run(*to_saelens)
    assert not code, told.err
    assert json.loads(told.out) == {
        "out": str(out),
        "format": "saelens",
        "hook": "blocks.3.hook_resid_post",
    }
    assert "gpt2" in (out / "cfg.json").read_text(encoding="utf-8")
    code, told = run(world.folder, "--out", tmp_path / "layers.3", "--format", "sparsify")
    assert not code and told.out.endswith(", for layers.3\n")
    for arguments, message in (
        (to_saelens, "not an empty folder"),
        ((world.folder, "--out", tmp_path / "x", "--format", "gguf"), "--format: 'gguf'"),
        ((tmp_path / "nowhere", "--out", tmp_path / "x", "--format", "saelens"), "lacks sae.json"),
    ):
        code, told = run(*arguments)
        assert (code, told.out) == (2, "")
        assert message in told.err and len(told.err.strip().splitlines()) == 1
