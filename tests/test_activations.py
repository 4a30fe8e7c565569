import pytest
import torch
from safetensors.torch import load_file

from prunelens.activations import (
    Activations,
    Statistics,
    capture,
    capture_sites,
    covariance,
    participation_ratio,
    random_rotation,
    statistics,
    usable_rows,
)
from prunelens.config import ActivationConfig
from prunelens.errors import UserError
from prunelens.model import FORWARD_TOKENS, run_to_site


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (9, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_a_store_holds_what_the_model_gives(tiny_llama, tokens, tmp_path, monkeypatch, storage):
    monkeypatch.setitem(FORWARD_TOKENS, "cpu", 30)
    config = ActivationConfig(skip_first=2, storage=storage)
    path = tmp_path / "a.safetensors"
    told = []
    norms = capture(
        tiny_llama, tokens, path, site="resid_post", layer=1, config=config, progress=told.append
    )
    expected = run_to_site(tiny_llama, tokens, "resid_post", 1)[:, 2:].flatten(0, 1)
    stored = load_file(path)["activations"]
    assert stored.dtype == getattr(torch, storage)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[storage]
    torch.testing.assert_close(stored.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norms, stored.float().norm(dim=1))
    assert told[-1] == tokens.numel()


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_stores_of_one_pass_are_those_of_a_pass_each(
    tiny_llama, tokens, tmp_path, monkeypatch, storage
):
    monkeypatch.setitem(FORWARD_TOKENS, "cpu", 30)
    config = ActivationConfig(storage=storage)
    places = [("resid_post", 1), ("attn_out", 1), ("resid_post", 0)]
    together = {place: tmp_path / f"together {place}" for place in places}
    told = []
    norms = capture_sites(tiny_llama, tokens, together, config=config, progress=told.append)
    assert list(norms) == places
    for (site, layer), path in together.items():
        alone = tmp_path / "alone"
        expected = capture(tiny_llama, tokens, alone, site=site, layer=layer, config=config)
        assert path.read_bytes() == alone.read_bytes()
        assert torch.equal(norms[site, layer], expected)
    assert told == [24, 48, 72, 96, 108]


def test_one_pass_names_the_layer_that_overflows(tiny_llama, tokens, tmp_path):
    tiny_llama.blocks[1].mlp.down_proj.weight.fill_(float("inf"))
    places = {("resid_post", layer): tmp_path / str(layer) for layer in (0, 1)}
    with pytest.raises(UserError, match="layer 1 in float32"):
        capture_sites(tiny_llama, tokens, places, config=ActivationConfig())


def test_rows_batches_and_normalisation_agree(tiny_llama, tokens, tmp_path):
    path = tmp_path / "a.safetensors"
    capture(tiny_llama, tokens, path, site="resid_post", layer=1, config=ActivationConfig())
    raw = load_file(path)["activations"]
    kept = torch.tensor([0, 3, 4, 50, 98])
    found = statistics(Activations(path), num_tokens=10**6)
    torch.testing.assert_close(found.mean, raw.double().mean(0).float())
    torch.testing.assert_close(found.sigma, raw.double().std(0, unbiased=False).float())
    view = Activations(path, statistics=found, kept=kept)
    expected = (raw[kept] - found.mean) / found.sigma
    assert view.num_tokens == 5
    torch.testing.assert_close(torch.cat(list(view.batches(2))), expected)
    torch.testing.assert_close(view.rows(torch.tensor([4, 0])), expected[[4, 0]])
    torch.testing.assert_close(torch.cat(list(view.raw_batches(3))), raw[kept])
    centred = raw[kept].double() - raw[kept].double().mean(0)
    spread = covariance(view)
    torch.testing.assert_close(spread, centred.T @ centred / 5)
    share = torch.linalg.eigvalsh(spread).clamp_min(0)
    expected_ratio = float(share.sum() ** 2 / share.square().sum())
    assert participation_ratio(spread) == pytest.approx(expected_ratio)
    assert participation_ratio(torch.eye(4, dtype=torch.float64)) == pytest.approx(4)


def test_a_rotation_keeps_distances_and_leaves_no_axis(tiny_llama, tokens, tmp_path):
    path = tmp_path / "a.safetensors"
    capture(tiny_llama, tokens, path, site="resid_post", layer=1, config=ActivationConfig())
    rotation = random_rotation(16, seed=5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
    plain, turned = Activations(path), Activations(path, rotation=rotation)
    index = torch.arange(20)
    torch.testing.assert_close(
        torch.cdist(*[plain.rows(index)] * 2),
        torch.cdist(*[turned.rows(index)] * 2),
        atol=1e-3,
        rtol=1e-3,
    )
    assert not torch.allclose(plain.rows(index), turned.rows(index), atol=0.1)


def test_sinks_are_screened_by_the_dense_norm():
    norms = torch.tensor([1.0, 2.0, 30.0, 3.0])
    assert usable_rows(norms, median=2.5, multiple=10).tolist() == [0, 1, 3]
    assert usable_rows(norms, median=2.5, multiple=None).tolist() == [0, 1, 2, 3]


def test_a_constant_dimension_normalises_to_zero(tmp_path):
    from safetensors.torch import save_file

    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    rows[:, 1] = 7.0
    save_file({"activations": rows}, tmp_path / "a.safetensors")
    found = statistics(Activations(tmp_path / "a.safetensors"), num_tokens=50)
    normal = Activations(tmp_path / "a.safetensors", statistics=found).rows(torch.arange(50))
    assert (normal[:, 1] == 0).all()
    assert normal.isfinite().all()


def test_non_finite_activations_name_model_layer_window_and_fix(tiny_llama, tokens, tmp_path):
    weight = tiny_llama.model.get_input_embeddings().weight
    bad_token = int(tokens[4, 5])
    before = weight[bad_token].clone()
    first = int((tokens == bad_token).any(1).nonzero()[0])
    weight[bad_token] = float("nan")
    try:
        with pytest.raises(UserError) as error:
            capture(
                tiny_llama,
                tokens,
                tmp_path / "a",
                site="resid_post",
                layer=1,
                config=ActivationConfig(),
            )
    finally:
        weight[bad_token] = before
    text = str(error.value)
    assert f"window {first}" in text
    assert "layer 1" in text
    assert "float32" in text
    assert "bfloat16" in text


def test_storage_overflow_is_an_error_not_an_infinity(tiny_llama, tokens, tmp_path):
    weight = tiny_llama.model.get_input_embeddings().weight
    before = weight.clone()
    weight *= 1e7
    try:
        with pytest.raises(UserError, match="stored as float16"):
            capture(
                tiny_llama,
                tokens,
                tmp_path / "a",
                site="resid_post",
                layer=0,
                config=ActivationConfig(storage="float16"),
            )
    finally:
        weight.copy_(before)


def test_skipping_the_whole_window_is_the_user_s_mistake(tiny_llama, tokens, tmp_path):
    with pytest.raises(UserError, match="skip_first: 12 leaves nothing"):
        capture(
            tiny_llama,
            tokens,
            tmp_path / "a",
            site="resid_post",
            layer=0,
            config=ActivationConfig(skip_first=12),
        )


def test_statistics_survive_a_round_trip(tmp_path):
    found = Statistics(torch.randn(4), torch.rand(4))
    found.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert torch.equal(found.mean, again.mean)
    assert torch.equal(found.sigma, again.sigma)
