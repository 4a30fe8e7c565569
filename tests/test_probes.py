"""Concept probes: labels find their tokens, and concepts whose fate is known are told apart."""

from __future__ import annotations

import json
import pathlib
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from independent import probes as slow
from prunelens.analyses.concept_fates import DISTURBED, concept_fates, probe_grades, rarity
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.probes import PENALTY, Halves, probes, sources
from prunelens.concepts import (
    LabelledText,
    Labels,
    label_tokens,
    labelled_documents,
)
from prunelens.config import CorpusConfig, ModelConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import load_tokenizer
from prunelens.report.write import run_and_report
from prunelens.sae.topk import TopKSAE
from prunelens.study.plan import plan_study
from prunelens.study.preflight.preview import preflight
from prunelens.study.preflight.text_checks import text_check
from prunelens.text.python_source import python_spans
from tiny_study import tiny_study

# --- labels -------------------------------------------------------------------------------------

SOURCE = textwrap.dedent(
    '''
    """About nothing."""
    import os  # for π

    class Thing(object):
        LIMIT = 3

        def _size(self, deep=None):
            if deep is not None and self.LIMIT < 4:
                return [f"{n} é" for n in (1, 2)]
            raise ValueError("π" + "no")
    '''
)


def texts_of(concept: str) -> list[str]:
    spans = python_spans(SOURCE)
    assert spans is not None
    return [SOURCE[first:last] for first, last in spans[concept]]


@pytest.mark.parametrize(
    ("concept", "expected"),
    {
        "docstring": ['"""About nothing."""'],
        "comment": ["# for π"],
        "import": ["import os"],
        "name being defined": ["Thing", "_size"],
        "private name": ["_size"],
        "name in capitals": ["LIMIT", "LIMIT"],
        "parameter": ["self", "deep"],
        "default of a parameter": ["None"],
        "condition": ["deep is not None and self.LIMIT < 4"],
        "comparison": ["deep is not None", "self.LIMIT < 4"],
        "f-string": ['f"{n} é"'],
        "comprehension": ['[f"{n} é" for n in (1, 2)]'],
        "argument of a call": ['"π" + "no"'],
        "called function": ["ValueError"],
        "raise": ['raise ValueError("π" + "no")'],
        "tuple": ["(1, 2)"],
        "the word is": ["is"],
    }.items(),
)
def test_python_says_where_a_concept_is(concept: str, expected: list[str]) -> None:
    assert sorted(texts_of(concept)) == sorted(expected)


def test_what_python_does_not_parse_has_no_labels() -> None:
    for text in ("print 'two'", "def f(:\n", "x = '''", "\0", "(" * 5000):
        assert python_spans(text) is None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig())


def stream_of(texts: list[str], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of some texts without BOS, and where each begins."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    return torch.tensor([i for part in ids for i in part], dtype=torch.int32), torch.tensor(starts)


def test_labels_find_parts_of_documents_again(tokenizer: Any) -> None:
    text = "alpha beta gamma delta " * 30 + "the needle is here " + "omega psi chi " * 30
    first = text.index("needle")
    labelled = [
        LabelledText("nothing of it " * 20, lambda: pytest.fail("not wanted")),
        LabelledText(text, lambda: {"needle": [(first, first + 6)], "all": [(0, len(text))]}),
        LabelledText("cannot be labelled at all, this one " * 9, lambda: None),
        LabelledText("behind the last that is wanted", lambda: pytest.fail("not read")),
    ]
    whole, _ = stream_of([text], tokenizer)
    part = whole[20:-20]
    unknown, _ = stream_of(["cannot be labelled at all, this one " * 9], tokenizer)
    stream = torch.cat([part, unknown])
    starts = torch.tensor([0, len(part)])
    found = label_tokens(stream, starts, labelled, tokenizer, bos_token=tokenizer.bos_token_id)
    assert found.names == ["all", "needle"]
    assert found.known.tolist() == [True] * len(part) + [False] * len(unknown)
    assert (found.has[0] == found.known).all()
    said = tokenizer.decode(stream[torch.from_numpy(found.has[1])])
    assert said.strip() == "needle"


def test_labels_of_another_text_are_refused(tokenizer: Any) -> None:
    stream, starts = stream_of(["alpha beta gamma delta " * 9], tokenizer)
    other = [LabelledText("omega psi chi " * 20, lambda: {"all": [(0, 9)]})]
    with pytest.raises(UserError, match="no document of eval is among those"):
        label_tokens(stream, starts, other, tokenizer, bos_token=None)


def test_labels_are_read_as_they_were_written(tmp_path: pathlib.Path) -> None:
    has = np.random.default_rng(0).random((101, 7)) < 0.3
    labels = Labels([f"c{i}" for i in range(7)], has.T, np.ones(101, dtype=bool))
    some = labels.at(np.array([100, -1, 3, 50]))
    for each in (labels, some):
        each.save(tmp_path)
        again = Labels.load(tmp_path)
        assert again.names == each.names
        np.testing.assert_array_equal(again.has, each.has)
        np.testing.assert_array_equal(again.known, each.known)
    assert not some.known[1] and not some.has[:, 1].any()


def rows_corpus(tmp_path: pathlib.Path, *rows: dict[str, Any], name: str = "a.jsonl") -> Any:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return CorpusConfig(source="files", paths=(str(path),))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_labels_of_rows(tmp_path: pathlib.Path, name: str) -> None:
    values: list[Any] = [
        [{"start": 0, "end": 2, "label": "he"}, {"start": 3, "end": 5, "label": "lo"}],
        [{"start": 1, "end": 4, "label": "ell"}],
    ]
    if name == "a.jsonl":
        values += [{"he": [[0, 2]], "none": []}, "greeting", 12345678901234567890123, None]
    rows = [{"text": "hello", "tags": value} for value in values]
    found = labelled_documents(rows_corpus(tmp_path, *rows, name=name), "tags")
    spans = [each.spans() for each in found]
    assert spans[:2] == [{"he": [(0, 2)], "lo": [(3, 5)]}, {"ell": [(1, 4)]}]
    if name == "a.jsonl":
        whole = [(0, 5)]
        assert spans[2:4] == [{"he": [(0, 2)]}, {"tags greeting": whole}]
        assert list(spans[4] or ()) == ["tags 12345678901234567890"] and spans[5] == {}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "hello"}, "no field 'tags'"),
        ({"text": "hello", "tags": {"a": [[0, 9]]}}, "no labels of 5 characters"),
        ({"text": "hello", "tags": {"a": [[3]]}}, "no labels of 5 characters"),
        ({"text": "hello", "tags": [{"start": 0}]}, "no labels of 5 characters"),
        ({"text": "hello", "tags": [1.5]}, "no labels of 5 characters"),
    ],
)
def test_wrong_labels_are_told_in_one_line(
    tmp_path: pathlib.Path, row: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        [each.spans() for each in labelled_documents(rows_corpus(tmp_path, row), "tags")]
    assert str(caught.value).startswith("probes.concepts") and "\n" not in str(caught.value)


def test_text_without_rows_has_no_labels(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    for config in (
        CorpusConfig(source="files", paths=(str(tmp_path / "a.txt"),)),
        CorpusConfig(),
    ):
        with pytest.raises(UserError, match="has no rows with a field 'tags'"):
            list(labelled_documents(config, "tags"))


# --- probes -------------------------------------------------------------------------------------

NUM_TOKENS, WIDTH, DOCUMENT = 2400, 12, 60
FATES = ("kept", "moved", "gone", "unread")


class Rows:
    """A matrix."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows in the order of `index`."""
        return self.whole[index]


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """Concepts along axes: one stays, one moves to another axis, one is removed; the SAE has a
    latent for each but the last, which stays as well."""
    generator = torch.Generator().manual_seed(0)
    has = (
        torch.rand(4, NUM_TOKENS, generator=generator) < torch.tensor([0.1, 0.2, 0.3, 0.2])[:, None]
    )
    noise = 0.3 * torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    dense, pruned = noise.clone(), noise + 0.1 * torch.randn(noise.shape, generator=generator)
    for axis in range(4):
        dense[:, axis] += 2.0 * has[axis]
    pruned[:, 0] += 2.0 * has[0]
    pruned[:, 7] += 2.0 * has[1]
    pruned[:, 3] += 2.0 * has[3]
    sae = TopKSAE(WIDTH, 6, 3)
    with torch.no_grad():
        for latent, axis in enumerate((0, 1, 2, 8, 9, 10)):
            sae.encoder_weight[latent, axis] = 1.0
        sae.encoder_bias -= 0.5
    documents = np.arange(NUM_TOKENS) // DOCUMENT
    first, second = np.arange(NUM_TOKENS // 2), np.arange(NUM_TOKENS // 2, NUM_TOKENS)
    halves = Halves(first, second, documents, documents - documents[second[0]])
    labels = Labels(list(FATES), has.numpy(), np.ones(NUM_TOKENS, dtype=bool))
    change = fit_common_change(Rows(dense), Rows(pruned), torch.from_numpy(first))
    read = sources(Rows(dense), Rows(pruned), change, torch.arange(NUM_TOKENS))
    found = probes(read, {0: sae}, labels, halves, most=100)
    return {"found": found, "read": read, "sae": sae, "labels": labels, "halves": halves}


def test_kept_moved_gone_and_what_the_sae_cannot_read_are_told_apart(world: Any) -> None:
    fates = concept_fates(world["found"].readings).set_index(["concept", "source"])
    pruned = fates.xs("pruned", level="source")
    assert pruned["verdict"].to_dict() == {
        "kept": "kept",
        "moved": "moved",
        "gone": "gone",
        "unread": "kept",
    }
    assert pruned.loc["unread", "sae"] == "cannot"
    assert {pruned.loc[name, "sae"] for name in FATES[:3]} == {"reads"}
    assert pruned.loc["moved", "beyond_noise_high"] < 0
    assert list(fates.index.get_level_values("source").unique()) == list(DISTURBED)
    assert world["found"].best.query("concept == 'moved'")["latent"].iloc[0] == 1


def test_every_number_is_that_of_a_slow_count(world: Any) -> None:
    """With all tokens of a concept drawn, the draw is known up to its negatives: those are found
    again as the rows that the probe was measured on."""
    table = world["found"].readings
    fates = concept_fates(table).set_index(["concept", "source"])
    from prunelens.analyses.probes import _draw

    for number, name in enumerate(FATES):
        draw = _draw(world["labels"].has[number], world["halves"], 100, seed=number)
        assert not isinstance(draw, str)
        assert (world["labels"].has[number][draw.read] == draw.read_y).all()
        assert draw.read.min() >= NUM_TOKENS // 2 > draw.fit.max()
        aucs, without = {}, {}
        for source, fit in (("dense", "dense"), ("pruned", "dense"), ("pruned", "refit")):
            trained = world["read"]["dense" if fit == "dense" else source]
            x = trained.rows(torch.from_numpy(draw.fit)).numpy().astype(float)
            spread = np.where(x.std(0) > 0, x.std(0), 1.0)
            beta = slow.logistic_ridge(x / spread, draw.fit_y, c=PENALTY)
            read = world["read"][source].rows(torch.from_numpy(draw.read)).numpy().astype(float)
            scores = read / spread @ beta[:-1] + beta[-1]
            own = table.query(
                f"concept == {name!r} and reader == 'probe' and source == {source!r}"
                f" and fit == {fit!r}"
            ).iloc[0]
            aucs[source, fit] = slow.auc(scores, draw.read_y)
            without[source, fit] = slow.auc_without(scores, draw.read_y, draw.groups)
            assert own["auc"] == pytest.approx(aucs[source, fit], abs=2e-3)
            right = ((scores > 0) == draw.read_y)[draw.read_y].mean() / 2
            right += ((scores > 0) == draw.read_y)[~draw.read_y].mean() / 2
            assert own["balanced_accuracy"] == pytest.approx(right, abs=0.011)
        left = (aucs["pruned", "dense"] - 0.5) / (aucs["dense", "dense"] - 0.5)
        parts = [
            (a - 0.5) / (b - 0.5)
            for a, b in zip(without["pruned", "dense"], without["dense", "dense"], strict=True)
        ]
        found = fates.loc[(name, "pruned")]
        assert found["left"] == pytest.approx(left, abs=5e-3)
        if (error := slow.jackknife(left, parts)) > 1e-3:
            quantile = 2.093  # Student's t of 19 degrees of freedom
            assert found["left_low"] == pytest.approx(left - quantile * error, abs=0.02)
        latents = world["sae"].dense_latents(
            world["sae"].encode(world["read"]["dense"].rows(torch.from_numpy(draw.fit)))
        )
        best = slow.furthest_apart(latents.detach().numpy(), draw.fit_y, 5)
        own = world["found"].best.query(f"concept == {name!r}")["latent"].tolist()
        assert own[:2] == best[:2]


def test_a_concept_of_few_tokens_is_undecided_and_says_why(world: Any) -> None:
    has = world["labels"].has.copy()
    has[0] = False
    has[0, [1, 2, 3]] = True
    has[1, : NUM_TOKENS // 2 + 60] = has[1, NUM_TOKENS // 2 + 120 :] = False
    has[1, :40] = True
    labels = world["labels"]._replace(has=has)
    readings = probes(world["read"], {}, labels, world["halves"], most=50).readings
    told = readings.dropna(subset="reason").set_index("concept")["reason"]
    assert told["kept"].startswith("fewer than 10 tokens")
    assert told["moved"].startswith("fewer than") and len(told) == 2


def test_nothing_is_found_in_the_null(world: Any) -> None:
    """Of concepts along random directions, whether noise harms them more than itself."""
    generator = torch.Generator().manual_seed(1)
    has = torch.rand(60, NUM_TOKENS, generator=generator) < torch.linspace(0.02, 0.5, 60)[:, None]
    axes = torch.nn.functional.normalize(torch.randn(60, 40, generator=generator), dim=1)
    dense = 0.8 * torch.randn(NUM_TOKENS, 40, generator=generator) + has.float().T @ axes
    pruned = 0.9 * dense + 0.5 * torch.randn(dense.shape, generator=generator)
    first = torch.from_numpy(world["halves"].first)
    change = fit_common_change(Rows(dense), Rows(pruned), first)
    read = sources(Rows(dense), Rows(pruned), change, torch.arange(NUM_TOKENS))
    labels = Labels([f"direction {n}" for n in range(60)], has.numpy(), world["labels"].known)
    readings = probes(read, {}, labels, world["halves"], most=200).readings
    # without an SAE there are no latents to be read
    latents = readings[readings["reader"] == "probe"].assign(reader="latents_5", fit="dense")
    latents = latents.drop_duplicates(["concept", "source"])
    fates = concept_fates(pd.concat([readings, latents]))
    rare = rarity(fates, readings)
    assert (rare["p"] > 0.001).all() and rare["num_concepts"].min() > 40
    grades = probe_grades(fates.assign(fate="kept"), rare, "none").set_index("name")
    assert grades["passed"].all(), grades
    assert (grades.loc[grades["kind"] == "verdict", "num_undefined"] < 20).all()


# --- in a study ---------------------------------------------------------------------------------


def labelled_study(checkpoint_folder: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    words = ["red", "blue", "sun", "moon", "tree", "stone"]
    path = folder / "text.jsonl"
    with path.open("w") as file:
        for number in range(500):
            text = " ".join(generator.choice(words, 24)) + f" {number}"
            colours = [[m, m + 3] for m in range(len(text)) if text[m : m + 3] == "red"]
            kind = {"colour": colours, "all": [[0, len(text)]] if number % 2 else []}
            file.write(json.dumps({"text": text, "kind": kind}) + "\n")
    data = tiny_study(checkpoint_folder, path)
    data["corpus"] |= {"document": "file"}
    data |= {"probes": {"concepts": "kind", "tokens": 60}, "questions": ["probes"]}
    return data | {"prunings": data["prunings"][:1]}


def test_a_study_asks_about_the_concepts_of_a_column(
    checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    study = study_from_data(labelled_study(checkpoint_folder, tmp_path))
    out = tmp_path / "out"
    assert {r.status for r in run_and_report(study, out, quiet=True).results} == {"done"}
    concepts = pd.read_csv(out / "tables" / "concepts.csv", keep_default_na=False)
    assert set(concepts["concept"]) == {"colour", "all"} and len(concepts) == 6
    assert set(concepts["source"]) == {"pruned", "noise_shuffled", "null"}
    readings = pd.read_csv(out / "tables" / "probes.csv", keep_default_na=False)
    assert set(readings["reader"]) == {"probe", "latent", "latents_5"}
    assert set(readings[readings["reader"] == "latent"]["seed"]) == {"0.0"}
    latents = pd.read_parquet(out / "latents.parquet").query("method != 'dense'")
    assert set(latents["concept"].dropna()) <= {"colour", "all"}
    assert 2 <= latents["concept"].notna().sum() <= 20
    page = (out / "report.html").read_text()
    assert "Are concepts still there?" in page and (out / "figures/fig10_probes.png").is_file()


def test_without_labels_nothing_is_asked(
    checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = labelled_study(checkpoint_folder, tmp_path)
    plan = plan_study(
        study_from_data({**data, "questions": ["persistence", "probes"], "probes": {}})
    )
    assert not any("probes" in run.stages for run in plan.runs)
    named = {
        **data,
        "probes": {"concepts": "tag"},
    }  # which no row has: `plan` says what `run` would
    with pytest.raises(UserError, match=r"line 1 of text.jsonl has no field 'tag'"):
        list(text_check(study_from_data(named), study_from_data(named).models[0]))
    tokens = {**data["corpus"], "source": "tokens"}
    with pytest.raises(UserError, match=r"source 'tokens' is no text; give the text"):
        plan_study(study_from_data({**data, "corpus": tokens}), resolve=False)
    checks = preflight(plan.study, calibration_seconds=0).checks
    (told,) = [check for check in checks if check["check"] == "probes"]
    assert "nothing labels the text" in told["what"] and "probes.concepts" in told["fix"]
