"""The paper's matrix as shipped: its numbers, its 24 runs, planned without a hub, run offline."""

import functools
import socket

import huggingface_hub
import numpy as np
import pandas as pd
import pytest

from conftest import tiny_language_model
from prunelens import hub
from prunelens.checkpoint import model_shape
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.paper import FOLDER, published, shipped_shape
from prunelens.report.write import run_and_report
from prunelens.study.preflight.preview import preflight
from prunelens.study_file import read_study

STUDIES = {"paper-a1": 37, "paper-a3": 12, "paper-b1": 17, "paper-c1": 14}  # -> SAEs
MODELS = {  # hub id -> short name, architecture of its tiny stand-in, published parameters
    "google/gemma-3-1b-pt": ("gemma-3-1b", "gemma3", 999_885_952),
    "google/gemma-2-2b": ("gemma-2-2b", "gemma2", 2_614_341_888),
    "meta-llama/Llama-3.2-1B": ("llama-3.2-1b", "llama", 1_235_814_400),
}
SENTENCES = ["def greet(name):", "return 'hello ' + name", "The quick brown fox", "jumps over it"]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, no network, and the hub's client told so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def refuse(*_arguments, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    hub.snapshot.cache_clear()
    yield tmp_path / "hub"
    hub.snapshot.cache_clear()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A plan asks the hub for access; here it is told that there is none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@functools.cache
def planned(name, **settings):
    dotted = {field.replace("__", "."): value for field, value in settings.items()}
    return preflight(read_study(name, dotted), settings=dotted, calibration_seconds=0)


# --- what the paper published -------------------------------------------------------------------


def test_published_tables_agree_with_the_papers_own_text():
    """Ratios and spreads that the text states, from the numbers of its tables."""
    fragility = published("fragility").set_index(["model", "method", "sparsity"])
    ratio = fragility["q1_rare"] / fragility["q5_frequent"]
    assert ratio["gemma-3-1b", "magnitude", 0.3] == pytest.approx(5.2, abs=0.05)
    assert ratio["gemma-2-2b", "wanda", 0.3] == pytest.approx(1.6, abs=0.05)
    causal = published("causal")
    spread = (causal["robust_kl"] / causal["fragile_kl"] - 1).abs()
    assert spread.max() == pytest.approx(0.012, abs=0.0005)
    survival = published("survival").set_index(["model", "method", "sparsity"])["mnn"]
    advantage = survival["gemma-2-2b", "wanda", 0.3] / survival["gemma-2-2b", "magnitude", 0.3]
    assert advantage == pytest.approx(3.7, abs=0.05)
    transfer = published("transfer").set_index(["model", "method", "sparsity"])["fvu"]
    gemma = transfer["gemma-3-1b"]
    assert gemma["wanda", 0.5] / gemma["dense", 0.0] == pytest.approx(2.1, abs=0.1)
    assert published("perplexity")["perplexity"].isna().sum() == 2  # printed as > 10^6
    assert list(published("predictor")["auc"]) == [0.807, 0.796, 0.809]
    assert published("stability")["mnn"].between(0.011, 0.039).all()
    assert published("matrix")["runs"].sum() == 24


def test_every_published_condition_is_one_of_the_shipped_runs():
    ours = {
        (row["model"], row["method"], row["sparsity"]) for name in STUDIES
        for row in planned(name).runs
    }  # fmt: skip
    tables = sorted(path.stem for path in FOLDER.glob("*.csv"))
    assert tables == [
        "causal", "fragility", "matrix", "perplexity", "predictor",
        "sae_quality", "stability", "survival", "transfer",
    ]  # fmt: skip
    for name in set(tables) - {"matrix", "predictor"}:
        table = published(name)
        theirs = zip(table["model"], table["method"], table["sparsity"], strict=True)
        assert set(theirs) <= ours, name


# --- the matrix ---------------------------------------------------------------------------------


def test_24_runs_and_80_saes():
    plans = {name: planned(name) for name in STUDIES}
    assert sum(len(plan.runs) for plan in plans.values()) == 24
    assert {name: plan.totals["saes"] for name, plan in plans.items()} == STUDIES
    assert {name: plan.totals["control_saes"] for name, plan in plans.items()} == {
        "paper-a1": 14, "paper-a3": 10, "paper-b1": 8, "paper-c1": 7,
    }  # fmt: skip
    names = [row["run"] for plan in plans.values() for row in plan.runs]
    assert len(set(names)) == 24
    assert "gemma-3-1b/L12/wanda-row-0.30" in names


def test_seeds_layers_and_steps_are_the_papers():
    seeds = published("sae_quality").set_index(["model", "method", "sparsity"])["seeds"]
    matrix = published("matrix").set_index("tier")
    for name in STUDIES:
        study, tier = read_study(name), matrix.loc[name.removeprefix("paper-").upper()]
        (model,) = study.models
        assert (model.label, study.sae.steps) == (tier["model"], tier["steps"])
        assert list(model.layers) == [int(layer) for layer in str(tier["layers"]).split()]
        rows = planned(name).runs
        assert len(rows) == tier["runs"]
        for row in rows:
            expected = (
                3 if name == "paper-a3" else seeds[row["model"], row["method"], row["sparsity"]]
            )
            assert row["seeds"] == expected, row["run"]
        alive = published("sae_quality").query("model == @model.label")["alive"]
        assert set(alive) == {study.sae.expansion * model_shape(model).d_model}


def test_settings_of_the_papers_protocol():
    for name in STUDIES:
        study = read_study(name)
        assert study.sae.k == 64
        assert study.sae.learning_rate == 5e-5
        assert study.sae.resample_every == 2000
        assert 2048 <= study.sae.batch_tokens <= 4096
        assert study.activations.normalisation == "own"
        assert study.activations.skip_first == 0
        assert study.activations.max_norm_multiple is None
        assert {grid.scope for grid in study.prunings if grid.criterion == "wanda"} == {"row"}
        by_magnitude = [grid for grid in study.prunings if grid.criterion == "magnitude"]
        assert all(grid.scope == "global" and grid.lm_head for grid in by_magnitude)
        assert bool(by_magnitude) == (name != "paper-a3")
        assert study.models[0].dtype == study.activations.storage == "bfloat16"
        tokens = study.corpus
        assert (tokens.train_tokens, tokens.eval_tokens) == (1_500_000, 300_000)
        assert tokens.calibration_tokens == 300_000


# --- shapes and plans without a hub -------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_shipped_shapes_have_the_published_number_of_parameters(name, hub_cache):
    shape = model_shape(ModelConfig(name=name))
    assert shape.parameters == MODELS[name][2]
    config = shipped_shape(name)
    d, heads = config["hidden_size"], config["head_dim"] * config["num_attention_heads"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    block = 2 * d * heads + 2 * d * kv + 3 * d * config["intermediate_size"]
    assert shape.linear_weights == config["num_hidden_layers"] * block
    assert not hub_cache.exists()


def test_a_config_in_the_cache_goes_before_the_shipped_one(hub_cache, tiny_tokenizer):
    lay_in_cache(hub_cache, "google/gemma-2-2b", tiny_tokenizer)
    assert model_shape(ModelConfig(name="google/gemma-2-2b")).d_model == 16
    elsewhere = ModelConfig(name="google/gemma-2-2b", revision="another")
    assert model_shape(elsewhere).d_model == 2304


def test_other_models_need_their_config(hub_cache):
    assert shipped_shape("google/gemma-2-9b") is None
    with pytest.raises(UserError, match=r"models\.name: 'google/gemma-2-9b' is not in the local"):
        planned("paper-b1", models__0__name="google/gemma-2-9b")


def test_a_plan_needs_no_hub_and_tells_costs(hub_cache, monkeypatch):
    def in_the_cache_only(*_arguments, local_files_only=False, **_options):
        if not local_files_only:
            pytest.fail("hub asked")
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, in_the_cache_only)
    plan = planned.__wrapped__("paper-a1")
    dense, wanda = plan.runs[0], next(r for r in plan.runs if r["run"].endswith("wanda-row-0.30"))
    assert (dense["saes"], dense["control_saes"]) == (5, 3)
    assert dense["sae_tokens"] == (7 + 2) * 20_000 * 4096  # one of them twice as long
    assert wanda["sae_tokens"] == 6 * 20_000 * 4096
    # 1.8 M tokens for activations, 300,000 for Wanda's norms, perplexity, transfer, ablations
    assert plan.totals["forward_tokens"] > 11 * 1_800_000 + 300_000
    assert plan.disk["store_gigabytes"] == pytest.approx(1.8e6 * 1152 * 2 / 1e9)
    early = (5 + 3) * 3 + 2  # decoders: five dense and three pruned SAEs, and the doubled ones
    decoder = 9216 * 1152 * 4 / 1e9
    expected = pytest.approx((51 * 2 + early) * decoder, rel=0.01)
    assert plan.disk["saes_gigabytes"] == expected
    assert plan.disk["downloads_gigabytes"] == pytest.approx(2.0, rel=0.01)
    assert plan.memory["model_gigabytes"] == pytest.approx(2.0, rel=0.01)
    assert not hub_cache.exists()


def test_a_plan_lists_what_was_set():
    plan = planned("paper-c1", sae__steps="10")
    assert plan.settings == {"sae.steps": "10"}
    assert plan.runs[0]["sae_tokens"] == (7 + 2) * 10 * 4096


# --- the same files, run offline on tiny models -------------------------------------------------


def lay_in_cache(cache, name, tokenizer):
    """A tiny stand-in where the hub's client keeps what it fetched."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    architecture = MODELS[name][1]
    lm = tiny_language_model(architecture, vocabulary=len(tokenizer))
    lm.model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def tiny_settings(text, **more):
    """Sizes of seconds; fields that the file does not have stay as they are."""
    return {
        "models.0.pretrained": "[]",
        "corpus.source": "files",
        "corpus.paths": f"['{text}']",
        "corpus.document": "line",
        "corpus.context_tokens": "16",
        "corpus.train_tokens": "1600",
        "corpus.eval_tokens": "800",
        "corpus.calibration_tokens": "480",
        "perplexity.corpus": "null",
        "perplexity.context_tokens": "[16]",
        "sae.expansion": "4",
        "sae.k": "4",
        "sae.steps": "8",
        "sae.batch_tokens": "64",
        "sae.resample_every": "4",
        "sae.seeds": "[0, 1]",
        "transfer.ce_tokens": "32",
        "transfer.refit_tokens": "160",
        "causal.prompts": "3",
        "causal.group_size": "3",
        "causal.contexts_per_latent": "3",
        "threads_per_stage": "1",
        **more,
    }


TINY = {  # study -> what else is set: layers that tiny models have, fewer seeds and conditions
    "paper-a1": {
        "models.0.layers": "[1]",
        "prunings": "[{criterion: magnitude, scope: global, lm_head: true, sparsities: [0.3]},"
        " {criterion: wanda, scope: row, sparsities: [0.3]}]",
    },
    "paper-a3": {"models.0.layers": "[0, 2]"},
    "paper-b1": {
        "models.0.layers": "[1]",
        "prunings.0": "{criterion: magnitude, scope: global, sparsities: [0.5]}",
        "prunings.1": "{criterion: wanda, scope: row, sparsities: [0.3]}",
    },
    "paper-c1": {
        "models.0.layers": "[1]",
        "prunings.0.seeds": "[0, 1]",
        "prunings.1": "{criterion: wanda, scope: row, sparsities: [0.3]}",
    },
}


@pytest.mark.parametrize("name", TINY)
def test_the_study_files_run_offline_on_tiny_models(
    name, hub_cache, tiny_tokenizer, tmp_path, monkeypatch
):
    if name != "paper-a3":  # drawing takes longer than the study: once, for two layers, will do
        monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)
    generator = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(" ".join(generator.choice(SENTENCES, 6)) + f" {n}" for n in range(300))
    )
    settings = tiny_settings(text, **TINY[name])
    study = read_study(name, settings)
    lay_in_cache(hub_cache, study.models[0].name, tiny_tokenizer)
    plan = preflight(study, settings=settings, calibration_seconds=0)
    outcome = run_and_report(study, tmp_path / "out", quiet=True)
    assert {(r.run.name, r.status, r.reason) for r in outcome.results} == {
        (row["run"], "done", "") for row in plan.runs
    }
    quality = pd.read_csv(tmp_path / "out" / "tables" / "sae_quality.csv")
    assert set(quality["model"]) == {study.models[0].label}
    assert len(quality) == plan.totals["saes"]
    perplexity = pd.read_csv(tmp_path / "out" / "tables" / "perplexity.csv")
    assert np.isfinite(perplexity["perplexity"]).all()
    assert plan.settings == settings
    pruned = [run for run in outcome.results if "magnitude" in run.run.name]
    heads = [run.run.name.endswith("-head") for run in pruned]
    assert heads == [name in ("paper-a1", "paper-c1")] * len(pruned)  # b1: the blocks alone
    tables = {path.stem for path in (tmp_path / "out" / "tables").iterdir()}
    assert {"transfer", "fragility_tests", "predictor", "causal", "claims", "depth"} <= tables
    quality = pd.read_csv(tmp_path / "out" / "tables" / "tableB1_quality.csv")
    theirs = published("sae_quality").set_index(["model", "method", "sparsity"])["fvu"]
    for row in quality[quality["paper_fvu"].notna()].itertuples():
        assert row.paper_fvu == theirs[row.model, row.method, row.sparsity]
    assert quality["paper_fvu"].notna().any()
