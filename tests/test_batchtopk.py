"""BatchTopK: trained on the largest latents of a batch, read with a fixed threshold."""

import json
import typing

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from independent import sae as independent
from prunelens.activations import Statistics
from prunelens.analyses.grades import AUC_MARK
from prunelens.config import PretrainedSaeConfig, study_from_data
from prunelens.config.features import Architecture
from prunelens.errors import UserError
from prunelens.report.write import run_and_report
from prunelens.sae import BatchTopKSAE, TopKSAE, evaluate_sae, kernels, load_given_sae, load_sae
from prunelens.sae.architectures import ARCHITECTURES
from prunelens.sae.batchtopk import batch_top_k
from prunelens.sae.exchange.export import export_sae
from prunelens.sae.state import Training
from prunelens.study.exports import export_hub
from prunelens.study.plan import plan_study
from prunelens.study_file import read_study
from test_sae import InMemory, inputs
from test_sae_train import SMALL, StopHereError, assert_same, clustered, train
from tiny_study import run_with_pool, tiny_study, write_text

BATCHED = SMALL.model_copy(update={"architecture": "batchtopk"})
CLOSE = 1e-5


def random_sae(kind=BatchTopKSAE, d_model=12, num_latents=48, k=5, seed=0):
    """An SAE with nothing at its initial value."""
    sae = kind.initialise(d_model, num_latents, k, init_seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if sae.threshold is not None:
            sae.threshold.fill_(0.7)
    return sae


def as_arrays(weights):
    return [w.detach().double().numpy() for w in weights]


def dense(latents, num_latents=48):
    return kernels.dense_latents(latents, num_latents)


def sparse_world(tokens, seed, rate=0.1):
    """Few of 16 orthogonal directions at a time, of different numbers per token."""
    planted = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    generator = torch.Generator().manual_seed(seed)
    often = 2 * rate * torch.rand(tokens, 1, generator=generator)
    on = torch.rand(tokens, 16, generator=generator) < often
    raw = (on * (0.5 + torch.rand(tokens, 16, generator=generator))) @ planted
    raw += 0.02 * torch.randn(tokens, 16, generator=generator)
    return planted, InMemory(raw, mean=torch.zeros(16), sigma=torch.full((16,), 0.2))


# ---- which latents are kept ----


def test_a_batch_of_one_token_is_topk():
    ours, topk = random_sae(), random_sae(TopKSAE)
    for x_hat in inputs(50).split(1):
        pre = kernels.pre_activations(x_hat, *ours.weights[:2])
        assert torch.equal(dense(ours.keep(pre)), dense(topk.encode(x_hat)))


@pytest.mark.parametrize("case", ["plain", "one token takes most", "too few positive", "all tied"])
def test_a_batch_keeps_its_k_times_tokens_largest(case):
    pre = inputs(40, 48)
    if case == "one token takes most":  # more than are looked at first
        pre[7] += 100.0
    if case == "too few positive":
        pre -= 2.0
    if case == "all tied":
        pre = torch.ones(40, 48)
    found = batch_top_k(pre, 3)
    kept = dense(found)
    expected = pre.relu().flatten().topk(120).values
    assert torch.equal(kept.flatten().topk(120).values, expected)
    assert int((kept > 0).sum()) == int((expected > 0).sum())
    assert ((kept == 0) | (kept == pre)).all()
    assert found.indices.shape[1] == max(1, int((kept > 0).sum(1).max()))
    assert all(len(set(row)) == len(row) for row in found.indices.tolist())


def test_reading_keeps_what_exceeds_the_threshold_whatever_the_batch():
    sae, x_hat = random_sae(), inputs(60)
    weights = as_arrays(sae.weights)
    expected = independent.encode_above(x_hat.double().numpy(), *weights[:2], float(sae.threshold))
    z = dense(sae.encode(x_hat)).detach()
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-5)
    assert len({int(n) for n in (z > 0).sum(1)}) > 5  # tokens have different numbers
    alone = torch.cat([dense(sae.encode(x)) for x in x_hat.split(1)])
    torch.testing.assert_close(alone, z)
    assert sae.encode(x_hat[:0]).values.shape == (0, 1)


# ---- training ----


def test_steps_are_those_of_a_slow_training():
    data = InMemory(inputs(400))
    training = Training(data, BATCHED, init_seed=0, data_seed=0)
    start = as_arrays(training.sae.weights)
    batches = [data.rows(training.order.batch(step)) for step in range(1, 7)]
    thresholds = []
    for batch in batches:
        training.advance(batch)
        thresholds.append(float(training.sae.threshold))
    slow, expected = independent.train_batchtopk(
        as_arrays(batches), start, BATCHED.k, [entry.learning_rate for entry in training.log]
    )
    for ours, theirs in zip(as_arrays(training.sae.weights), slow, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 6, 9, 17, 39])
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, stop_at):
    checkpoint = tmp_path / "checkpoint.safetensors"
    straight = train(clustered(), BATCHED)
    assert straight.resampled.any()

    def stop(step):
        if step == stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(clustered(), BATCHED, checkpoint=checkpoint, progress=stop)
    resumed = train(clustered(), BATCHED, checkpoint=checkpoint)
    assert_same(straight, resumed)
    assert torch.equal(straight.sae.threshold, resumed.sae.threshold)
    assert float(straight.sae.threshold) > 0


def test_a_start_brings_its_threshold_and_must_be_of_the_same_architecture():
    data = InMemory(inputs(600))
    start = train(data, BATCHED, init_seed=5).sae
    begun = Training(data, BATCHED, init_seed=0, data_seed=0, start=start)
    assert torch.equal(begun.sae.threshold, start.threshold)
    with pytest.raises(UserError, match="'batchtopk' one, but"):
        train(data, SMALL, start=start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_dictionary_is_recovered_and_l0_is_near_k(dtype):
    planted, data = sparse_world(6000, seed=1)
    config = BATCHED.model_copy(
        update={
            "expansion": 2,
            "k": 2,
            "steps": 200,
            "batch_tokens": 256,
            "learning_rate": 2e-2,
            "resample_every": 40,
            "dtype": dtype,
        }
    )
    sae = train(data, config).sae
    best = (planted @ sae.decoder_weight.detach().T).amax(1)
    assert (best > 0.9).float().mean() > 0.9
    quality = evaluate_sae(sae, sparse_world(3000, seed=2)[1], dense_variance=1.0)
    assert 0.9 * config.k < quality.l0 < 1.1 * config.k
    topk = train(data, config.model_copy(update={"architecture": "topk"})).sae
    assert quality.fvu < evaluate_sae(topk, data, dense_variance=1.0).fvu  # tokens differ


# ---- files ----


def test_every_architecture_of_a_study_has_its_class():
    assert tuple(ARCHITECTURES) == typing.get_args(Architecture)


@pytest.mark.parametrize("kind", ARCHITECTURES.values())
def test_an_sae_is_loaded_by_the_architecture_in_its_file(kind, tmp_path):
    sae = random_sae(kind)
    sae.save(tmp_path)
    again = load_sae(tmp_path)
    assert type(again) is kind
    assert again.k == sae.k
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.tensor(torch.nan), "threshold holds NaN or infinity"),
        (torch.tensor(-1.0), "threshold -1 is below 0"),
        (torch.ones(48), "damaged or incomplete"),
        (None, "damaged or incomplete"),
    ],
)
def test_a_damaged_threshold_is_one_line(threshold, message, tmp_path):
    random_sae().save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    del tensors["threshold"]
    if threshold is not None:
        tensors["threshold"] = threshold
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)


def test_an_architecture_that_is_misspelt_or_unknown_is_one_line(tmp_path, tmp_path_factory):
    data = tiny_study(tmp_path, tmp_path / "text.txt")
    data["sae"]["architecture"] = "btopk"
    with pytest.raises(UserError, match=r"sae.architecture: .*'btopk'\); did you mean 'topk'\?"):
        study_from_data(data)
    random_sae().save(tmp_path)
    path = tmp_path / "sae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "gated"}))
    with pytest.raises(UserError, match="'gated'"):
        load_sae(tmp_path)


# ---- other people's files ----


def given(folder):
    return load_given_sae(PretrainedSaeConfig(layer=3, folder=str(folder)))


def own_folder(folder):
    """An SAE under a strong normalisation, and activations to match."""
    sae, generator = random_sae(), torch.Generator().manual_seed(9)
    sigma = 10 ** (2 * torch.rand(12, generator=generator) - 1)
    mean = 5.0 * sigma * torch.randn(12, generator=generator)
    sae.save(folder)
    Statistics(mean, sigma).save(folder / "normalisation.safetensors")
    (folder / "place.json").write_text(json.dumps({"site": "resid_post", "layer": 3}))
    return mean + sigma * inputs(200)


def assert_same_codes(found, expected):
    """Pairs of latents and reconstructions, to 1e-5 of their scale."""
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= CLOSE * float(theirs.abs().max())
    assert torch.equal(found[0] > 0, expected[0] > 0)


@pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained")
def test_saelens_computes_the_same_from_our_export(tmp_path, sae_lens):
    x = own_folder(tmp_path / "own")
    export_sae(tmp_path / "own", tmp_path / "out", format="saelens", model="gpt2")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert theirs.cfg.architecture() == "jumprelu"
    ours, back = given(tmp_path / "own"), given(tmp_path / "out")
    assert (ours.architecture, back.architecture) == ("batchtopk", "jumprelu")
    z = ours.encode(x)
    expected = z, ours.decode(z)
    assert len({int(n) for n in (z > 0).sum(1)}) > 5
    with torch.no_grad():
        assert_same_codes((theirs.encode(x), theirs.decode(theirs.encode(x))), expected)
    assert_same_codes((back.encode(x), back.decode(back.encode(x))), expected)
    assert torch.equal(back.threshold, ours.threshold)
    assert (back.site, back.layer, back.nominal_l0) == ("resid_post", 3, 5.0)
    # Refitted thresholds too.
    wider, as_wide = (sae.with_threshold_scale(0.5).encode(x) for sae in (ours, back))
    assert_same_codes((as_wide,), (wider,))
    assert (wider != 0).sum() > (z != 0).sum()


@pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained")
def test_a_batchtopk_sae_that_saelens_trained_is_read_as_it_reads_it(tmp_path, sae_lens):
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=12, d_sae=48, k=5, device="cpu")
    trained, ours = sae_lens.BatchTopKTrainingSAE(config), random_sae()
    with torch.no_grad():
        trained.W_enc.copy_(ours.encoder_weight.T)
        trained.W_dec.copy_(ours.decoder_weight)
        trained.b_enc.copy_(ours.encoder_bias)
        trained.topk_threshold.fill_(0.7)
    trained.save_inference_model(tmp_path / "theirs")
    inference, x = sae_lens.SAE.load_from_disk(tmp_path / "theirs"), inputs(100)
    found = given(tmp_path / "theirs")
    assert found.architecture == "jumprelu"
    with torch.no_grad():
        z = inference.encode(x)
        assert_same_codes(
            (found.encode(x), found.decode(found.encode(x))), (z, inference.decode(z))
        )


def test_sparsify_has_no_batchtopk(tmp_path):
    own_folder(tmp_path / "own")
    with pytest.raises(UserError, match="sparsify has no BatchTopK SAEs; export it as saelens"):
        export_sae(tmp_path / "own", tmp_path / "out", format="sparsify")
    found = export_hub(tmp_path / "own", tmp_path / "hub")
    assert {p.name for p in found.folder.iterdir() if p.is_dir()} == {"prunelens", "saelens"}
    card = (found.folder / "README.md").read_text()
    assert "A BatchTopK sparse autoencoder" in card
    assert "sparsify" not in card
    facts = json.loads((found.folder / "prunelens.json").read_text())
    assert facts["saes"][0]["architecture"] == "batchtopk"


# ---- studies ----


@pytest.fixture(scope="module")
def finished(checkpoint_folder, tmp_path_factory, pool):
    """The tiny study with all questions."""
    folder = tmp_path_factory.mktemp("batchtopk")
    data = tiny_study(checkpoint_folder, write_text(folder / "text.txt"))
    data["sae"] |= {"architecture": "batchtopk"}
    study = study_from_data(data)
    return study, folder / "tiny", run_with_pool(study, folder / "tiny", pool)


def test_a_study_of_batchtopk_saes_answers_every_question(finished):
    _, out, outcome = finished
    assert {r.status for r in outcome.results} == {"done"}
    quality = pd.read_csv(out / "tables" / "sae_quality.csv")
    assert np.isfinite(quality[["fvu", "l0", "alive"]]).all().all()
    assert quality["l0"].nunique() > 1  # no k of every token
    for name in ("persistence", "survival", "transfer", "scaling", "causal"):
        table = pd.read_csv(out / "tables" / f"{name}.csv")
        assert len(table)
        assert not np.isinf(table.select_dtypes("number")).any().any()
    assert "threshold" in set(pd.read_csv(out / "tables" / "transfer.csv")["refit"])


def test_its_saes_are_others_than_topk_ones_and_go_to_saelens(finished, tmp_path):
    study, out, _ = finished
    (run, *_) = plan_study(study).runs
    (stage, *_) = run.saes.values()
    assert stage.config["architecture"] == "batchtopk"
    plain = study.model_copy(update={"sae": study.sae.model_copy(update={"architecture": "topk"})})
    (other, *_) = plan_study(plain).runs[0].saes.values()
    assert "architecture" not in other.config
    assert other.identity != stage.identity
    folder = out / "artifacts" / "sae" / stage.identity
    assert isinstance(load_sae(folder), BatchTopKSAE)
    export_sae(folder, tmp_path / "out", format="saelens")
    ours, back = (
        given(folder),
        load_given_sae(PretrainedSaeConfig(layer=1, folder=str(tmp_path / "out"))),
    )
    x = 3 * torch.randn(50, ours.d_model, generator=torch.Generator().manual_seed(0))
    z = ours.encode(x)
    assert_same_codes((back.encode(x), back.decode(back.encode(x))), (z, ours.decode(z)))


# ---- where the truth is known ----


def test_controlled_measures_reach_their_marks_in_the_planted_world(tmp_path, monkeypatch):
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)
    sizes = {
        "corpus.train_tokens": "60_000",
        "corpus.eval_tokens": "20_000",
        "prunings": "[{criterion: planted, scope: independent, sparsities: [0.3]}]",
        "sae.architecture": "batchtopk",
        "sae.k": "4",
        "sae.steps": "200",
        "sae.batch_tokens": "512",
        "sae.learning_rate": "2e-2",
        "sae.seeds": "[0, 1]",
        "taus": "[0.7]",
        "questions": "[survival, persistence, identity, fragility]",
    }
    study = read_study("selftest", sizes)
    outcome = run_and_report(study, tmp_path, workers=2, quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    row = pd.read_csv(tmp_path / "tables" / "selftest.csv").set_index("measure").loc
    for measure in ("persistence", "relative_shuffled", "scaling"):
        assert row[measure, "auc"] >= AUC_MARK
        assert row[measure, "false_survival"] < 0.1
    assert row["shared_init", "num_latents"] > 100  # of 256: found, and with a clear fate
