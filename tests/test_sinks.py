"""Sinks that only the compressed model has: counted, and FVU with and without them."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from prunelens.activations import Activations, Statistics
from prunelens.analyses.sinks import MOVED, only_compressed
from prunelens.report.page import page
from prunelens.report.sinks import sinks_found
from prunelens.report.summary import print_summary
from prunelens.sae.quality import evaluate_sae
from prunelens.sae.topk import TopKSAE
from prunelens.study.artifacts.store import Stage
from prunelens.study.parents import Sae, sae_role
from prunelens.study.stages import STAGES
from prunelens.study.work import Work, write_json
from synthetic_results import synthetic_runs, synthetic_study, synthetic_tables

D, TOKENS, SINKS = 8, 600, (3, 77, 400)


def test_only_those_that_the_dense_model_has_not():
    dense = torch.tensor([1.0, 1.0, 50.0, 50.0, 10.0])
    pruned = torch.tensor([1.0, 50.0, 1.0, 50.0, 10.0])
    assert only_compressed(dense, pruned, 10.0).tolist() == [False, True, False, False, False]


@pytest.fixture
def made(tmp_path):
    """The stage's table, and what it was made of."""
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(TOKENS, D, generator=draw)
    dense[10] *= 1000  # the dense model's own sink: screened in every condition
    pruned = dense + 0.3 * torch.randn(TOKENS, D, generator=draw)
    direction = torch.randn(D, generator=draw)
    for token in SINKS:
        pruned[token] = 200 * direction / direction.norm()
    parents = {
        role: tmp_path / role for role in ("activations", "dense", "screening", "statistics")
    }
    for path in parents.values():
        path.mkdir()
    kept = torch.tensor([token for token in range(TOKENS) if token != 10])
    for role, rows in (("activations", pruned), ("dense", dense)):
        for split in ("train", "eval"):
            part = rows if split == "eval" else rows[500:].clone()
            norms = torch.linalg.vector_norm(part, dim=1)
            save_file({"activations": part}, parents[role] / f"{split}.safetensors")
            save_file({"norms": norms}, parents[role] / f"{split}_norms.safetensors")
    save_file({"train": torch.arange(100), "eval": kept}, parents["screening"] / "kept.safetensors")
    median = float(torch.linalg.vector_norm(dense, dim=1).median())
    screening = {"dense_median_norm": median, "train_left_out": 0, "eval_left_out": 1}
    write_json(parents["screening"] / "screening.json", screening)
    normal = Statistics(pruned[kept].mean(0), pruned[kept].std(0, correction=0))
    normal.save(parents["statistics"] / "statistics.safetensors")
    variance = float((dense[kept] - dense[kept].mean(0)).double().square().sum())
    data = Activations(parents["activations"] / "eval.safetensors", kept=kept, statistics=normal)
    saes = {}
    for seed in (0, 1):
        saes[seed] = TopKSAE.initialise(D, 24, 3, init_seed=seed)
        folder = parents[sae_role("sae", Sae(seed, seed), plain=True)] = tmp_path / f"sae-{seed}"
        saes[seed].save(folder)
        quality = evaluate_sae(saes[seed], data, dense_variance=variance)
        numbers = {"fvu": quality.fvu, "fvu_dense_var": quality.fvu_dense_var}
        write_json(folder / "quality.json", numbers)
    spread = np.linalg.eigvalsh(np.cov(pruned[kept].double().numpy().T))
    ratio = spread.sum() ** 2 / (spread**2).sum()
    write_json(parents["statistics"] / "variance.json", {"participation_ratio": ratio})
    stage = Stage("sinks", 1, {"max_norm_multiple": 10.0}, {})
    work = Work(stage, parents, tmp_path, tmp_path.mkdir, "cpu", lambda _: None, tmp_path.mkdir)
    STAGES["sinks"].made([work])
    table = pd.read_parquet(tmp_path / "sinks.parquet").set_index("split")
    return table, dense, pruned, kept, saes, normal


def test_they_are_counted_beside_what_was_screened(made):
    table, dense, *_ = made
    assert table["num_tokens"].to_dict() == {"train": 100, "eval": TOKENS}
    assert table["num_left_out"].to_dict() == {"train": 0, "eval": 1}
    assert table["num_sinks"].to_dict() == {"train": 0, "eval": len(SINKS)}
    median = torch.linalg.vector_norm(dense, dim=1).median()
    assert table.loc["eval", "largest_norm"] == pytest.approx(200 / float(median), rel=1e-5)


def test_without_them_is_what_a_plain_reading_of_the_other_tokens_gives(made):
    table, dense, pruned, kept, saes, normal = made
    others = [int(token) for token in kept if token not in SINKS]
    x, y = dense[others].double().numpy(), pruned[others].double().numpy()
    mean, sigma = (part.double().numpy() for part in normal)
    y_hat = (y - mean) / sigma
    fvus, of_dense = [], []
    for sae in saes.values():
        read = sae.decode(sae.encode(torch.tensor(y_hat, dtype=torch.float32)))
        error = y_hat - read.detach().double().numpy()
        fvus.append((error**2).sum() / ((y_hat - y_hat.mean(0)) ** 2).sum())
        of_dense.append(((sigma * error) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    spread = np.linalg.eigvalsh(np.cov(y.T))
    found = table.loc["eval"]
    assert found["fvu_without"] == pytest.approx(np.mean(fvus), rel=1e-5)
    assert found["fvu_dense_var_without"] == pytest.approx(np.mean(of_dense), rel=1e-5)
    ratio = spread.sum() ** 2 / (spread**2).sum()
    assert found["participation_ratio_without"] == pytest.approx(ratio, rel=1e-5)
    assert found["participation_ratio"] < 2 < 6 < ratio  # three of 599 tokens were the variance


def study_with(num_sinks):
    study = synthetic_study(layers=(6,))
    tables = synthetic_tables(study)
    run = tables["sae_quality"]["run"].iloc[-1]
    row = {
        "run": run,
        "split": "eval",
        "num_tokens": 1000,
        "num_left_out": 4,
        "largest_norm": 212.0,
    }
    moved = dict(zip(MOVED, (3.1, 0.48, 1.01), strict=True))
    without = {f"{name}_without": v for name, v in zip(MOVED, (41.2, 0.63, 0.7), strict=True)}
    tables["sinks"] = pd.DataFrame([{**row, "num_sinks": num_sinks, **moved, **without}])
    return study, tables, run


def test_page_and_summary_name_them_beside_what_they_move(tmp_path, capsys):
    study, tables, run = study_with(12)
    said = (
        f"{run}: 12 of 996 eval tokens have a norm above the limit after compression alone, up to"
        " 212 dense medians; FVU 0.48 (0.63 without them), participation ratio 3.1 (41.2 without"
        " them)"
    )
    runs = synthetic_runs(study)
    text = page(tmp_path, tables, runs, study)
    assert said in text
    sections = text.split('<section aria-labelledby="')[1:]
    named = {part.split('"')[0] for part in sections if "Sinks of their own move" in part}
    asked = {part.split('"')[0] for part in sections}
    assert named == asked - {"perplexity", "selftest", "verdicts", "study"} and len(named) > 6
    print_summary(tables, runs)
    assert said in " ".join(capsys.readouterr().out.split())


def test_where_there_are_none_nothing_is_said(tmp_path):
    study, tables, _ = study_with(0)
    assert sinks_found(tables) == sinks_found({}) == []
    assert "Sinks of their own" not in page(tmp_path, tables, synthetic_runs(study), study)
