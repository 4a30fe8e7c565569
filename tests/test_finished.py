"""A finished study is held as DataFrames, and its SAEs by condition and seed."""

from __future__ import annotations

import pathlib

import pandas as pd
import pytest
import torch

from prunelens.errors import UserError
from prunelens.sae.topk import TopKSAE
from prunelens.study.finished import Study, match_saes, sae_place


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A study of two conditions and two seeds, with a control, laid out as `run` leaves it."""
    return laid(tmp_path / "mine", ["m/L1/dense", "m/L1/wanda-row-0.50"])


def laid(folder: pathlib.Path, runs: list[str]) -> pathlib.Path:
    rows = []
    for run in runs:
        for seed, data_seed, rotated in ((0, 0, False), (1, 1, False), (0, 1, False), (0, 1, True)):
            place = f"artifacts/sae/{len(rows)}"
            with torch.random.fork_rng():
                torch.manual_seed(len(rows))
                TopKSAE(4, 8, k=2).save(folder / place)
            rows.append([run, seed, data_seed, rotated, place, "own"])
    rows.append([runs[0], 0, 0, False, "artifacts/sae/none", "warm"])
    names = ["run", "init_seed", "data_seed", "rotated", "folder", "training"]
    (folder / "tables").mkdir()
    pd.DataFrame(rows, columns=names).to_csv(folder / "tables/sae_training.csv", index=False)
    (folder / "study.yaml").write_text("name: mine\n")
    return folder


def test_saes_have_names_and_controls_have_none(folder: pathlib.Path) -> None:
    saes = Study(folder).saes()
    assert list(saes) == ["dense:0", "dense:1", "wanda-row-0.50:0", "wanda-row-0.50:1"]
    assert saes["wanda-row-0.50:1"] == folder / "artifacts/sae/5"
    wanted = TopKSAE.load(folder / "artifacts/sae/5").decoder_weight
    assert torch.equal(Study(folder).sae("wanda-row-0.50", seed=1).decoder_weight, wanted)
    assert sae_place(f"{folder}:dense:1") == folder / "artifacts/sae/1"
    assert sae_place(folder / "artifacts/sae/1") == folder / "artifacts/sae/1"
    assert sae_place("release:sae_id") == pathlib.Path("release:sae_id")
    by_name = match_saes(f"{folder}:dense:0", f"{folder}:wanda-row-0.50:0")
    assert by_name == match_saes(folder / "artifacts/sae/0", folder / "artifacts/sae/4")


def test_several_layers_are_told_by_the_whole_name_of_the_run(tmp_path: pathlib.Path) -> None:
    folder = laid(tmp_path / "mine", ["m/L1/dense", "m/L2/dense"])
    assert list(Study(folder).saes()) == [
        "m/L1/dense:0", "m/L1/dense:1", "m/L2/dense:0", "m/L2/dense:1",
    ]  # fmt: skip
    assert sae_place(f"{folder}:m/L2/dense:1") == folder / "artifacts/sae/5"


def test_tables_keep_words_and_say_what_is_undefined(folder: pathlib.Path) -> None:
    (folder / "tables/mine.csv").write_text("source,value,reason\nnull,,'=1+1\npruned,0.5,\n")
    table = Study(folder).table("mine")
    assert table["source"].tolist() == ["null", "pruned"]
    assert table["value"].isna().tolist() == [True, False]
    assert table["reason"][0] == "=1+1"  # as it was before a spreadsheet could run it
    assert Study(folder).runs.empty
    pd.DataFrame({"latent": [1]}).to_parquet(folder / "latents.parquet")
    assert Study(folder).latents["latent"].tolist() == [1]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda study: study.table("sae_trainin"), ["table", "'sae_trainin'", "'sae_training'"]),
        (lambda study: study.answers, ["table", "'answers'"]),
        (lambda study: study.latents, ["latents.parquet"]),
        (lambda study: study.sae("dense", seed=7), ["'dense:7'", "did you mean 'dense:"]),
        (lambda study: study.sae("wanda-row-0.5"), ["'wanda-row-0.50:0'"]),
        (lambda study: sae_place(f"{study.folder}:dens:0"), ["'dens:0'", "'dense:0'"]),
        (lambda study: Study(study.folder / "tables"), ["study", "study.yaml"]),
    ],
)
def test_mistakes_are_told_in_one_line(folder: pathlib.Path, ask, words: list[str]) -> None:
    with pytest.raises(UserError) as told:
        ask(Study(folder))
    assert all(word in str(told.value) for word in words), told.value
    assert "\n" not in str(told.value)


def test_artifacts_that_are_elsewhere_are_named(folder: pathlib.Path) -> None:
    (folder / "artifacts").rename(folder / "moved")
    with pytest.raises(UserError, match="is not there; give its folder"):
        Study(folder).sae("dense")
