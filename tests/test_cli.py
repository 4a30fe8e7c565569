"""The command line as a user types it: the longer ones in processes of their own."""

import json
import shutil
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import warm
from prunelens.sae.topk import TopKSAE


def in_a_process(*arguments, cwd=None):
    command = [sys.executable, "-c", warm.COMMAND_LINE, *map(str, arguments)]
    return warm.run(command, cwd=cwd)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"def f{n}(name): return 'hello ' + name * {n}" for n in range(300)))
    return path


def one_line_of_error(result, *words):
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nope"], ["study", "'nope'", "demo"]),
        (["run", "demo", "--set", "sae.k=5000"], ["sae.k", "5000"]),
        (["run", "demo", "--set", "sae.kk=1"], ["sae.kk", "did you mean 'k'"]),
        (["run", "demo", "--set", "novalue"], ["--set", "field=value"]),
        (["run", "demo", "--set", "prunings.0.sparsities=[1.5]"], ["1.5", "outside"]),
        (["run", "demo", "--set", "models.0.name=./missing"], ["models.name", "./missing"]),
        (["run", "demo", "--device", "cuda:99"], ["device", "cuda:99"]),
        (["plan", "demo", "--set", "models.0.layers=[77]"], ["layer 77", "6 blocks"]),
        (["status", "nowhere"], ["nowhere", "study.yaml"]),
        (["match", "nowhere", "nowhere"], ["nowhere"]),
        (["prune", "bundled", "--out", "x", "--sparsity", "1.5"], ["sparsit", "1.5"]),
        (["transfer", "nowhere", "bundled"], ["SAE", "'nowhere'", "release:sae_id"]),
        (["transfer", "a:b", "bundled", "--sparsity", "7"], ["--sparsity", "7"]),
        (["predict", "nowhere", "--sparsity", "0.5"], ["nowhere", "study.yaml"]),
        (["predict", "nowhere", "--sparsity", "0.5", "--latents", "x"], ["--latents", "'x'"]),
        (["run", "demo", "--set", "causal.conditions=[nope]"], ["causal.conditions", "'nope'"]),
        (["run", "demo", "--set", "questions=[causal]"], ["questions", "'survival'"]),
        (["run", "demo", "--set", "prunings.0.seeds=[7,8]"], ["prunings.seeds", "7"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    arguments, words, tmp_path, monkeypatch, prunelens
):
    monkeypatch.chdir(tmp_path)
    one_line_of_error(prunelens(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_plan_shows_the_matrix_and_runs_nothing(tmp_path):
    arguments = ["--json", "--no-calibration", "--set", "sae.steps=400"]
    result = in_a_process("plan", "demo", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert [row["run"] for row in plan["runs"]] == [
        "bundled/L2/dense",
        "bundled/L2/magnitude-global-0.30",
        "bundled/L2/magnitude-global-0.50",
        "bundled/L2/wanda-row-0.30",
        "bundled/L2/wanda-row-0.50",
    ]
    assert plan["stages"]["sae"] == 29
    assert plan["settings"] == {"sae.steps": "400"}
    assert plan["hours"] is None
    # 21 SAEs, two of twice the steps, six warm ones of a quarter
    steps = (21 + 2 * 2) * 400 + 6 * 100
    assert sum(row["sae_tokens"] for row in plan["runs"]) == steps * 256
    assert list(tmp_path.iterdir()) == []


def test_prune_saves_a_checkpoint_that_transformers_loads(checkpoint_folder, text, tmp_path):
    out = tmp_path / "pruned"
    result = in_a_process(
        "prune", checkpoint_folder, "--out", out, "--sparsity", "0.5", "--json",
        "--set", "corpus.source=files", "--set", f"corpus.paths=[{text}]",
        "--set", "corpus.document=line", "--set", "corpus.context_tokens=16",
        "--set", "corpus.train_tokens=160", "--set", "corpus.eval_tokens=160",
        "--set", "corpus.calibration_tokens=1600",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["achieved_sparsity"] == pytest.approx(0.5)
    weight = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight
    assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    again = in_a_process("prune", checkpoint_folder, "--out", out, "--criterion", "magnitude")
    one_line_of_error(again, "out:", "not an empty folder")


def test_prune_of_the_folder_that_one_stands_in_keeps_its_dtype(
    checkpoint_folder, tmp_path, monkeypatch, prunelens
):
    out, options = tmp_path / "out", ("--criterion", "magnitude")
    shutil.copytree(checkpoint_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    narrow = {n: t.bfloat16() for n, t in load_file("model.safetensors").items()}
    save_file(narrow, "model.safetensors", metadata={"format": "pt"})
    assert prunelens("prune", ".", "--out", out, *options).returncode == 0
    assert json.loads((out / "prunelens.json").read_text())["model"]["name"] == "here"
    written = load_file(out / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}


def test_prune_takes_the_head_where_asked(checkpoint_folder, tmp_path, prunelens):
    options = ("--out", tmp_path / "out", "--sparsity", "0.5", "--lm-head")
    refused = prunelens("prune", checkpoint_folder, *options)  # Wanda
    one_line_of_error(refused, "lm_head: true does not go with 'wanda'", "leave it out")
    result = prunelens("prune", checkpoint_folder, *options, "--criterion", "magnitude", "--json")
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == sum(weight.numel() for weight in weights) // 2
    assert (model.lm_head.weight == 0).any() and (model.model.embed_tokens.weight != 0).all()


def test_match_prints_the_rates_of_two_saes(tmp_path, prunelens):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        TopKSAE.initialise(16, 64, 4, init_seed=seed).save(tmp_path / name)
    same = json.loads(prunelens("match", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert [row["tau"] for row in same] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(row["mnn"] == row["greedy"] == row["one_way"] == 1.0 for row in same)
    other = json.loads(prunelens("match", tmp_path / "a", tmp_path / "c", "--json").stdout)
    assert other[-1]["mnn"] < 0.1
    assert "one-way" in prunelens("match", tmp_path / "a", tmp_path / "c").stdout


def test_transfer_and_predict_print_what_python_gives(
    checkpoint_folder, text, tmp_path, monkeypatch, prunelens
):
    """Figures and page, which neither reads, take longer than the study: not drawn."""
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)
    settings = {
        "corpus.source": "files", "corpus.paths": f"[{text}]", "corpus.document": "line",
        "corpus.context_tokens": 16, "corpus.train_tokens": 1600, "corpus.eval_tokens": 800,
        "corpus.calibration_tokens": 800, "transfer.ce_tokens": 64, "transfer.refit_tokens": 320,
    }  # fmt: skip
    study = tmp_path / "study.yaml"
    study.write_text(
        f"models: [{{name: {checkpoint_folder}, layers: [1]}}]\n"
        "prunings: [{criterion: magnitude, scope: global, sparsities: [0.2, 0.4, 0.6, 0.8]}]\n"
        "perplexity: {context_tokens: [16]}\n"
        "sae: {expansion: 4, k: 4, steps: 24, batch_tokens: 64, seeds: [0, 1]}\n"
        "questions: [survival, persistence, predictor]\nthreads_per_stage: 1\n"
    )
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run = prunelens("run", study, "--out", tmp_path / "s", "--quiet", "--workers", "1", *given)
    assert run.returncode == 0, run.stderr
    told = prunelens("predict", tmp_path / "s", "--sparsity", "0.5", "--latents", "3,5", "--json")
    assert {row["latent"] for row in json.loads(told.stdout)} == {3, 5}
    training = pd.read_csv(tmp_path / "s" / "tables" / "sae_training.csv")
    sae = tmp_path / "s" / training["folder"].iloc[0]
    command = ["transfer", sae, checkpoint_folder, "--layer", "1", "--sparsity", "0.5", *given]
    found = in_a_process(*command, "--json")
    assert not found.stderr
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert "1.25" in answer["rule"]
    assert {row["condition"] for row in answer["rows"]} == {"dense", "wanda-row-0.50"}
