"""Evidence per latent: contexts against loops over the definition, and the logit lens."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import exact_worlds
from conftest import tiny_language_model
from independent import evidence as slow
from independent.persistence import persistence as slow_persistence
from prunelens.activations import Activations, Statistics
from prunelens.analyses import window_batches
from prunelens.analyses.evidence import TokenPlaces, collect_contexts, read_contexts
from prunelens.analyses.noise import NULL_SEED, CommonChange, other_token
from prunelens.analyses.persistence import persistence
from prunelens.analyses.token_effects import token_effects, unembedding
from prunelens.config import ModelConfig, PretrainedSaeConfig
from prunelens.errors import UserError
from prunelens.model import as_language_model, logits
from prunelens.sae.exchange import formats
from prunelens.sae.exchange.formats import GivenSae, given
from prunelens.sae.kernels import dense_latents
from prunelens.sae.sparse import SparseEncoder, sparse_latents
from prunelens.sae.topk import TopKSAE
from prunelens.study.artifacts.store import Source, Stage
from prunelens.study.stages import STAGES
from prunelens.study.work import Work, write_json
from test_pretrained import local, saved

CONTEXT, SKIP = 7, 1

EVIDENCE = "prunelens.study.questions.evidence"


class Rows:
    """Rows in memory."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, index):
        return self._rows[index]


def text_world(seed, *, num_latents=23, k=5, d_model=6, num_tokens=150):
    """An SAE in exact arithmetic, and rows of which some were screened out."""
    world = exact_worlds.world(d_model, num_latents, k, num_tokens, seed=seed)
    num_rows = len(world.x_hat)
    generator = np.random.default_rng(seed)
    kept = np.flatnonzero(generator.random(num_rows * 2) < 0.6)[:num_rows]
    kept = torch.from_numpy(kept[(kept < 24) | (kept >= 42)])  # some windows have no row at all
    places = TokenPlaces.of(kept, context_tokens=CONTEXT, skip_first=SKIP)
    x, y = world.x_hat[: len(kept)], world.disturbed[: len(kept)]
    return SimpleNamespace(sae=world.sae, x=x, y=y, places=places)


def activations_of(sae, x):
    return dense_latents(sae.encode_sparse(x), sae.num_latents).detach().numpy()


def slow_contexts(z, places, *, top, samples, either_side, seed):
    """The rows of the table, latent by latent."""
    where = list(zip(places.window.tolist(), places.position.tolist(), strict=True))
    tokens = places.context_tokens
    table = []
    for latent, series in enumerate(z.T.tolist()):
        activations = dict(zip(where, series, strict=True))
        fires = [(*place, value) for place, value in activations.items() if value > 0]

        def chance(window, position, latent=latent):
            return slow.priority(seed, latent, window * tokens + position)

        best = [(math.nan, math.nan, fire) for fire in slow.strongest(fires, top)]
        drawn = slow.sample(fires, samples, chance)
        for kind, found in (("top", best), ("sample", drawn)):
            for rank, (low, high, (window, position, value)) in enumerate(found):
                near = slow.around(activations, window, position, tokens, either_side)
                row = (latent, kind, rank, float(low), float(high), window, position, value, near)
                table.append(row)
    return table


def assert_same_table(contexts, expected):
    assert len(contexts) == len(expected) > 0
    for found, row in zip(contexts.itertuples(index=False), expected, strict=True):
        np.testing.assert_array_equal(found.activations, row[-1])
        assert all(a == b or (a != a and b != b) for a, b in zip(found[:-1], row[:-1], strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_contexts_are_those_of_the_definition(seed):
    world = text_world(seed)
    options = {"top": 4, "samples": (1, 3, 4)[seed % 3], "either_side": seed, "seed": seed}
    found = collect_contexts(world.sae, Rows(world.x), world.places, **options)
    z = activations_of(world.sae, world.x)
    assert_same_table(found.contexts, slow_contexts(z, world.places, **options))
    fires = (z > 0).sum(0)
    assert (fires == 0).any()
    np.testing.assert_array_equal(found.latents["latent"], np.arange(len(fires)))
    np.testing.assert_allclose(found.latents["firing_rate"], fires / len(z))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.latents["mean_activation"], z.sum(0) / fires, rtol=1e-6)


@pytest.mark.parametrize(("batch", "numbers"), [(1, 1), (3 * CONTEXT, 500), (40, 2**24)])
def test_batches_change_nothing(batch, numbers, monkeypatch):
    world = text_world(1)
    whole = collect_contexts(world.sae, Rows(world.x), world.places)
    read = read_contexts(world.sae, Rows(world.y), world.places, whole.contexts)
    monkeypatch.setattr(window_batches, "BATCH_TOKENS", batch)
    monkeypatch.setattr(window_batches, "NUMBERS_AT_ONCE", numbers)
    done = []
    parts = collect_contexts(world.sae, Rows(world.x), world.places, progress=done.append)
    pd.testing.assert_frame_equal(parts.contexts, whole.contexts)
    pd.testing.assert_frame_equal(parts.latents, whole.latents)
    assert done == sorted(set(done)) and done[-1] == len(world.x)
    again = read_contexts(world.sae, Rows(world.y), world.places, whole.contexts)
    np.testing.assert_array_equal(again, read)


def test_columns_survive_parquet(tmp_path):
    world = text_world(2)
    contexts = collect_contexts(world.sae, Rows(world.x), world.places).contexts
    assert list(contexts.columns) == [
        *("latent", "kind", "rank", "low", "high", "window", "position", "activation"),
        "activations",
    ]
    contexts.to_parquet(tmp_path / "contexts.parquet")
    back = pd.read_parquet(tmp_path / "contexts.parquet")
    np.testing.assert_array_equal(np.stack(back["activations"]), np.stack(contexts["activations"]))
    assert back["activations"][0].dtype == np.float32
    read = read_contexts(world.sae, Rows(world.x), world.places, back)
    np.testing.assert_array_equal(read, np.stack(contexts["activations"]))


def test_the_same_places_under_other_activations():
    world = text_world(3)
    contexts = collect_contexts(world.sae, Rows(world.x), world.places, either_side=4).contexts
    shuffled = contexts.sample(frac=1, random_state=0)
    read = read_contexts(world.sae, Rows(world.y), world.places, shuffled, either_side=4)
    assert read.dtype == np.float32 and read.shape == (len(contexts), 9)
    z = activations_of(world.sae, world.y)
    where = list(zip(world.places.window.tolist(), world.places.position.tolist(), strict=True))
    for row, found in zip(shuffled.itertuples(), read, strict=True):
        series = dict(zip(where, z[:, row.latent].tolist(), strict=True))
        expected = slow.around(series, row.window, row.position, CONTEXT, 4)
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(read, np.stack(shuffled["activations"]), equal_nan=True)


def one_latent_per_column(num_latents):
    """z = relu(x): what fires where is written down."""
    sae = TopKSAE(num_latents, num_latents, num_latents)
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.eye(num_latents))
    return sae


def test_a_context_by_hand():
    """Three windows of four tokens, the first of each skipped; the last row of window 1 screened.

    1 fires at the end of window 0 and at the start of window 1: neither sees the other.
    """
    x = torch.tensor([[0.0], [0.5], [8.0], [3.0], [-1.0], [8.0], [8.0], [2.0]])
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])
    places = TokenPlaces.of(kept, context_tokens=4, skip_first=1)
    assert places.window.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert places.position.tolist() == [1, 2, 3, 1, 2, 1, 2, 3]
    sae = one_latent_per_column(1)
    contexts = collect_contexts(sae, Rows(x), places, top=2, samples=1, either_side=2).contexts
    nan = math.nan
    top = contexts[contexts["kind"] == "top"]
    assert top[["window", "position", "activation"]].values.tolist() == [[0, 3, 8], [2, 1, 8]]
    np.testing.assert_array_equal(
        np.stack(top["activations"]), [[0, 0.5, 8, nan, nan], [nan, nan, 8, 8, 2]]
    )
    sample = contexts[contexts["kind"] == "sample"]
    assert sample[["rank", "low", "high"]].values.tolist() == [[0, 0, 4], [1, 4, 8]]
    assert sample["activation"].tolist()[1] == 8
    assert sample["activation"].tolist()[0] in (0.5, 3, 2)


def test_what_is_drawn_from_a_bin_is_uniform():
    """5,000 latents that fire alike draw each of 20 tokens equally often, and a token that fires
    alone in its bin always."""
    x = torch.full((21, 5000), 3.0) + torch.arange(21)[:, None] / 128
    x[20] = 8.0
    sae = one_latent_per_column(5000)
    sae.k = 5000
    places = TokenPlaces.of(torch.arange(21), context_tokens=3, skip_first=0)
    options = {"top": 1, "samples": 2, "either_side": 0}
    first, second = (
        collect_contexts(sae, Rows(x), places, seed=seed, **options).contexts for seed in (0, 1)
    )
    drawn = first[first["kind"] == "sample"]
    token = (3 * drawn["window"] + drawn["position"]).to_numpy().reshape(5000, 2)
    assert (token[:, 1] == 20).all()
    counts = np.bincount(token[:, 0], minlength=21)[:20]
    chi_square = ((counts - 250) ** 2 / 250).sum()
    assert 5 < chi_square < 44  # of 19 degrees of freedom: all but a thousandth
    assert (first["window"] != second["window"]).mean() > 0.2


def test_a_growing_range_keeps_a_uniform_sample():
    """Ever larger activations: bins merge again and again, and no token is preferred for it."""
    x = (torch.arange(1, 33) / 32)[:, None].expand(32, 2000).contiguous()
    x = torch.cat([x, torch.full((1, 2000), 64.0)])
    places = TokenPlaces.of(torch.arange(33), context_tokens=1, skip_first=0)
    found = collect_contexts(
        one_latent_per_column(2000), Rows(x), places, top=1, samples=1, either_side=0
    ).contexts
    drawn = found[(found["kind"] == "sample") & (found["rank"] == 0)]
    assert (drawn["high"] == 32).all()
    counts = np.bincount(drawn["window"], minlength=33)[:32]
    assert 10 < ((counts - 62.5) ** 2 / 62.5).sum() < 62


def test_latents_that_never_fire_and_rows_that_are_not_there():
    sae = one_latent_per_column(3)
    x = torch.tensor([[0.0, -1.0, 2.0]])
    one = TokenPlaces.of(torch.tensor([0]), context_tokens=2, skip_first=0)
    found = collect_contexts(sae, Rows(x), one)
    assert set(found.contexts["latent"]) == {2}
    assert found.latents["firing_rate"].tolist() == [0, 0, 1]
    assert found.latents["mean_activation"].isna().tolist() == [True, True, False]
    none = TokenPlaces.of(torch.arange(0), context_tokens=2, skip_first=0)
    empty = collect_contexts(sae, Rows(x[:0]), none)
    assert list(empty.contexts.columns) == list(found.contexts.columns)
    assert len(empty.contexts) == 0 and empty.latents["firing_rate"].isna().all()
    read = read_contexts(sae, Rows(x[:0]), none, found.contexts)
    assert np.isnan(read).all() and len(read) == len(found.contexts)


def test_contexts_of_another_sae_are_our_bug():
    world = text_world(0)
    contexts = collect_contexts(world.sae, Rows(world.x), world.places).contexts
    with pytest.raises(AssertionError, match="of this SAE"):
        read_contexts(one_latent_per_column(6), Rows(world.x), world.places, contexts)


# --- SAEs of others -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdCoder:
    """A JumpReLU SAE, or one that keeps what is far from 0 on either side."""

    w_enc: torch.Tensor
    w_dec: torch.Tensor
    threshold: torch.Tensor
    signed: bool = False

    def encode(self, x, threshold_scale):
        pre = x @ self.w_enc
        size = pre.abs() if self.signed else pre
        return torch.where(size > threshold_scale * self.threshold, pre, 0.0)

    def decode(self, latents):
        return latents @ self.w_dec + 1

    def directions(self):
        return self.w_dec


def threshold_sae(*, num_latents=23, signed=False):
    generator = np.random.default_rng(5)
    w_enc = exact_worlds.on_grid(generator, (6, num_latents), 1, 16)
    threshold = exact_worlds.on_grid(generator, (num_latents,), 2, 16).abs() + 1
    coder = ThresholdCoder(w_enc, w_enc.T.contiguous(), threshold, signed)
    return GivenSae("t", "jumprelu", 6, num_latents, math.nan, coder, torch.device("cpu"))


@pytest.mark.parametrize("numbers", [1, 300, 2**24])
@pytest.mark.parametrize("signed", [False, True])
def test_sparse_latents_are_the_dense_ones(signed, numbers, monkeypatch):
    monkeypatch.setattr(formats, "_DENSE_NUMBERS", numbers)
    sae, x = threshold_sae(signed=signed), text_world(0).x
    x[3] = 0  # a token without any latent
    z = sae.encode(x)
    assert bool((z < 0).any()) == signed
    found = sae.encode_sparse(x)
    assert found.values.shape[1] == int((z != 0).sum(1).max())
    assert torch.equal(dense_latents(found, sae.num_latents), z)
    ordered = found.indices.sort(dim=1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())  # no latent twice


def test_sparse_latents_of_nothing_and_of_all():
    nothing = sparse_latents([torch.zeros(2, 4), torch.zeros(1, 4)])
    assert nothing.values.tolist() == [[0]] * 3
    every = sparse_latents([torch.zeros(1, 4), torch.ones(1, 4)])
    assert every.values.tolist() == [[0] * 4, [1] * 4]
    assert every.indices.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 2


def test_contexts_of_an_sae_with_any_number_of_latents_per_token():
    sae, world = threshold_sae(signed=True), text_world(4)
    options = {"top": 3, "samples": 2, "either_side": 2, "seed": 9}
    found = collect_contexts(sae, Rows(world.x), world.places, **options)
    z = sae.encode(world.x).clamp_min(0).numpy()  # below 0 a latent does not fire
    assert_same_table(found.contexts, slow_contexts(z, world.places, **options))


def raw_world(seed):
    """A world in raw space: a normalisation in which nothing is rounded."""
    world = text_world(seed)
    generator = np.random.default_rng(seed)
    sigma = torch.from_numpy(2.0 ** generator.integers(-1, 2, 6)).float()
    mean = exact_worlds.on_grid(generator, (6,), 2, 16)
    wrapped = given(world.sae, Statistics(mean, sigma), name="own")
    return world, wrapped, world.x * sigma + mean, world.y * sigma + mean


def test_our_sae_in_raw_space_has_the_same_contexts(tmp_path):
    world, wrapped, x, y = raw_world(0)
    assert isinstance(wrapped, SparseEncoder) and isinstance(world.sae, SparseEncoder)
    own = collect_contexts(world.sae, Rows(world.x), world.places)
    raw = collect_contexts(wrapped, Rows(x), world.places)
    pd.testing.assert_frame_equal(raw.contexts, own.contexts)
    pd.testing.assert_frame_equal(raw.latents, own.latents)
    np.testing.assert_array_equal(
        read_contexts(wrapped, Rows(y), world.places, own.contexts),
        read_contexts(world.sae, Rows(world.y), world.places, own.contexts),
    )
    save_file({"activations": x}, tmp_path / "store.safetensors")
    stored = Activations(tmp_path / "store.safetensors")  # without statistics: raw
    from_file = collect_contexts(wrapped, stored, world.places)
    pd.testing.assert_frame_equal(from_file.contexts, own.contexts)


def test_persistence_of_our_sae_in_raw_space_is_the_same():
    world = exact_worlds.world(6, 23, 5, 400, seed=1)
    statistics = Statistics(torch.arange(6.0), torch.full((6,), 2.0))
    wrapped = given(world.sae, statistics, name="own")
    x, y = (2 * part + torch.arange(6.0) for part in (world.x_hat, world.disturbed))
    tokens = torch.arange(len(x))
    shift, gain = torch.arange(6.0).double() / 8, torch.full((6,), 0.5).double()
    raw_shift = 2 * shift + (1 - gain) * statistics.mean
    options = {"groups": tokens % 5, "seed": 2}
    own, raw = (
        persistence(sae, *both, tokens, change=CommonChange(m, gain, torch.tensor(0)), **options)
        for sae, both, m in (
            (world.sae, (Rows(world.x_hat), Rows(world.disturbed)), shift),
            (wrapped, (Rows(x), Rows(y)), raw_shift),
        )
    )
    assert set(own["source"]) > {"pruned", "undone", "null", "noise_shuffled"}
    exact = own["source"] != "noise_isotropic"  # whose noise is no number of the grid
    pd.testing.assert_frame_equal(raw[exact], own[exact])
    pd.testing.assert_frame_equal(raw[~exact], own[~exact], rtol=1e-3)
    assert own["correlation"].notna().any()


def test_an_sae_of_others_is_read_beside_a_common_change_of_the_first_half(tmp_path, monkeypatch):
    """Fitted in the raw space that it reads, with the noise of the condition's own seed."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 900, 6, generator=generator)
    x, y = 2 * x + 1, 2.6 * x + 0.8 * noise - 1
    y[:300] *= 1.5  # of the first half, which is not measured
    screened = torch.arange(900)[torch.rand(900, generator=generator) < 0.9]
    theirs = given(
        TopKSAE.initialise(6, 20, 4, init_seed=0), Statistics(x[0], x[1].abs()), name="own"
    )
    parents = {n: tmp_path / n for n in ("screening", "dense", "dense_activations", "activations")}
    for folder in parents.values():
        folder.mkdir()
    save_file({"eval": screened}, parents["screening"] / "kept.safetensors")
    write_json(parents["dense_activations"] / "rows.json", {"eval_first_rows": 500})
    save_file(
        {"documents": torch.arange(900) // 30},
        parents["dense_activations"] / "eval_documents.safetensors",
    )
    for name, rows in {"dense_activations": x, "activations": y}.items():
        save_file({"activations": rows}, parents[name] / "eval.safetensors")
    monkeypatch.setattr(f"{EVIDENCE}.load_given_sae", lambda *_, **__: theirs)
    monkeypatch.setattr(f"{EVIDENCE}._read_where_dense_fires", lambda *_: None)
    config = {"pretrained": {}, "common_change": {"kind": "scalar", "seed": 40}}
    source = Source(
        ModelConfig(name="any", layers=[1]), None, 1, PretrainedSaeConfig(layer=1, folder="theirs")
    )
    stage = Stage("evidence", 2, config, {}, source=source)
    work = Work(stage, parents, tmp_path, tmp_path.mkdir, "cpu", lambda _: None, tmp_path.mkdir)
    STAGES["evidence"].made([work])

    found = pd.read_parquet(tmp_path / "persistence.parquet").set_index(["source", "latent"])
    first, second = (screened[part] for part in (screened < 500, screened >= 500))
    gain, shift = slow.common_gain(x[first].double().numpy(), y[first].double().numpy())
    assert gain == pytest.approx(1.65, abs=0.1)
    common = gain * x[second].double() + torch.from_numpy(shift)
    partner = other_token(len(second), torch.Generator().manual_seed(40 + NULL_SEED))
    null = common + (y[second] - common)[partner]
    before = activations_of(theirs, x[second])
    for source, rows in {"pruned": y[second], "null": null.float()}.items():
        after = activations_of(theirs, rows)
        for latent in range(20):
            expected = slow_persistence(before[:, latent], after[:, latent])
            row = found.loc[(source, latent)]
            assert row["correlation"] == pytest.approx(expected[0], abs=1e-4, nan_ok=True)
    assert found["correlation"].notna().sum() > 50
    assert {len(each) for each in found["without"]} == {14}  # documents, of 30 rows


def assert_directions(sae, scale=1.0):
    """They are what a unit of each latent adds to a reconstruction."""
    directions = sae.directions()
    assert directions.shape == (sae.num_latents, sae.d_model)
    assert not directions.requires_grad
    token = torch.ones(1, sae.d_model) + torch.arange(sae.d_model) / 8
    for latent in range(0, sae.num_latents, 3):
        rebuilt = []
        for value in (0.0, 1.0):
            sae.encode(token)  # some remember its scale for one decoding
            z = torch.zeros(1, sae.num_latents)
            z[0, latent] = value
            rebuilt.append(sae.decode(z)[0])
        added = rebuilt[1] - rebuilt[0]
        torch.testing.assert_close(added, scale * directions[latent], atol=1e-5, rtol=1e-4)


def test_directions():
    _, wrapped, _, _ = raw_world(0)
    with torch.no_grad():
        wrapped.coder.sae.decoder_weight.normal_(generator=torch.Generator().manual_seed(0))
    assert_directions(wrapped)
    assert_directions(wrapped.with_decoder_shift(torch.ones(6)))
    assert_directions(threshold_sae())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("TopK", {"rescale_acts_by_decoder_norm": True}),
        ("TopK", {"rescale_acts_by_decoder_norm": False}),
        ("Standard", {}),
        ("JumpReLU", {}),
        ("Standard", {"normalize_activations": "layer_norm"}),
    ],
)
def test_directions_of_saes_of_others(sae_lens, tmp_path, architecture, options):
    saved(sae_lens, tmp_path, architecture=architecture, **options)
    sae = local(tmp_path)
    token = torch.ones(1, sae.d_model) + torch.arange(sae.d_model) / 8
    own = "normalize_activations" in options
    assert_directions(sae, scale=float(token.std()) if own else 1.0)


# --- which tokens a direction promotes ----------------------------------------------------------


class GemmaNorm(torch.nn.Module):
    """RMSNorm with gain 1 + w."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        size = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (x.float() * size * (1 + self.weight)).to(x.dtype)


def norms(d_model):
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(d_model, generator=generator) for _ in range(2))
    plain, layer = torch.nn.RMSNorm(d_model, eps=1e-6), torch.nn.LayerNorm(d_model)
    with torch.no_grad():
        plain.weight.copy_(weight)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    bare = torch.nn.LayerNorm(d_model, elementwise_affine=False)
    return {"plain": plain, "gemma": GemmaNorm(weight), "layer": layer, "bare": bare}


def added_logits(norm, weight, direction):
    """By differentiating the norm at a point at right angles to the direction, of size 1.

    There the stream's length does not change; a scale of it is all that is left out.
    """
    d_model = weight.shape[1]
    point = torch.randn(d_model, generator=torch.Generator().manual_seed(8))
    unit = direction / direction.norm()
    if isinstance(norm, torch.nn.LayerNorm):
        point, unit = point - point.mean(), unit - unit.mean()
    point = point - unit * (point @ unit) / (unit @ unit)
    if isinstance(norm, torch.nn.LayerNorm):
        point = point - point.mean()
    point = point / point.square().mean().sqrt()
    _, change = torch.func.jvp(lambda x: norm(x[None])[0], (point,), (unit,))
    found = weight @ change
    return (found - found.mean()).detach()


@pytest.mark.parametrize("d_model", [16, 15])
@pytest.mark.parametrize("name", ["plain", "gemma", "layer", "bare"])
def test_effects_are_the_derivative_of_the_logits(name, d_model):
    norm, generator = norms(d_model)[name], torch.Generator().manual_seed(1)
    weight = torch.randn(40, d_model, generator=generator)
    directions = 5 * torch.randn(7, d_model, generator=generator) + 2
    found = token_effects(directions, weight, norm, count=6)
    assert found.promoted.dtype == torch.int64 and found.promoted_logits.dtype == torch.float32
    for latent, direction in enumerate(directions):
        expected = added_logits(norm, weight, direction)
        order = expected.argsort(descending=True)
        assert found.promoted[latent].tolist() == order[:6].tolist()
        assert found.suppressed[latent].tolist() == order.flip(0)[:6].tolist()
        for ids, values in ((found.promoted, found.promoted_logits), found[2:]):
            torch.testing.assert_close(values[latent], expected[ids[latent]], atol=2e-4, rtol=2e-4)


def test_a_direction_of_one_token_promotes_it():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 32, generator=generator)
    norm = torch.nn.RMSNorm(32)
    found = token_effects(weight[[5, 77]] * 3, weight, norm, count=3)
    assert found.promoted[:, 0].tolist() == [5, 77]
    opposite = token_effects(-weight[[5, 77]], weight, norm, count=3)
    assert torch.equal(opposite.suppressed, found.promoted)
    torch.testing.assert_close(opposite.suppressed_logits, -found.promoted_logits)
    # Neither a shift of all logits nor a direction's length changes anything.
    shifted = token_effects(weight[[5, 77]], weight + weight[9], norm, count=3)
    assert torch.equal(shifted.promoted, found.promoted)
    torch.testing.assert_close(shifted.promoted_logits, found.promoted_logits)


@pytest.mark.parametrize("block", [1, 50, 1000])
def test_blocks_change_nothing(block):
    generator = torch.Generator().manual_seed(4)
    weight, directions = (torch.randn(n, 8, generator=generator) for n in (90, 11))
    whole = token_effects(directions, weight, torch.nn.RMSNorm(8), count=5)
    parts = token_effects(directions, weight, torch.nn.RMSNorm(8), count=5, block=block)
    assert torch.equal(parts.promoted, whole.promoted)
    assert torch.equal(parts.suppressed, whole.suppressed)
    torch.testing.assert_close(parts.promoted_logits, whole.promoted_logits)
    torch.testing.assert_close(parts.suppressed_logits, whole.suppressed_logits)


def test_weights_in_16_bits():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(60, 8, generator=generator).bfloat16()
    norm = norms(8)["gemma"].bfloat16()
    found = token_effects(torch.eye(8), weight, norm, count=4)
    precise = token_effects(torch.eye(8), weight.float(), norm.float(), count=4)
    torch.testing.assert_close(found.promoted_logits, precise.promoted_logits, rtol=0.02, atol=0.02)


def test_effects_that_are_not_defined():
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    directions = torch.eye(8)
    directions[3] = 0
    found = token_effects(directions, weight, torch.nn.RMSNorm(8), count=2)
    for values in (found.promoted_logits, found.suppressed_logits):
        assert values.isnan().any(1).nonzero().flatten().tolist() == [3]
    for count in (0, 21):
        with pytest.raises(UserError, match=f"effects: {count} is not in 1..20"):
            token_effects(directions, weight, torch.nn.RMSNorm(8), count=count)


def test_the_unembedding_of_a_model(tiny_lm):
    """From the last block's output its norm and matrix give the model's own logits."""
    weight, norm = unembedding(tiny_lm)
    entering = []
    hook = tiny_lm.blocks[-1].register_forward_hook(lambda *passed: entering.append(passed[-1]))
    own = logits(tiny_lm, torch.tensor([[3, 4, 5]]))
    hook.remove()
    states = entering[0][0] if isinstance(entering[0], tuple) else entering[0]
    found = norm(states) @ weight.T
    if cap := getattr(tiny_lm.model.config, "final_logit_softcapping", None):
        found = cap * torch.tanh(found / cap)
    torch.testing.assert_close(found, own)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a gain that matters
        norm.weight.copy_(torch.randn(16, generator=generator))
    direction = torch.randn(16, generator=generator)
    effects = token_effects(direction[None], weight, norm, count=3)
    expected = added_logits(norm, weight, direction)
    assert effects.promoted[0].tolist() == expected.topk(3).indices.tolist()


def test_rows_of_the_unembedding_that_are_no_token(tiny_tokenizer):
    lm = tiny_language_model("llama", vocabulary=len(tiny_tokenizer) + 9)
    padded = as_language_model(lm.model, tiny_tokenizer, label="padded")
    assert len(unembedding(padded).weight) == len(tiny_tokenizer)
    assert len(unembedding(lm).weight) == len(tiny_tokenizer) + 9


def test_models_without_what_is_needed():
    lm = tiny_language_model("llama")
    lm.model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="tiny-llama has no norm right before its unembedding"):
        unembedding(lm)
    lm = tiny_language_model("llama")
    lm.model.lm_head = torch.nn.Identity()
    with pytest.raises(UserError, match="no matrix from its activations"):
        unembedding(lm)
