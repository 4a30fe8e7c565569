import importlib.util
import pathlib
import subprocess
import sys
from fractions import Fraction

import pytest

from prunelens.config import (
    CheckpointConfig,
    ModelConfig,
    PretrainedSaeConfig,
    PruningConfig,
    StudyConfig,
    study_from_data,
)
from prunelens.errors import UserError
from prunelens.study_file import read_study


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sae": {"stepps": 3}}, "sae.stepps: unknown key; did you mean 'steps'?"),
        ({"models": [{"nam": "x"}]}, "models.0.nam: unknown key; did you mean 'name'?"),
        ({"sae": {"k": "many"}}, "sae.k: Input should be a valid integer"),
        ({"sae": {"seeds": [1, 1]}}, "must be distinct"),
        ({"sae": {"seeds": [1]}}, "give at least two"),
        ({"taus": [0.7, 0.5]}, "must rise"),
        ({"corpus": {"source": "hub"}}, "needs a data set id"),
        ({"corpus": {"source": "files"}}, "needs at least one path"),
        ({"name": "../x"}, "name:"),
        (
            {"prunings": [{"criterion": "wanda", "scope": "row", "sparsities": [1.0]}]},
            "1.0 is outside (0, 1)",
        ),
        (
            {"prunings": [{"criterion": "wand", "scope": "row", "sparsities": [0.5]}]},
            "'wand' is no criterion; there are magnitude, wanda, sparsegpt, random, planted",
        ),
        (
            {"prunings": [{"criterion": "planted", "scope": "row", "sparsities": [0.3]}]},
            "'row' does not go with criterion 'planted'",
        ),
        (
            {"prunings": [{"criterion": "planted", "scope": "by_rate", "sparsities": [0.3]}]},
            "no language model has those",
        ),
        (
            {"models": [{"name": "planted", "layers": [0]}]},
            "'transfer' needs a language model",
        ),
        (
            {"sufficiency": {"condition": "wanda-row-0.50"}},
            "sufficiency.condition: 'wanda-row-0.50' is none of the prunings",
        ),
        (
            {"questions": ["warm_start"]},
            "'warm_start' is answered from 'survival'",
        ),
        (
            {"prunings": [{"criterion": "wanda", "scope": "row", "sparsities": [0.5, 0.5]}]},
            "listed twice",
        ),
        (
            {
                "prunings": [
                    {
                        "criterion": "magnitude",
                        "scope": "row",
                        "sparsities": [0.5],
                        "calibration": "sequential",
                    }
                ]
            },
            "'sequential' is for wanda and sparsegpt",
        ),
        (
            {"models": [{"name": "a/one"}, {"name": "a/x"}, {"name": "./b/x/"}]},
            "models.2.short_name: 'x' is what models.1 is called as well",
        ),
        ({"perplexity": {"context_tokens": [256, 1]}}, "perplexity.context_tokens.1: "),
        ({"models": [{"name": "/"}]}, "name: '' gives no name for tables; give a short_name"),
        ([1, 2], "must be a mapping"),
    ],
)
def test_a_wrong_study_is_one_line_that_names_field_and_fix(data, message):
    with pytest.raises(UserError) as error:
        study_from_data(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_a_name_of_their_own_are_called_as_what_they_mean(tmp_path, monkeypatch):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(inner))
    meant = {".": "inner", "./": "inner", "..": "outer", "~": "inner", "~/..": "outer", "x/.": "x"}
    for written, name in meant.items():
        assert ModelConfig(name=written).label == name
        assert PretrainedSaeConfig(layer=3, folder=written).label == name
        assert CheckpointConfig(checkpoint=written).label == name


def test_yaml_numbers_and_duplicate_keys(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("sae:\n  learning_rate: 5e-5\n")
    assert read_study(path).sae.learning_rate == 5e-5
    path.write_text("sae:\n  k: 1\n  k: 2\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_study(path)


def test_settings_replace_fields():
    study = read_study("demo", {"sae.steps": "7", "models.0.layers": "[1, 2]"})
    assert study.sae.steps == 7
    assert study.models[0].layers == (1, 2)
    with pytest.raises(UserError, match="no place in the study"):
        read_study("demo", {"models.9.layers": "[1]"})


def test_a_missing_study_names_the_shipped_ones():
    with pytest.raises(UserError, match="shipped are: demo"):
        read_study("nope")


def test_the_paper_s_hyper_parameters_are_the_defaults():
    sae = StudyConfig().sae
    assert (sae.expansion, sae.k, sae.steps, sae.batch_tokens) == (8, 64, 20_000, 4096)
    assert (sae.learning_rate, sae.resample_interval) == (5e-5, 2000)


def test_sparsity_is_an_exact_decimal_and_names_the_condition():
    pruning = PruningConfig(criterion="wanda", scope="row", sparsity=0.7)
    assert pruning.fraction == Fraction(7, 10)
    assert pruning.label == "wanda-row-0.70"
    fine = PruningConfig(criterion="magnitude", scope="global", sparsity=0.125)
    assert fine.label == "magnitude-global-0.125"


def test_reading_a_study_pulls_no_torch():
    code = (
        "import sys, prunelens.study_file as f\n"
        "f.read_study('demo')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_of_fields_is_true_to_the_code():
    path = pathlib.Path(__file__).parents[1] / "tools" / "write_study_fields.py"
    spec = importlib.util.spec_from_file_location("write_study_fields", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
