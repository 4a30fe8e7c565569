"""NaN and infinity in models and SAEs of others: that run fails, with the place named."""

import copy
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from prunelens.config import study_from_data
from prunelens.report.write import run_and_report

QUESTIONS = ["stability", "survival"]


def changed_model(original, folder, name, change):
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(original, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoilt(weight):
    weight.view(-1)[7] = math.nan
    return weight


@pytest.fixture
def data(tiny_data):
    data = copy.deepcopy(tiny_data)
    data["prunings"] = data["prunings"][:1]
    data["questions"] = QUESTIONS
    return data


def run(data, folder):
    outcome = run_and_report(study_from_data(data), folder, quiet=True)
    return {result.run.name: result for result in outcome.results}


def test_a_model_with_nan_fails_and_the_other_model_goes_on(data, checkpoint_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = changed_model(checkpoint_folder, tmp_path / "spoilt", name, spoilt)
    data["models"].append({"name": str(bad), "layers": [1, 2]})
    results = run(data, tmp_path / "out")
    for result in results.values():
        assert result.status == ("failed" if "spoilt" in result.run.name else "done")
    reasons = {name: r.reason for name, r in results.items() if r.status == "failed"}
    assert len(reasons) == 4
    for reason in reasons.values():
        assert "block 1 is the first to give NaN" in reason or "layers.1.mlp.up_proj" in reason
        assert "\n" not in reason and "traceback" not in reason


def test_nan_above_the_site_is_found_as_well(data, checkpoint_folder, tmp_path):
    """The activations at the site are finite; the model's output is not."""
    name = "model.layers.2.mlp.down_proj.weight"
    bad = changed_model(checkpoint_folder, tmp_path / "spoilt", name, spoilt)
    data["models"] = [{"name": str(bad), "layers": [1]}]
    data["prunings"] = []
    (result,) = run(data, tmp_path / "out").values()
    assert result.status == "failed" and "block 2 is the first to give NaN" in result.reason


def test_a_model_that_overflows_in_float16(data, checkpoint_folder, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    bad = changed_model(checkpoint_folder, tmp_path / "big", name, lambda w: w * 3e4)
    good = {**data["models"][0], "dtype": "float16"}
    data["models"] = [good, {"name": str(bad), "layers": [1], "dtype": "float16"}]
    data["prunings"] = []
    results = run(data, tmp_path / "out")
    assert [r.status for r in results.values()] == ["done", "failed"]
    reason = list(results.values())[1].reason
    assert "float16" in reason and "block 0 is the first to give" in reason


def test_a_checkpoint_with_nan_fails_its_condition_alone(data, checkpoint_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = changed_model(checkpoint_folder, tmp_path / "spoilt", name, spoilt)
    data["prunings"].append({"checkpoint": str(bad), "name": "theirs"})
    results = run(data, tmp_path / "out")
    failed = [r for r in results.values() if r.status == "failed"]
    assert len(failed) == 1 and len(results) == 3
    assert "layers.1.mlp.up_proj" in failed[0].reason and "theirs" in failed[0].reason


def test_an_sae_of_others_with_nan_is_refused_by_name(data, finished, tmp_path):
    sae = tmp_path / "their-sae"
    shutil.copytree(next((finished.folder / "artifacts" / "sae").iterdir()), sae)
    weights = load_file(sae / "sae.safetensors")
    first = sorted(weights)[0]
    save_file({**weights, first: spoilt(weights[first])}, sae / "sae.safetensors")
    data["models"][0]["pretrained"] = [{"folder": str(sae), "layer": 1}]
    data["questions"] = [*QUESTIONS, "transfer"]
    results = run(data, tmp_path / "out")
    told = {r.reason for r in results.values() if r.status == "failed"}
    assert len(told) == 1
    assert "their-sae" in told.pop()
