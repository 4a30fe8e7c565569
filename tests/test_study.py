"""The study runner on a tiny model: plan, run, resume, fail, repair."""

import json
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.page import page
from prunelens.report.paper_tables import write_paper_tables
from prunelens.report.summary import print_summary
from prunelens.report.tables import write_tables
from prunelens.report.write import run_and_report
from prunelens.sae.architectures import load_sae
from prunelens.study import conclude, stages
from prunelens.study.artifacts.store import Store
from prunelens.study.finished import Study
from prunelens.study.folder import read_runs, study_status
from prunelens.study.matrix import parents_first
from prunelens.study.plan import plan_study
from prunelens.study.predict import predict_latents
from prunelens.study.results import latent_meanings, study_results, table_columns
from tiny_study import run_with_pool, tiny_study, write_text

FIGURES = (
    "fig1_seed_stability", "fig2_survival", "fig3_transfer", "fig4_fragility",
    "fig5_fragility_by_method", "fig6_causal",
)  # fmt: skip
PAPER_TABLES = (
    "table1_perplexity", "table2_transfer", "table3_fragility", "table4_causal", "tableA1_matrix",
    "tableB1_quality", "depth",
)  # fmt: skip


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures and page take longer than the study itself; `finished` is drawn before this."""
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)


@pytest.fixture
def data(checkpoint_folder, text_file):
    return tiny_study(checkpoint_folder, text_file)


@pytest.fixture(scope="module")
def finished(checkpoint_folder, text_file, tmp_path_factory, pool):
    """One finished study and its outcome, shared by the tests that only look."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    study = study_from_data(tiny_study(checkpoint_folder, text_file))
    outcome = run_with_pool(study, out, pool)
    return study, out, outcome


def tables_of(out):
    return {p.name: p.read_bytes() for p in sorted((out / "tables").glob("*.csv"))}


def test_a_finished_study_keeps_the_contract(finished):
    _, out, outcome = finished
    assert {r.status for r in outcome.results} == {"done"}
    for name in ("study.yaml", "environment.json", "runs.csv", "latents.parquet"):
        assert (out / name).is_file()
    for name, columns in table_columns().items():
        if name in ("selftest", "selftest_null", "coverage"):  # of the planted world alone
            continue
        if name in ("concepts", "concept_rarity", "probes"):  # of a text that has labels
            continue
        table = pd.read_csv(out / "tables" / f"{name}.csv")
        assert list(table.columns) == columns
        assert table.columns[0] == "run"
        assert len(table)
    for name in PAPER_TABLES:
        assert pd.read_csv(out / "tables" / f"{name}.csv").columns[0] == "run"
    assert (out / "report.html").stat().st_size > 10_000
    for figure in FIGURES:
        for suffix in (".png", ".pdf"):
            assert (out / "figures" / f"{figure}{suffix}").stat().st_size > 1000
    runs = pd.read_csv(out / "runs.csv", keep_default_na=False)
    assert list(runs["run"]) == [
        "tiny-llama/L1/dense",
        "tiny-llama/L1/magnitude-global-0.50",
        "tiny-llama/L1/wanda-row-0.30",
    ]


def test_its_answers_and_saes_are_had_by_name(finished, prunelens):
    _, out, _ = finished
    study = Study(out)
    answers = dict(zip(study.answers["run"], study.answers["answer"], strict=True))
    assert list(answers) == study.runs["run"].tolist()[1:]
    rows = json.loads(prunelens("status", out, "--json").stdout)
    assert {row["run"]: row["answer"] for row in rows} == {**answers, "tiny-llama/L1/dense": ""}
    said = " ".join(prunelens("status", out).stdout.split())
    assert all(f"{run}: {' '.join(answer.split())}" in said for run, answer in answers.items())
    listed = json.loads(prunelens("match", out, "--json").stdout)
    assert list(listed) == [
        f"{out}:{condition}:{seed}"
        for condition in ("dense", "magnitude-global-0.50", "wanda-row-0.30")
        for seed in (0, 1)
    ]
    one, other, *_ = listed
    by_name, by_folder = (
        prunelens("match", *pair, "--json").stdout
        for pair in ((one, other), (listed[one], listed[other]))
    )
    assert by_name == by_folder
    sae = study.sae("wanda-row-0.30", seed=1)
    assert torch.equal(
        sae.decoder_weight, load_sae(listed[f"{out}:wanda-row-0.30:1"]).decoder_weight
    )


def test_all_arms_at_all_taus_in_both_coordinates(finished):
    _, out, _ = finished
    survival = pd.read_csv(out / "tables" / "survival.csv")
    dense = survival[survival["method"] == "dense"]
    pruned = survival[survival["method"] != "dense"]
    assert set(dense["arm"]) == {
        *("ceiling_shared", "floor_shared", "ceiling_cross", "chance"),
        *("ceiling_warm", "floor_warm"),
    }
    for _, part in pruned.groupby("run"):
        assert set(part["arm"]) == {"shared_init", "shared_start", "cross_init", "warm_start"}
    assert set(survival["tau"]) == {0.5, 0.6, 0.7, 0.8, 0.9}
    assert set(survival["coordinates"]) == {"normalised", "raw"}


def test_latents_have_one_row_per_run_seed_and_latent(finished):
    study, out, _ = finished
    latents = pd.read_parquet(out / "latents.parquet")
    assert len(latents) == 3 * len(study.sae.seeds) * 64
    assert not latents.duplicated(["run", "seed", "latent"]).any()
    arms = "|".join(pd.read_csv(out / "tables" / "survival.csv")["arm"].unique())
    told = {re.sub(rf"_({arms})$", "_<arm>", name) for name in latents}
    assert told == set(latent_meanings()) - {"concept"}  # of a text that has labels
    pruned = latents[latents["method"] != "dense"]
    assert pruned["cosine_shared_init"].notna().all()
    assert pruned["cosine_cross_init"].notna().all()
    rates = pd.read_csv(out / "tables" / "survival.csv")
    row = rates[
        (rates["arm"] == "shared_init")
        & (rates["coordinates"] == "normalised")
        & (rates["tau"] == 0.7)
    ].iloc[0]
    same = pruned[(pruned["run"] == row["run"]) & (pruned["seed"] == row["init_a"])]
    mnn = (same["mutual_shared_init"].astype(bool) & (same["cosine_shared_init"] >= 0.7)).mean()
    assert mnn == pytest.approx(row["mnn"])
    quality = pd.read_csv(out / "tables" / "sae_quality.csv").iloc[0]
    first = latents[(latents["run"] == quality["run"]) & (latents["seed"] == quality["seed"])]
    assert (first["firing_rate"] > 0).sum() == quality["alive"]
    assert first["firing_rate"].sum() == pytest.approx(quality["l0"])


def test_fates_fragility_and_transfer_say_the_same_as_the_tables_they_come_from(finished):
    study, out, _ = finished
    latents = pd.read_parquet(out / "latents.parquet")
    fragility = pd.read_csv(out / "tables" / "fragility.csv")
    run = latents["run"][latents["method"] == "wanda"].iloc[0]
    dense = latents[latents["method"] == "dense"].set_index(["seed", "latent"])
    fate = latents[latents["run"] == run].set_index(["seed", "latent"])
    means = []
    for seed in study.sae.seeds:
        rates = dense.loc[seed, "firing_rate"]
        alive = rates[rates > 0].sort_values(kind="stable").index
        rarest = alive[: len(alive) // 5 + (len(alive) % 5 > 0)]
        matched = fate.loc[seed, "mutual_shared_init"] & (
            fate.loc[seed, "cosine_shared_init"] >= 0.5
        )
        means.append(matched.loc[rarest].mean())
    row = fragility[
        (fragility["run"] == run)
        & (fragility["measure"] == "shared_init")
        & (fragility["tau"] == 0.5)
        & (fragility["quintile"] == 1)
    ].iloc[0]
    assert row["survival_rate"] == pytest.approx(np.mean(means))
    by_run = fragility.groupby("method")["measure"].agg(set)
    controls = {"ceiling_shared", "floor_shared", "ceiling_cross", "chance"}
    assert by_run["dense"] == controls
    arms = {"shared_init", "shared_start", "cross_init"}
    assert by_run["wanda"] == arms | {
        *("persistence", "persistence_undone", "excess_isotropic", "excess_shuffled"),
        *("relative_isotropic", "relative_shuffled", "scaling"),
    }

    transfer = pd.read_csv(out / "tables" / "transfer.csv")
    quality = pd.read_csv(out / "tables" / "sae_quality.csv")
    own = transfer[(transfer["method"] == "dense") & (transfer["positions"] == "without_first")]
    own = own[(own["sae"] == "seed 0") & (own["refit"] == "none")].iloc[0]
    judged = quality[(quality["method"] == "dense") & (quality["seed"] == 0)].iloc[0]
    for column in ("fvu_raw", "l0"):  # the SAE's own eval, screened: the same tokens here
        assert own[column] == pytest.approx(judged[column], rel=1e-3)
    missing = transfer[transfer["sae"] == "pretrained"]
    assert missing["fvu"].isna().all()
    assert missing["reason"].str.contains("no pretrained SAE").all()
    assert set(transfer["verdict"].dropna()) <= {"keep", "refit", "retrain", "undecided"}


def test_prediction_before_pruning(finished):
    _, out, _ = finished
    table = predict_latents(out, sparsity=0.4)
    assert sorted(table["latent"]) == list(range(64))
    known = table["persistence"].dropna()
    assert known.between(0, 1).all()
    assert list(known) == sorted(known)
    some = predict_latents(out, sparsity=0.4, latents=[3, 5], seed=1)
    assert set(some["latent"]) == {3, 5}
    for arguments, message in (
        ({"sparsity": 1.4}, "1.4"),
        ({"sparsity": 0.4, "latents": [99]}, "99 is no latent"),
        ({"sparsity": 0.4, "seed": 7}, "7 is none of"),
        ({"sparsity": 0.4, "run": "nope"}, "'nope' is no dense run"),
    ):
        with pytest.raises(UserError, match=message):
            predict_latents(out, **arguments)


def test_an_sae_of_others_has_its_own_rows_and_its_l0_is_checked(data, finished, tmp_path):
    """Here one of our own, saved elsewhere: without quality.json its nominal L0 is its k."""
    study, out, _ = finished
    stage = next(iter(plan_study(study).runs[0].saes.values()))
    given = tmp_path / "given"
    given.mkdir()
    for name in ("sae.json", "sae.safetensors", "normalisation.safetensors"):
        subprocess.run(["cp", out / "artifacts" / "sae" / stage.identity / name, given], check=True)
    data["models"][0]["pretrained"] = [{"layer": 1, "folder": str(given)}]
    data["questions"] = ["persistence", "transfer"]
    data["sae"]["seeds"] = [0]
    shutil.copytree(out / "artifacts", tmp_path / "s" / "artifacts")
    outcome = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    table = pd.read_csv(tmp_path / "s" / "tables" / "transfer.csv")
    numbers = ["fvu", "fvu_raw", "fvu_dense_var", "l0"]
    ours, theirs = (
        table[table["sae"] == name].set_index(["run", "positions", "refit"])[numbers]
        for name in ("seed 0", "given")
    )
    pd.testing.assert_frame_equal(ours, theirs)
    moved = tmp_path / "moved"
    given.rename(moved)
    data["models"][0]["pretrained"] = [{"layer": 1, "folder": str(moved), "nominal_l0": 400}]
    outcome = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert {r.status for r in outcome.results} == {"failed"}
    assert "nominal L0 is 400" in outcome.results[0].reason
    data["models"][0]["pretrained"] = [{"layer": 1, "folder": str(given)}]
    with pytest.raises(UserError, match="is no folder"):
        run_and_report(study_from_data(data), tmp_path / "s", quiet=True)


def test_a_renamed_folder_of_an_sae_keeps_its_results(data, finished, tmp_path):
    """A name is no part of an identity, so what is stored must not depend on it."""
    study, out, _ = finished
    stage = next(iter(plan_study(study).runs[0].saes.values()))
    source = out / "artifacts" / "sae" / stage.identity
    subprocess.run(["cp", "-r", str(source), str(tmp_path / "before")], check=True)
    data["questions"], data["sae"]["seeds"] = ["persistence", "transfer"], [0]
    data["prunings"], more = data["prunings"][:1], data["prunings"][1:]
    data["models"][0]["pretrained"] = [{"layer": 1, "folder": str(tmp_path / "before")}]
    shutil.copytree(out / "artifacts", tmp_path / "s" / "artifacts")
    run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    (tmp_path / "before").rename(tmp_path / "after")
    data["models"][0]["pretrained"] = [{"layer": 1, "folder": str(tmp_path / "after")}]
    data["prunings"] += more
    outcome = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    table = pd.read_csv(tmp_path / "s" / "tables" / "transfer.csv")
    assert set(table["sae"]) == {"seed 0", "after"}
    assert table.loc[table["method"] == "wanda", "verdict"].notna().all()


def test_a_condition_may_have_other_seeds_than_the_first(data, tmp_path):
    data["sae"]["seeds"] = [0, 1, 2]
    data["prunings"] = [
        {"criterion": "wanda", "scope": "row", "sparsities": [0.3], "seeds": [1, 2]}
    ]
    data["questions"] = ["survival"]
    outcome = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    corrected = pd.read_csv(tmp_path / "s" / "tables" / "survival_corrected.csv")
    assert set(corrected["arm"]) == {"shared", "cross"}
    rates = pd.read_csv(tmp_path / "s" / "tables" / "survival.csv")
    for arm in ("ceiling_shared", "floor_shared"):
        assert set(rates.loc[rates["arm"] == arm, "init_a"]) == {0, 1}


def test_a_failed_dense_transfer_costs_its_table_alone(finished, tmp_path, monkeypatch):
    study, out, _ = finished
    shutil.copytree(out / "artifacts", tmp_path / "s" / "artifacts")
    shutil.rmtree(tmp_path / "s" / "artifacts" / "transfer")
    real = stages.make_stages

    def broken(store, group, **options):
        if group[0].name == "transfer" and group[0].label.endswith("dense"):
            raise UserError("transfer: no")
        real(store, group, **options)

    monkeypatch.setattr(stages, "make_stages", broken)
    outcome = run_and_report(study, tmp_path / "s", quiet=True)
    assert {r.reason.partition(": ")[2] for r in outcome.results} == {"transfer: no"}
    tables = {path.stem for path in (tmp_path / "s" / "tables").iterdir()}
    assert "transfer" not in tables
    assert {"survival", "fragility", "causal", "claims"} <= tables


def test_a_study_is_told_whatever_stage_has_failed_in_its_pruned_runs(finished, tmp_path):
    """With all that rests on it. The dense run may have an answer without a row."""
    study, out, _ = finished
    shutil.copytree(out / "artifacts", tmp_path / "artifacts")
    plan, store = plan_study(study), Store(tmp_path / "artifacts")
    made = {s.identity: s for run in plan.runs[1:] for s in run.stages.values()}
    dense = {stage.identity for stage in plan.runs[0].targets()}
    for kind in ("common_change", "survival", "persistence", "fates", "statistics", "perplexity"):
        failed = [
            stage
            for identity, stage in made.items()
            if identity not in dense and kind in {s.name for s in parents_first([stage])}
        ]
        folders = [store.folder(stage) for stage in failed]
        for folder in folders:
            folder.rename(folder.with_name(f"{folder.name}.away"))
        tables = write_tables(study_results(plan, store), tmp_path / "out")
        assert all(len(table) for table in tables.values())
        paper = write_paper_tables(tables, study, tmp_path / "out")
        print_summary(tables | paper, read_runs(out))
        if kind in ("common_change", "survival"):  # what most rests on
            assert page(tmp_path / "out", tables, read_runs(out), study)
        for folder in folders:
            folder.with_name(f"{folder.name}.away").rename(folder)


def test_what_fails_over_all_runs_is_told_and_exits_as_failed(finished, tmp_path, monkeypatch):
    study, out, _ = finished
    shutil.copytree(out / "artifacts", tmp_path / "s" / "artifacts")
    shutil.rmtree(tmp_path / "s" / "artifacts" / "predictor")

    def broken(_store, _stage, **_options):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(conclude, "make_stage", broken)
    outcome = run_and_report(study, tmp_path / "s", quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    assert "predictor over 2 runs: ZeroDivisionError" in outcome.failures[0]
    assert not (tmp_path / "s" / "tables" / "predictor.csv").exists()
    claims = pd.read_csv(tmp_path / "s" / "tables" / "claims.csv").set_index("claim")
    assert claims.loc[7, "verdict"] == "undecided"


def test_no_predictor_is_told(finished, tmp_path):
    _, out, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    subprocess.run(["rm", "-r", str(copy / "artifacts" / "predictor")], check=True)
    with pytest.raises(UserError, match="has no predictor"):
        predict_latents(copy, sparsity=0.4)


def test_a_second_run_does_no_work(finished):
    study, out, _ = finished
    before = tables_of(out)
    outcome = run_and_report(study, out, quiet=True)
    assert outcome.num_executed == 0
    assert tables_of(out) == before


def test_activation_stores_are_deleted_and_nothing_is_left_half_done(finished):
    _, out, _ = finished
    assert not list((out / "artifacts").glob("activations/*"))
    assert not list((out / "artifacts").glob("*/*.tmp"))
    assert not list((out / "artifacts").glob("unfinished/*"))


def test_no_pickle_is_written(finished):
    _, out, _ = finished
    files = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]
    kinds = {p.suffix for p in files}
    assert kinds == {".safetensors", ".json", ".parquet", ".csv", ".yaml", ".png", ".pdf", ".html"}
    assert not [p for p in files if p.read_bytes().startswith((b"\x80", b"PK"))]  # pickle, zip


def test_a_new_condition_runs_only_what_is_new(finished, data, tmp_path):
    _, out, _ = finished
    subprocess.run(["cp", "-r", str(out), str(tmp_path / "copy")], check=True)
    data["prunings"].append({"criterion": "magnitude", "scope": "row", "sparsities": [0.3]})
    outcome = run_and_report(study_from_data(data), tmp_path / "copy", quiet=True)
    # two activation stores (the dense one was deleted), statistics, sinks, masks, perplexity,
    # three SAEs and a warm one, stability, survival, corrected, the common change, persistence,
    # activation matching, scaling, subspace, sufficiency, transfer, fates, fragility, causal,
    # evidence; the predictor
    assert outcome.num_executed == 25
    assert len(pd.read_csv(tmp_path / "copy" / "runs.csv")) == 4


def test_one_failed_run_does_not_stop_the_others(data, tmp_path, monkeypatch):
    data["questions"] = ["persistence"]
    real = stages.make_stages

    def broken(store, group, **options):
        if group[0].name == "activations" and "magnitude" in group[0].label:
            raise UserError("activations: NaN in layer 1; use bfloat16")
        if group[0].name == "prune" and "wanda" in group[0].label:
            raise ZeroDivisionError("a bug of ours")
        real(store, group, **options)

    monkeypatch.setattr(stages, "make_stages", broken)
    outcome = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert [r.status for r in outcome.results] == ["done", "failed", "failed"]
    runs = pd.read_csv(tmp_path / "s" / "runs.csv", keep_default_na=False)
    assert "NaN in layer 1; use bfloat16" in runs["reason"][1]
    assert "ZeroDivisionError" in runs["reason"][2]
    assert list((tmp_path / "s" / "logs").glob("*.log"))
    quality = pd.read_csv(tmp_path / "s" / "tables" / "sae_quality.csv")
    assert set(quality["method"]) == {"dense"}
    assert [row["status"] for row in study_status(tmp_path / "s")] == ["done", "failed", "failed"]
    monkeypatch.setattr(stages, "make_stages", real)
    again = run_and_report(study_from_data(data), tmp_path / "s", quiet=True)
    assert {r.status for r in again.results} == {"done"}


def test_a_damaged_artifact_is_set_aside_and_made_again(finished, tmp_path):
    study, out, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    plan = plan_study(study)
    sae = next(iter(plan.runs[1].saes.values()))
    path = copy / "artifacts" / "sae" / sae.identity / "sae.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    outcome = run_and_report(study, copy, quiet=True)
    assert outcome.num_executed == 2  # its activations and itself
    assert list((copy / "artifacts" / "damaged").iterdir())
    assert tables_of(copy) == tables_of(out)


def test_what_is_there_needs_no_room_again(finished, tmp_path, monkeypatch):
    """On a full disk a finished study opens, and one that lacks little goes on."""
    study, out, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    full = types.SimpleNamespace(free=0)
    monkeypatch.setattr("prunelens.study.preflight.room.shutil.disk_usage", lambda _: full)
    assert run_and_report(study, copy, quiet=True).num_executed == 0
    subprocess.run(["rm", "-r", str(copy / "artifacts")], check=True)
    with pytest.raises(UserError, match=r"0\.0 GB free for about"):
        run_and_report(study, copy, quiet=True)
    (copy / "artifacts" / "sae").mkdir(parents=True)
    (copy / "artifacts" / "sae" / "large").write_bytes(b"0" * 2**26)
    monkeypatch.setattr("prunelens.study.run.make_all", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it has begun
        run_and_report(study, copy, quiet=True)


def test_several_workers_give_the_same_tables(finished, tmp_path):
    study, out, _ = finished
    outcome = run_and_report(study, tmp_path / "workers", workers=2, quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    assert tables_of(tmp_path / "workers") == tables_of(out)


def test_two_processes_on_one_folder_are_refused(finished):
    import filelock

    study, out, _ = finished
    with (
        filelock.FileLock(out / ".lock"),
        pytest.raises(UserError, match="another prunelens works"),
    ):
        run_and_report(study, out, quiet=True)


def test_identities_ignore_paths_and_devices_and_cover_the_model(data, checkpoint_folder, tmp_path):
    copy = tmp_path / "elsewhere" / "tiny-llama"
    subprocess.run(["mkdir", "-p", str(copy.parent)], check=True)
    subprocess.run(["cp", "-r", str(checkpoint_folder), str(copy)], check=True)
    here = plan_study(study_from_data(data)).targets().keys()
    data["models"][0]["name"] = str(copy)
    assert plan_study(study_from_data(data)).targets().keys() == here
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert not plan_study(study_from_data(data)).targets().keys() & here


def test_what_an_sae_of_others_is_called_enters_no_identity(data):
    given = {"layer": 1, "release": "r", "sae_id": "s"}
    data["models"][0]["pretrained"] = [given]
    plain = plan_study(study_from_data(data)).targets().keys()
    data["models"][0]["pretrained"] = [given | {"name": "mine"}]
    assert plan_study(study_from_data(data)).targets().keys() == plain
    data["models"][0]["pretrained"] = [given | {"sae_id": "other"}]
    assert plan_study(study_from_data(data)).targets().keys() != plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae": {"k": 65}}, "sae.k: 65 is more than the 64 latents"),
        ({"sae": {"batch_tokens": 10**6}}, "sae.batch_tokens: 1000000 is more than"),
        ({"models": [{"layers": [3]}]}, "has 3 blocks; use 0 to 2"),
        ({"models": [{"name": "./no/such/model"}]}, "models.name"),
        ({"corpus": {"paths": ["nothing.txt"]}}, "corpus.paths"),
        ({"corpus": {"train_tokens": 10**7}}, "give more text, or lower the largest"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(data, tmp_path, change, message):
    for part, fields in change.items():
        target = data[part][0] if isinstance(data[part], list) else data[part]
        target.update(fields[0] if isinstance(fields, list) else fields)
    with pytest.raises(UserError) as error:
        run_and_report(study_from_data(data), tmp_path / "out", quiet=True)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_environment_is_recorded(finished):
    _, out, _ = finished
    facts = json.loads((out / "environment.json").read_text())
    assert {"python", "libraries", "device", "cpu_count"} <= set(facts)


def test_status_of_a_killed_study_says_unfinished(finished, tmp_path):
    study, out, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    (copy / "runs.csv").write_text("")
    last = plan_study(study).runs[-1]
    subprocess.run(
        ["rm", "-r", str(copy / "artifacts" / "stability" / last.stages["stability"].identity)],
        check=True,
    )
    rows = study_status(copy)
    assert [row["status"] for row in rows] == ["done", "done", "unfinished"]


def test_stores_that_a_kill_left_behind_go_on_the_next_run(finished, tmp_path):
    study, out, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    stage = next(plan_study(study).runs[0].temporary())
    with Store(copy / "artifacts").writing(stage) as folder:
        (folder / "train.safetensors").write_bytes(b"x")
    outcome = run_and_report(study, copy, quiet=True)
    assert outcome.num_executed == 0
    assert not list((copy / "artifacts" / "activations").iterdir())


def test_a_worker_that_dies_fails_its_run_and_no_other(data, tmp_path):
    """The worker is killed whenever it works on the wanda masks."""
    code = (
        "import dataclasses, os, sys, json, pathlib\n"
        "from prunelens.study import stages\n"
        "real = stages.STAGES['prune']\n"
        "def dying(work):\n"
        "    if 'wanda' in work.stage.label: os.kill(os.getpid(), 9)\n"
        "    real.make(work)\n"
        "stages.STAGES['prune'] = dataclasses.replace(real, make=dying)\n"
        "if __name__ == '__main__':\n"
        "    from prunelens.config import study_from_data\n"
        "    from prunelens.report import write\n"
        "    write.write_figures = write.write_page = lambda *_: None\n"
        "    study = study_from_data(json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
        "    out = pathlib.Path(sys.argv[2])\n"
        "    outcome = write.run_and_report(study, out, workers=2, quiet=True)\n"
        "    print([r.status for r in outcome.results], outcome.results[2].reason)\n"
    )
    script, path = tmp_path / "dying.py", tmp_path / "study.json"
    script.write_text(code)  # a spawned worker imports the script, and so gets the dying stage
    path.write_text(json.dumps({**data, "questions": ["persistence"]}))
    command = [sys.executable, str(script), str(path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "['done', 'done', 'failed']" in result.stdout, result.stderr
    assert "died twice" in result.stdout


def test_too_little_text_leaves_nothing_with_several_workers_either(data, tmp_path):
    data["corpus"]["train_tokens"] = 10**7
    with pytest.raises(UserError, match="corpus"):
        run_and_report(study_from_data(data), tmp_path / "out", workers=2, quiet=True)
    assert not (tmp_path / "out").exists()


def test_dense_normalisation_gives_every_condition_the_dense_statistics(data, tmp_path):
    data["activations"] = {"normalisation": "dense"}
    data["questions"] = ["persistence"]
    data["sae"]["seeds"] = [0]
    data["prunings"] = data["prunings"][:1]
    study = study_from_data(data)
    outcome = run_and_report(study, tmp_path / "out", quiet=True)
    assert {r.status for r in outcome.results} == {"done"}
    dense, pruned = (
        load_file(tmp_path / "out/artifacts/sae" / stage.identity / "normalisation.safetensors")[
            "sigma"
        ]
        for run in plan_study(study).runs
        for stage in run.saes.values()
    )
    assert (dense == pruned).all()
    tables = {p.stem for p in (tmp_path / "out" / "tables").iterdir()}
    measured = {"perplexity", "sae_quality", "sae_training", "sinks", "common_change"}
    measured |= {"persistence", "claims", "depth", "answers"}
    assert {table for table in tables if not table.startswith("table")} == measured


def test_sufficiency_identity_and_warm_starts_hang_together(finished):
    _, out, _ = finished
    curves = pd.read_csv(out / "tables" / "training_curves.csv")
    quality = pd.read_csv(out / "tables" / "sae_quality.csv").set_index(["run", "seed"])
    ends = curves[curves["step"] == 24].query("total_steps == 24").set_index(["run", "seed"])
    pd.testing.assert_series_equal(ends["fvu"], quality["fvu"], check_like=True)
    followed = curves[curves["run"].str.endswith("magnitude-global-0.50")]
    assert set(followed["step"]) == {3, 6, 12, 24, 48}  # 1/8, 1/4, 1/2, 1; one seed twice as long
    doubled = curves[curves["total_steps"] == 48]
    assert set(doubled["step"]) == {24, 48}
    assert {run.rpartition("/")[2] for run in doubled["run"]} == {"dense", "magnitude-global-0.50"}

    by_step = pd.read_csv(out / "tables" / "survival_by_step.csv")
    survival = pd.read_csv(out / "tables" / "survival.csv")
    last = by_step[(by_step["step"] == 24) & (by_step["arm"] == "shared_init")]
    whole = survival[(survival["arm"] == "shared_init") & (survival["coordinates"] == "normalised")]
    keys = ["run", "init_a", "init_b", "tau"]
    both = last.merge(whole, on=keys, suffixes=("", "_whole"))
    assert len(both) == len(last) and (both["mnn"] == both["mnn_whole"]).all()

    training = pd.read_csv(out / "tables" / "sae_training.csv")
    warm = training[training["training"] == "warm"]
    assert (warm["steps"] == 6).all()  # a quarter
    assert list(warm.groupby("method").size()) == [2, 1, 1]  # dense: also in a rotated space
    verdict = pd.read_csv(out / "tables" / "sufficiency.csv").set_index("method")
    assert verdict.loc["dense", "reason"].startswith("these dictionaries are not trained enough")

    latents = pd.read_parquet(out / "latents.parquet")
    pruned = latents[latents["run"].str.endswith("wanda-row-0.30")]
    names = {"scaling", "scaling_unpaired", "subspace_cross_init", "activation_match_shared_init"}
    assert {*names, "scaling_null"} <= set(pruned)
    table = out / "tables" / "activation_matching.csv"
    matching = pd.read_csv(table, keep_default_na=False, na_values=[""])  # a source is called null
    assert set(matching[matching["method"] == "dense"]["arm"]) == {
        *("ceiling_shared", "ceiling_cross", "chance", "ceiling_warm"),
    }
    assert set(matching[matching["method"] == "dense"]["source"]) == {"dense"}
    null = matching[matching["source"] == "null"]
    plain = matching[(matching["source"] == "pruned") & matching["arm"].isin(set(null["arm"]))]
    assert set(null["arm"]) == {"shared_init", "cross_init"} and len(null) == len(plain)
    scaling = pd.read_csv(out / "tables" / "scaling.csv")
    of_dense = scaling[scaling["source"] == "dense"]
    np.testing.assert_allclose(of_dense["mean_scaling"].dropna(), 1.0)
