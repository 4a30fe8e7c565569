"""The examples run as they are and say what is true; the notebook runs with the bundled model."""

import os
import pathlib
import re
import runpy
import shutil
import sys

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from prunelens.model import load_model

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
NOTEBOOK = FOLDER / "gemma_3_tier_in_20_minutes.ipynb"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)")
BUNDLED = """
MODEL, LAYER, OUT, PLAN_OPTIONS = "bundled", 2, "study", "--no-calibration"
CUTS |= {
    "models.0.dtype": "float32",
    "models.0.short_name": "bundled",
    "models.0.pretrained": "[]",
    "corpus.source": "stdlib",
    "corpus.train_tokens": "10_240",
    "corpus.eval_tokens": "7_680",
    "corpus.calibration_tokens": "5_120",
    "perplexity.corpus": "null",
    "perplexity.max_tokens": "2_048",
    "taus": "[0.7]",
    "transfer.ce_tokens": "512",
    "transfer.refit_tokens": "2_048",
    "sae.expansion": "2",
    "sae.k": "8",
    "sae.steps": "20",
    "sae.batch_tokens": "512",
    "sae.learning_rate": "4e-3",
    "sae.resample_every": "5",
    "threads_per_stage": "1",
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artifacts of the examples that have run: several ask for the same dense SAEs."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys, made):
    """Runs an example in a folder with nothing but such artifacts; returns what it printed.

    Figures and page, which no example reads, take longer than some of the studies: not drawn.
    """

    def run(name, study):
        monkeypatch.chdir(tmp_path)
        artifacts = tmp_path / study / "artifacts"
        shutil.copytree(made, artifacts)
        monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        shutil.copytree(artifacts, made, dirs_exist_ok=True)
        printed = capsys.readouterr().out
        assert not re.search(r"\b(nan|inf|None)\b", printed), printed
        return printed

    return run


def numbers_after(printed, words):
    """The numbers of the first line that starts with those words, without the words'."""
    line = next(line for line in printed.splitlines() if line.strip().startswith(words))
    return [float(number) for number in NUMBER.findall(line.strip().removeprefix(words))]


def test_1_survival_lies_between_its_controls(run_example):
    printed = run_example("1_which_features_survive.py", "runs/example_1")
    (survival,) = numbers_after(printed, "survival, as published (both SAEs share a start):")
    (ceiling,) = numbers_after(printed, "the same start, nothing pruned:")
    (floor,) = numbers_after(printed, "the same start, no feature in common:")
    assert 0 <= floor < survival < ceiling <= 1
    (persistence,) = numbers_after(printed, "persistence (the dense SAE before and after):")
    assert 0 < persistence < 1
    harmed = re.findall(r"^latent \d+: persistence ([\d.]+), noise ([\d.]+)", printed, re.MULTILINE)
    assert len(harmed) == 5
    assert all(float(kept) < float(noise) for kept, noise in harmed)
    assert printed.count("»") == printed.count("«") == 5


def test_2_a_mild_pruning_keeps_the_sae_and_a_ruinous_one_does_not(run_example):
    printed = run_example("2_may_i_keep_my_sae.py", "runs/example_2/study")
    verdicts = dict(re.findall(r"^(\S+): (keep|refit|retrain)$", printed, re.MULTILINE))
    assert list(verdicts) == ["wanda-row-0.30", "magnitude-global-0.50"]
    assert verdicts["magnitude-global-0.50"] == "retrain"
    error, recovered = numbers_after(printed, "magnitude-global-0.50  none")
    dense_error, dense_recovered = numbers_after(printed, "dense                  none")
    assert error > 2 * dense_error
    assert 0 < dense_recovered < 1
    assert 0 < recovered <= 1


def test_3_more_pruning_keeps_fewer_latents(run_example):
    printed = run_example("3_screen_before_pruning.py", "runs/example_3")
    sparsities = ("0.2", "0.4", "0.5", "0.6")
    rows = {sparsity: numbers_after(printed, sparsity) for sparsity in sparsities}
    predicted = [row[0] for row in rows.values()]
    assert predicted == sorted(predicted, reverse=True)
    assert 1 >= predicted[0] > predicted[-1] >= 0
    measured = [rows[sparsity] for sparsity in ("0.2", "0.4", "0.6")]
    assert all(0 <= share <= 1 for row in measured for share in row[1:3])
    assert measured[0][1] > measured[-1][1]
    assert len(rows["0.5"]) == 1


def test_4_the_saved_checkpoint_has_the_sparsity_of_its_name(run_example, tmp_path):
    printed = run_example("4_my_own_checkpoint.py", "runs/example_4/study")
    (dense,) = numbers_after(printed, "perplexity of the dense model:")
    mild = numbers_after(printed, "my_model/L2/wanda-row-0.30")
    strong = numbers_after(printed, "my_model/L2/wanda-row-0.50")
    assert 1 < dense < mild[0] < strong[0]
    assert 1 > mild[1] > strong[1] > 0
    block = load_model(str(tmp_path / "runs/example_4/my_model_pruned")).model.model.layers[0]
    share = (block.mlp.down_proj.weight == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)


@pytest.mark.timeout(600)
def test_notebook_runs_with_the_bundled_model_in_gemmas_place(tmp_path, monkeypatch):
    book = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "has outputs"
    (parameters,) = (
        i for i, c in enumerate(book.cells) if "parameters" in c.metadata.get("tags", [])
    )
    book.cells.insert(parameters + 1, nbformat.v4.new_code_cell(BUNDLED))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    )
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=500, kernel_name="python3", resources=where).execute()
    check_what_the_notebook_made(book, tmp_path)


def check_what_the_notebook_made(book, folder):
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.get("data", {}) for output in outputs]
    figures = list((folder / "study/figures").glob("*.png"))
    assert sum("image/png" in data for data in shown) == len(figures) >= 4
    assert sum("text/html" in data for data in shown) == 2  # the two tables
    rates = pd.read_csv(folder / "study/tables/persistence.csv")["mean_correlation"]
    assert rates.between(0, 1).all()
    assert (folder / "study_explorer.zip").stat().st_size > 100_000
    card = (folder / "study_saes/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
