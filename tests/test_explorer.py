"""A study's explorer says what the study's tables say; and it is written, replaced and served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

import warm
from prunelens.activations import Statistics
from prunelens.cli import studies
from prunelens.config import study_from_data
from prunelens.errors import UserError
from prunelens.report.explorer.collect import study_explorer
from prunelens.report.explorer.content import DENSE
from prunelens.report.explorer.folder import MARKER
from prunelens.report.explorer.study import view_study, write_study_explorer
from prunelens.sae.topk import TopKSAE
from prunelens.study.folder import open_study
from prunelens.study.plan import plan_study
from prunelens.study.results import study_results
from prunelens.study.run import run_study
from tiny_study import run_with_pool, tiny_study, write_text

NUM_LATENTS, SEED = 64, 0
CAUSAL = {"prompts": 4, "group_size": 4, "contexts_per_latent": 4, "conditions": ["wanda-row-0.30"]}
WIDTH = 2 * 3 + 1


@pytest.fixture(scope="module")
def study_data(checkpoint_folder, tmp_path_factory):
    """Two pruned conditions, two seeds, and an SAE of others that Neuronpedia knows."""
    folder = tmp_path_factory.mktemp("inputs")
    given = folder / "theirs"
    given.mkdir()
    TopKSAE.initialise(16, 48, 4, init_seed=3).save(given)
    Statistics(torch.zeros(16), torch.ones(16)).save(given / "normalisation.safetensors")
    (given / "cfg.json").write_text(json.dumps({"neuronpedia_id": "tiny/1-res"}))
    pretrained = [{"layer": 1, "folder": str(given), "name": "of others"}]
    base = tiny_study(checkpoint_folder, write_text(folder / "text.txt"))
    return {
        **base,
        "name": "seen",
        "models": [{**base["models"][0], "pretrained": pretrained}],
        "sae": {**base["sae"], "steps": 8},
        "questions": ["survival", "persistence", "identity", "causal", "evidence"],
        "causal": CAUSAL,
        "evidence": {"top": 3, "samples": 2, "either_side": 3, "effects": 5},
    }


@pytest.fixture(scope="module")
def finished(study_data, tmp_path_factory, pool):
    """A finished study's folder, plan and store."""
    out = tmp_path_factory.mktemp("finished") / "seen"
    out.mkdir()
    outcome = run_with_pool(study_from_data(study_data), out, pool, run_study)
    assert {result.reason for result in outcome.results} == {""}
    return out, *open_study(out)


@pytest.fixture(scope="module")
def views(finished):
    """Ours and theirs."""
    _, plan, store = finished
    ours, theirs = study_explorer(plan, store).views
    return ours, theirs


@pytest.fixture(scope="module")
def latents(finished):
    """latents.parquet of the study, as its report would write it."""
    _, plan, store = finished
    return study_results(plan, store)["latents"]


def column(columns, key):
    return next(each.values for each in columns if each.key == key)


def evidence_of(finished, run, role="evidence"):
    _, plan, store = finished
    stages = next(r.stages for r in plan.runs if r.name == run)
    return store.read(stages[role])


def test_there_is_a_view_of_every_dictionary(finished, views):
    _, plan, _ = finished
    ours, theirs = views
    assert [view.id for view in views] == ["v0", "v1"]
    assert (ours.dictionary, theirs.dictionary) == ("seed 0", "of others")
    assert (ours.num_latents, theirs.num_latents) == (NUM_LATENTS, 48)
    assert (ours.neuronpedia, theirs.neuronpedia) == (None, "tiny/1-res")
    for view in views:
        assert [(c.id, c.label, c.sparsity) for c in view.conditions] == [
            ("c0", "magnitude-global-0.50", 0.5),
            ("c1", "wanda-row-0.30", 0.3),
        ]
        assert [c.run for c in view.conditions] == [run.name for run in plan.runs[1:]]
    assert all(condition.own is None for condition in theirs.conditions)


def test_numbers_are_those_of_the_latents_table(views, latents):
    view = views[0]
    first = latents[latents["seed"] == SEED]
    dense = first[first["method"] == "dense"].sort_values("latent")
    for key in ("firing_rate", "mean_activation", "init_retention"):
        assert np.array_equal(
            column(view.columns, key), dense[key].to_numpy(np.float32), equal_nan=True
        )
    for condition in view.conditions:
        table = first[first["run"] == condition.run].sort_values("latent")
        shown = {each.key: each.values for each in condition.columns}
        alike = [key for key in shown if key in table]
        assert {"persistence", "persistence_jaccard", "silenced", "scaling"} < set(alike)
        for arm in ("shared_init", "shared_start", "cross_init"):
            assert {f"mutual_{arm}", f"cosine_{arm}"} < set(alike)
        for key in alike:
            expected = table[key].astype(float).fillna(-1 if "match" in key else np.nan)
            assert np.array_equal(
                shown[key], expected.to_numpy(shown[key].dtype), equal_nan=True
            ), key
        ablated = {"causal_effect_pruned"} if condition.label in CAUSAL["conditions"] else set()
        assert "relative_shuffled" in alike
        assert set(shown) - set(alike) == ablated
        own = condition.own.columns
        assert np.array_equal(column(own, "firing_rate"), table["firing_rate"].to_numpy(np.float32))


def test_share_of_noise_is_persistence_over_what_noise_leaves(views, latents):
    for condition in views[0].conditions:
        table = latents[(latents["run"] == condition.run) & (latents["seed"] == SEED)]
        by_latent = table.set_index("latent")
        shown = column(condition.columns, "relative_shuffled")
        for latent, row in by_latent.iterrows():
            left = row["persistence_noise_shuffled"]
            known = left >= 0.3 and not np.isnan(row["persistence"])
            expected = row["persistence"] / left if known else np.nan  # above 1 as well
            assert shown[latent] == pytest.approx(expected, nan_ok=True)


def test_kept_is_the_share_above_the_bound(finished, views):
    _, plan, store = finished
    summary = study_results(plan, store)["persistence"]
    for condition in views[0].conditions:
        row = summary[
            (summary["run"] == condition.run)
            & (summary["seed"] == SEED)
            & (summary["source"] == "pruned")
        ].iloc[0]
        known = condition.kept[~np.isnan(condition.kept)]
        assert set(known) <= {0.0, 1.0}
        assert len(known) == NUM_LATENTS - row["num_undefined"]
        assert known.mean() == pytest.approx(row["share_above_0.7"])
    for condition in views[1].conditions:
        table = pd.read_parquet(
            evidence_of(finished, condition.run, "evidence of others") / "persistence.parquet"
        )
        pruned = table[table["source"] == "pruned"].set_index("latent")["correlation"]
        assert np.array_equal(
            column(condition.columns, "persistence"), pruned.to_numpy(np.float32), equal_nan=True
        )
        assert np.array_equal(condition.kept == 1, pruned.to_numpy() > 0.7)


def test_matches_lead_there_and_back(views, latents):
    view = views[0]
    for condition in view.conditions:
        table = latents[(latents["run"] == condition.run) & (latents["seed"] == SEED)]
        rows = table.set_index("latent")
        back = np.full(NUM_LATENTS, -1)
        for latent, row in rows.iterrows():
            assert condition.match[latent] == row["match_shared_init"]
            if row["mutual_shared_init"] and row["cosine_shared_init"] >= view.tau:
                back[int(row["match_shared_init"])] = latent
        assert np.array_equal(condition.matched_back, back)
        assert (back >= 0).any()  # or nothing was looked at


def test_causal_effects_are_means_over_the_places_where_a_latent_fires(finished, views):
    _, plan, store = finished
    view = views[0]
    run, condition = plan.runs[2], view.conditions[1]
    means = {}
    for name in ("dense", "pruned"):
        found = {}
        kl = pd.read_parquet(store.read(run.stages["causal"]) / f"kl_{name}_{SEED}.parquet")
        for row in kl.itertuples():
            if (row.kind, row.protocol, row.contexts) == ("latent", "isolated", "firing"):
                found.setdefault(row.latent, []).append(row.kl)
        means[name] = {latent: np.mean(values) for latent, values in found.items()}
    dense = column(view.columns, "causal_effect")
    pruned = column(condition.columns, "causal_effect_pruned")
    for latent in range(NUM_LATENTS):
        expected = means["dense"].get(latent, np.nan)
        assert dense[latent] == pytest.approx(expected, nan_ok=True, rel=1e-5)
        expected = means["pruned"].get(condition.match[latent], np.nan)
        assert pruned[latent] == pytest.approx(expected, nan_ok=True, rel=1e-5)
    assert np.isfinite(dense).any()
    assert np.isnan(dense).any()


def test_contexts_show_the_latent_in_the_text(finished, views, checkpoint_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_folder)
    for view, role in zip(views, ("evidence", "evidence of others"), strict=True):
        folder = evidence_of(finished, "tiny-llama/L1/dense", role)
        table = pd.read_parquet(folder / "contexts.parquet")
        contexts = view.contexts
        assert np.array_equal(contexts.latent, table["latent"])
        assert np.array_equal(contexts.is_sample, table["kind"] == "sample")
        assert set(contexts.activations) == {DENSE, "c0", "c1"}
        middle = contexts.activations[DENSE][:, contexts.either_side]
        assert np.array_equal(middle, table["activation"].to_numpy(np.float32))
        for values in contexts.activations.values():
            assert values.shape == (len(table), WIDTH)
            assert values.dtype == np.float32
        ids = load_file(folder / "text.safetensors")["ids"]
        assert view.tokens.ids.shape == ids.shape
        assert view.tokens.ids.dtype == np.uint32
        for window in range(3):
            shown = "".join(view.tokens.vocabulary[i] for i in view.tokens.ids[window][1:])
            assert shown == tokenizer.decode(ids[window][1:])


def test_promoted_tokens_are_words_of_the_model(finished, views):
    for view, role in zip(views, ("evidence", "evidence of others"), strict=True):
        folder = evidence_of(finished, "tiny-llama/L1/dense", role)
        texts = pd.read_parquet(folder / "tokens.parquet").set_index("token_id")["text"]
        effects = load_file(folder / "effects.safetensors")
        for name in ("promoted", "suppressed"):
            shown = getattr(view.effects, name)
            assert shown.shape == (view.num_latents, 5)
            for latent in (0, 7):
                words = [view.tokens.vocabulary[i] for i in shown[latent]]
                assert words == [texts[i] for i in effects[name][latent].tolist()]


def test_a_condition_has_its_own_latents_contexts(finished, views):
    for condition in views[0].conditions:
        folder = evidence_of(finished, condition.run)
        table = pd.read_parquet(folder / "contexts.parquet")
        contexts = condition.own.contexts
        assert set(contexts.activations) == {condition.id}
        assert np.array_equal(contexts.latent, table["latent"])
        under = load_file(folder / "under_pruning.safetensors")["activations"].numpy()
        assert np.array_equal(views[0].contexts.activations[condition.id], under, equal_nan=True)


# --- what is missing ------------------------------------------------------------------------------


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished study that a test may damage."""
    out = tmp_path / "seen"
    shutil.copytree(finished[0], out)
    return out


def changed(study_data, **fields):
    return plan_study(study_from_data({**study_data, **fields}))


def test_without_persistence_a_latent_is_kept_that_is_matched(finished, study_data, latents):
    _, _, store = finished
    plan = changed(study_data, questions=["survival", "evidence"])
    view = study_explorer(plan, store).views[0]
    assert "mutual nearest" in view.kept_means
    for condition in view.conditions:
        rows = latents[(latents["run"] == condition.run) & (latents["seed"] == SEED)]
        matched = rows["mutual_shared_init"].astype(bool) & (rows["cosine_shared_init"] >= 0.7)
        known = ~np.isnan(condition.kept)
        assert np.array_equal(known, column(view.columns, "firing_rate") > 0)
        assert np.array_equal(condition.kept[known] == 1, matched.to_numpy()[known])
        assert not any("persistence" in each.key for each in condition.columns)


def test_without_either_nothing_is_called_kept(finished, study_data):
    view = study_explorer(changed(study_data, questions=["evidence"]), finished[2]).views[0]
    for condition in view.conditions:
        assert np.isnan(condition.kept).all()
        assert (condition.match, condition.matched_back) == (None, None)
        assert condition.own is not None
        assert condition.columns == ()


def test_what_a_failed_run_did_not_make_is_left_out_and_told(copied, caplog):
    plan, store = open_study(copied)
    pruned = plan.runs[1]
    store.delete(pruned.stages["evidence"])
    store.delete(pruned.stages["persistence"])
    store.delete(pruned.stages["evidence of others"])
    ours, theirs = study_explorer(plan, store).views
    assert f"{pruned.name}: evidence is missing" in caplog.text
    assert [condition.id for condition in ours.conditions] == ["c0", "c1"]
    assert set(ours.contexts.activations) == {DENSE, "c1"}
    left = ours.conditions[0]
    assert left.own is None
    assert np.isnan(left.kept).all()
    assert np.isfinite(column(left.columns, "cosine_shared_init")).all()
    assert [condition.id for condition in theirs.conditions] == ["c1"]  # nothing is known of c0

    store.delete(plan.runs[0].stages["evidence"])
    assert [view.dictionary for view in study_explorer(plan, store).views] == ["of others"]
    store.delete(plan.runs[0].stages["evidence of others"])
    with pytest.raises(UserError, match="no run has evidence yet"):
        study_explorer(plan, store)


def test_a_condition_without_saes_of_the_first_seed(copied, study_data):
    """What the dense SAE does there is shown; nothing else is known of it."""
    other_seed = {
        "prunings": [study_data["prunings"][0] | {"seeds": [1]}],
        "questions": ["persistence", "evidence"],
        "causal": {},
    }
    run_study(study_from_data({**study_data, **other_seed}), copied, quiet=True)
    ours, _ = study_explorer(*open_study(copied)).views
    (condition,) = ours.conditions
    assert set(ours.contexts.activations) == {DENSE, "c0"}
    assert (condition.own, condition.match, condition.columns) == (None, None, ())
    assert np.isnan(condition.kept).all()


def test_a_study_that_did_not_ask(finished, study_data):
    plan = changed(study_data, questions=["survival"])
    with pytest.raises(UserError, match="add it to questions and run the study again"):
        study_explorer(plan, finished[2])


# --- the folder and the commands ------------------------------------------------------------------


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_folder_is_written_once(copied, monkeypatch):
    told = []
    out = write_study_explorer(copied, tell=told.append)
    assert out == copied / "explorer"
    assert (out / "index.html").is_file()
    assert any("layer 1, seed 0" in line for line in told)
    before = contents(out)

    monkeypatch.setattr("prunelens.study.folder.open_study", pytest.fail)
    assert write_study_explorer(str(copied)) == out
    assert contents(out) == before

    monkeypatch.undo()
    study = copied / "study.yaml"
    study.write_text(study.read_text().replace("name: seen", "name: seen-again"))
    write_study_explorer(copied)
    assert b"seen-again" in contents(out)["data/study.js"]


def test_other_things_are_not_overwritten(copied):
    (copied / "explorer").mkdir()
    (copied / "explorer" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        write_study_explorer(copied)
    assert contents(copied / "explorer") == {"thesis.tex": b"years of work"}


def test_a_folder_that_is_no_study(tmp_path):
    with pytest.raises(UserError, match=r"has no study\.yaml"):
        write_study_explorer(tmp_path)


def test_what_is_served_is_what_is_shared(copied, monkeypatch):
    out = write_study_explorer(copied)
    expected = contents(out)
    del expected[MARKER]  # which is for programs
    seen = {}

    def look(self):
        """In place of serving forever: one round of questions."""
        import threading

        thread = threading.Thread(target=serve, args=(self, 0.01))
        thread.start()
        try:
            for name in expected:
                with urllib.request.urlopen(self.address + name) as answer:
                    seen[name] = answer.read()
        finally:
            self.shutdown()
            thread.join()
        raise KeyboardInterrupt  # Ctrl-C ends it

    from prunelens.report.explorer.server import ExplorerServer

    serve = ExplorerServer.serve_forever
    monkeypatch.setattr(ExplorerServer, "serve_forever", look)
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    addresses = []
    view_study(copied, ready=addresses.append)
    assert opened == addresses
    assert addresses[0].startswith("http://127.0.0.1:")
    assert seen == expected


def test_labels_are_asked_for_by_their_name(copied, monkeypatch):
    from prunelens.report.explorer.server import ExplorerServer

    asked = []
    monkeypatch.setattr(
        "prunelens.report.explorer.labels._fetch",
        lambda address: asked.append(address) or b'{"explanations": [{"description": "a"}]}',
    )

    def look(self):
        assert self.labels("v1", 5) == "a"
        assert self.labels("v0", 5) is None  # ours is not on Neuronpedia

    monkeypatch.setattr(ExplorerServer, "serve_forever", look)
    view_study(copied, browser=False, labels=True, ready=lambda _: None)
    assert asked == ["https://www.neuronpedia.org/api/feature/tiny/1-res/5"]
    assert b'"labels":true' in contents(copied / "explorer")["data/study.js"]
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda self: asked.append(self.labels))
    view_study(copied, browser=False, ready=lambda _: None)
    assert asked[1:] == [None]
    assert b'"labels":false' in contents(copied / "explorer")["data/study.js"]


def test_the_command_prints_the_address_and_ends_with_ctrl_c(copied):
    write_study_explorer(copied)
    command = [sys.executable, "-c", warm.COMMAND_LINE]
    process = warm.Popen(
        [*command, "view", str(copied), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = process.stdout.readline().split()[0]
    with urllib.request.urlopen(address) as answer:
        assert answer.read() == (copied / "explorer" / "index.html").read_bytes()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    (copied / "study.yaml").unlink()
    result = warm.run([*command, "view", copied])
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_report_writes_it_on_request(copied, monkeypatch, capsys):
    monkeypatch.setattr("prunelens.report.write.write_report", lambda *_, **__: {})
    monkeypatch.setattr("prunelens.report.summary.print_summary", lambda *_: None)
    studies.report(copied)
    assert not (copied / "explorer").exists()
    studies.report(copied, explorer=True)
    assert str(copied / "explorer" / "index.html") in capsys.readouterr().out
