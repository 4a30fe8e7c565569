"""Every way to make a pruned condition, through a study: made once, made again bit for bit."""

import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import tiny_language_model
from prunelens.checkpoint import model_shape
from prunelens.config import ModelConfig, PruningConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import load_model
from prunelens.prune import as_matrix, prunable_matrices, prune_model
from prunelens.prune.compare import check_takes_place, compare_weights
from prunelens.report.explorer.collect import study_explorer
from prunelens.report.write import run_and_report
from prunelens.study.conditions import load_condition
from prunelens.study.exports import export_checkpoint
from prunelens.study.folder import open_study
from prunelens.study.footprint import disk_use
from prunelens.study.plan import plan_study
from prunelens.study.results import study_results


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Figures and page take longer than the studies themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        patch.setattr("prunelens.report.write.write_page", lambda *_: None)
        yield


QUESTIONS = ["persistence", "survival", "predictor", "evidence"]


@pytest.fixture(scope="module")
def other_checkpoint(checkpoint_folder, tmp_path_factory):
    """The tiny Llama as others changed it: first matrix halved by zeros, another doubled."""
    folder = tmp_path_factory.mktemp("other") / "sparse-1.5"
    shutil.copytree(checkpoint_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][::2] = 0
    tensors["model.layers.2.mlp.down_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def study_data(checkpoint_folder, text_path, prunings, questions=()):
    return {
        "name": "conditions",
        "models": [{"name": str(checkpoint_folder), "layers": [1]}],
        "corpus": {
            "source": "files",
            "paths": [str(text_path)],
            "document": "line",
            "context_tokens": 16,
            "train_tokens": 1600,
            "eval_tokens": 800,
            "calibration_tokens": 800,
        },
        "perplexity": {"context_tokens": [16]},
        "prunings": prunings,
        "sae": {"steps": 20, "batch_tokens": 128, "expansion": 2, "k": 4, "seeds": [0, 1]},
        "transfer": {"refit_tokens": 160, "ce_tokens": 160},
        "questions": list(questions),
        "threads_per_stage": 1,
    }


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    words = np.random.default_rng(0).choice(["def greet(name):", "return 'hello '", "fox"], 3000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{' '.join(words[n : n + 6])} {n}" for n in range(0, 3000, 6)))
    return path


@pytest.fixture(scope="module")
def finished(checkpoint_folder, other_checkpoint, text_path, tmp_path_factory):
    """A study of four ways to prune, run to the end, and its plan and store."""
    prunings = [
        {"criterion": "random", "scope": "matrix", "sparsities": [0.3]},
        {"criterion": "wanda", "scope": "row", "pattern": "2:4", "sparsities": [0.5]},
        {"criterion": "sparsegpt", "scope": "matrix", "sparsities": [0.5]},
        {"checkpoint": str(other_checkpoint)},
    ]
    study = study_from_data(study_data(checkpoint_folder, text_path, prunings, QUESTIONS))
    out = tmp_path_factory.mktemp("finished") / "study"
    outcome = run_and_report(study, out, quiet=True, device="cpu", workers=1)
    assert {result.status for result in outcome.results} == {"done"}, outcome.results
    return open_study(out)


def condition(finished, label):
    plan, store = finished
    run = next(run for run in plan.runs if run.name.endswith(label))
    return run, store


def rebuilt(finished, label):
    run, store = condition(finished, label)
    stage = run.stages["prune"]
    return load_condition(stage.source, store.read(stage), device="cpu"), store.read(stage)


def test_every_condition_has_tables(finished, other_checkpoint):
    tables = study_results(*finished)
    perplexity = tables["perplexity"].set_index("run")
    names = [
        "random-matrix-0.30-seed0",
        "wanda-row-2of4-0.50",
        "sparsegpt-matrix-0.50",
        "sparse-1.5",
    ]
    rows = perplexity.loc[[f"tiny-llama/L1/{name}" for name in names]]
    assert list(rows["method"]) == ["random", "wanda", "sparsegpt", "checkpoint"]
    assert list(rows["pattern"]) == ["unstructured", "2:4", "unstructured", ""]
    assert rows["perplexity"].notna().all() and rows["perplexity"].nunique() == 4
    achieved = rows["achieved_sparsity"].to_numpy()
    assert achieved[1] == 0.5 and achieved[0] == pytest.approx(0.3, abs=1e-3)
    assert rows["sparsity"].iloc[3] == achieved[3] > 0
    assert set(tables["persistence"]["run"]) >= set(rows.index)
    folders = tables["sae_training"]
    assert len(folders) > 0


def test_the_explorer_places_a_checkpoint_at_its_measured_sparsity(finished):
    [view] = study_explorer(*finished).views
    found = {condition.label: condition.sparsity for condition in view.conditions}
    measured = study_results(*finished)["perplexity"].set_index("run")["achieved_sparsity"]
    assert found["sparse-1.5"] == measured["tiny-llama/L1/sparse-1.5"]
    assert found["sparsegpt-matrix-0.50"] == 0.5


def test_the_predictor_leaves_checkpoints_out(finished):
    predictor = study_results(*finished)["predictor"]
    assert set(predictor["num_conditions"].dropna()) == {3}


@pytest.fixture(scope="module")
def twin(finished, tmp_path_factory):
    """The folder of the same conditions, made once more by another study."""
    out = tmp_path_factory.mktemp("twin") / "study"
    study = finished[0].study.model_copy(update={"questions": ()})
    outcome = run_and_report(study, out, quiet=True, device="cpu", workers=1)
    assert {result.status for result in outcome.results} == {"done"}
    return out


@pytest.mark.parametrize("label", ["sparsegpt-matrix-0.50", "wanda-row-2of4-0.50"])
def test_a_condition_is_made_again_bit_for_bit(finished, twin, label):
    """Twice from the artifact, and once from scratch in another study."""
    lm, folder = rebuilt(finished, label)
    again, _ = rebuilt(finished, label)
    states = lm.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    other = twin / folder.relative_to(finished[1].root.parent)
    facts = json.loads((folder / "prune.json").read_text())
    assert facts == json.loads((other / "prune.json").read_text())
    assert bool(facts["weights_sha256"]) == label.startswith("sparsegpt")
    shares = [(as_matrix(m) == 0).float().mean() for m in prunable_matrices(lm).values()]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)


def test_a_study_prunes_the_head_and_passes_it_on(checkpoint_folder, text_path, tmp_path):
    """Beside the same pruning of the blocks alone; made again, told in cards, counted in plans."""
    pruning = {"criterion": "magnitude", "scope": "global", "sparsities": [0.4]}
    prunings = [pruning | {"lm_head": True}, pruning]
    study = study_from_data(study_data(checkpoint_folder, text_path, prunings))
    run_and_report(study, tmp_path / "study", quiet=True, device="cpu", workers=1)
    finished = open_study(tmp_path / "study")
    stages = [condition(finished, f"0.40{tail}")[0].stages["prune"] for tail in ("-head", "")]
    assert stages[0].identity != stages[1].identity
    assert "lm_head" not in stages[1].config["pruning"]  # as before there was the option
    assert stages[0].cost >= stages[1].cost

    perplexity = study_results(*finished)["perplexity"].set_index("run")
    for tail, with_head in (("-head", True), ("", False)):
        lm, folder = rebuilt(finished, f"0.40{tail}")
        expected = load_model(ModelConfig(name=str(checkpoint_folder)))
        config = PruningConfig(
            criterion="magnitude", scope="global", sparsity=0.4, lm_head=with_head
        )
        report = prune_model(expected, config).report
        theirs = expected.model.state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in lm.model.state_dict().items())
        matrices = pd.read_parquet(folder / "matrices.parquet")
        assert list(matrices["name"]) == [line.name for line in report]
        assert ("lm_head" in set(matrices["name"])) == with_head
        total = int(matrices["num_weights"].sum())
        name = f"magnitude-global-0.40{tail}"
        row = perplexity.loc[f"tiny-llama/L1/{name}"]
        assert row["achieved_sparsity"] == int(Fraction(2, 5) * total) / total

        found = export_checkpoint(tmp_path / "study", name, tmp_path / f"out{tail}")
        card = (found.folder / "README.md").read_text(encoding="utf-8")
        facts = json.loads((found.folder / "prunelens.json").read_text())
        assert ("and of its output head" in card) == with_head
        assert ("lm_head" in facts["achieved_sparsity_by_kind"]) == with_head
        assert facts["pruning"].get("lm_head", False) == with_head
    heads = disk_of(study, [pruning | {"lm_head": True}]), disk_of(study, [pruning])
    assert heads[0] - heads[1] == lm.d_model * lm.vocabulary_size / 8  # one bit a weight


def disk_of(study, prunings):
    """The bytes of masks that a plan foresees for such prunings."""
    study = study_from_data({**study.model_dump(mode="json"), "prunings": prunings})
    shapes = {model.label: model_shape(model) for model in study.models}
    return disk_use(study, shapes, []).masks


def test_a_pattern_leaves_two_of_four(finished):
    lm, _ = rebuilt(finished, "wanda-row-2of4-0.50")
    for module in prunable_matrices(lm).values():
        groups = (as_matrix(module) == 0).reshape(-1, 4).sum(1)
        assert (groups == 2).all()


@pytest.mark.parametrize("what", ["masks.safetensors", "weights-00001.safetensors", "missing"])
def test_what_was_changed_on_disk_is_not_taken(finished, what, tmp_path):
    run, store = condition(finished, "sparsegpt-matrix-0.50")
    stage = run.stages["prune"]
    folder = shutil.copytree(store.read(stage), tmp_path / "copy")
    if what == "missing":
        (folder / "weights-00000.safetensors").unlink()
    else:
        path = folder / what
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not what was written; prune the model again"):
        load_condition(stage.source, folder, device="cpu")


def test_weights_of_another_dtype_are_refused(finished):
    run, store = condition(finished, "sparsegpt-matrix-0.50")
    stage = run.stages["prune"]
    model = stage.source.model.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(UserError, match="load the model as it was pruned"):
        load_condition(stage.source._replace(model=model), store.read(stage), device="cpu")


# Checkpoints of others


def test_a_checkpoint_is_loaded_and_measured(finished, checkpoint_folder, other_checkpoint):
    lm, folder = rebuilt(finished, "sparse-1.5")
    expected = load_file(other_checkpoint / "model.safetensors")
    assert all(torch.equal(lm.model.state_dict()[n], tensor) for n, tensor in expected.items())
    assert lm.tokenizer is not None
    facts = json.loads((folder / "prune.json").read_text())
    rows = pd.read_parquet(folder / "matrices.parquet").set_index("name")
    dense = load_file(checkpoint_folder / "model.safetensors")
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
    moved = dense[f"{first}.weight"][::2].double().square().sum()
    assert rows.loc[first, "achieved"] == 0.5
    whole = dense[f"{first}.weight"].double().square().sum()
    assert rows.loc[first, "weight_difference"] == pytest.approx(math.sqrt(moved / whole))
    assert rows.loc[last, "weight_difference"] == pytest.approx(1.0)
    assert (rows.drop([first, last])["weight_difference"] == 0).all()
    norms = sum(dense[f"{name}.weight"].double().square().sum() for name in rows.index)
    moved = moved + dense[f"{last}.weight"].double().square().sum()
    assert facts["weight_difference"] == pytest.approx(math.sqrt(moved / norms))
    assert facts["achieved_sparsity"] == rows["num_zeroed"].sum() / rows["num_weights"].sum()
    kinds = facts["by_kind"]
    assert kinds["self_attn.q_proj"]["achieved_sparsity"] == pytest.approx(1 / 6)
    assert kinds["mlp.up_proj"] == {"achieved_sparsity": 0.0, "weight_difference": 0.0}
    assert facts["quantised"] == ""


def test_the_dense_model_itself_differs_in_nothing(tiny_lm):
    check_takes_place(tiny_lm, tiny_lm)
    compared = compare_weights(tiny_lm, tiny_lm).as_json()
    assert compared["weight_difference"] == 0 and compared["achieved_sparsity"] == 0


def test_other_files_are_another_condition(
    checkpoint_folder, other_checkpoint, text_path, tmp_path
):
    """The name does not matter, the content does."""

    def identity(folder, **fields):
        prunings = [{"checkpoint": str(folder), **fields}]
        study = study_from_data(study_data(checkpoint_folder, text_path, prunings))
        return plan_study(study).runs[-1].stages["prune"].identity

    copy = shutil.copytree(other_checkpoint, tmp_path / "copy")
    before = identity(other_checkpoint)
    assert identity(copy, name="renamed") == before
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert identity(copy) != before


def changed_config(**changes):
    config = tiny_language_model("llama").model.config
    for name, value in changes.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "number of blocks is 2, the model's is 3"),
        ({"vocab_size": 100}, "vocabulary size is 100"),
        ({"intermediate_size": 44}, r"mlp\.down_proj is 16 x 44, the model's is 16 x 40"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(changes, message, tiny_llama):
    from prunelens.model import as_language_model

    other = as_language_model(changed_config(**changes), label="other")
    with pytest.raises(UserError, match=f"prunings.checkpoint: 'other'.*{message}"):
        check_takes_place(tiny_llama, other)


def test_another_architecture_or_tokenizer_is_refused(checkpoint_folder, tmp_path):
    dense = load_model(str(checkpoint_folder))
    with pytest.raises(UserError, match="architecture is GPT2LMHeadModel"):
        check_takes_place(dense, tiny_language_model("gpt2"))
    copy = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="it has another tokenizer"):
        check_takes_place(dense, load_model(ModelConfig(name=str(copy))))


def test_broken_weights_of_a_checkpoint_are_named(tiny_llama):
    other = tiny_language_model("llama")
    as_matrix(other.blocks[1].mlp.up_proj)[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj are NaN or infinite"):
        compare_weights(tiny_llama, other)


def test_a_missing_checkpoint_is_told_as_one(checkpoint_folder, text_path, tmp_path):
    data = study_data(checkpoint_folder, text_path, [{"checkpoint": str(tmp_path / "nowhere")}])
    with pytest.raises(UserError, match=r"prunings\.checkpoint: the folder .*nowhere"):
        plan_study(study_from_data(data))


def test_a_quantised_checkpoint_names_the_package_that_it_needs(
    checkpoint_folder, tmp_path, monkeypatch
):
    copy = shutil.copytree(checkpoint_folder, tmp_path / "quantised")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match=r"bitsandbytes.*pip install bitsandbytes"):
        load_model(str(copy))


def test_two_models_and_a_checkpoint_are_refused(checkpoint_folder, text_path):
    data = study_data(checkpoint_folder, text_path, [{"checkpoint": "/x/y"}])
    data["models"] += [{"name": "bundled"}]
    with pytest.raises(UserError, match=r"prunings\.checkpoint: it takes the place of one model"):
        study_from_data(data)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_a_quantised_checkpoint_is_measured_as_what_it_stands_for(package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=in_eight_bits(package), dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "quantised")
    dense, other = (load_model(str(tmp_path / name)) for name in ("dense", "quantised"))
    check_takes_place(dense, other)
    compared = compare_weights(dense, other).as_json()
    assert compared["quantised"] == package
    assert 0.002 < compared["weight_difference"] < 0.02  # one of 255 steps per largest weight
    with pytest.raises(UserError, match="prune the float checkpoint"):
        prunable_matrices(other)


def in_eight_bits(package):
    if package == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
