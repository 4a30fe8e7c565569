"""Samples over documents: even, reproducible, and equal to what counting gives."""

from __future__ import annotations

import pathlib
import random
from collections import Counter
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.independent import documents as slow
from tests.tiny_study import tiny_study, write_text

from prunelens.activations import Statistics
from prunelens.analyses.noise import CommonChange
from prunelens.checkpoint import load_tokenizer
from prunelens.config import StudyConfig, study_from_data
from prunelens.corpus import split_tokens
from prunelens.model import load_model, run_to_site
from prunelens.spread import (
    DocumentStream,
    document_groups,
    one_of_each_stretch,
    spread_over_documents,
    window_documents,
)
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.matrix import parents_first
from prunelens.study.model_stages import load_window_documents, load_windows
from prunelens.study.plan import plan_study
from prunelens.study.questions.causal import _prompts
from prunelens.study.questions.transfer import _null_source
from prunelens.study.stages import STAGES, make_stages
from prunelens.study.work import Work, read_json


def worlds() -> list[list[int]]:
    """Sizes of documents: one, equal ones, one that is longer than all others, heavy tails."""
    source = random.Random(7)
    heavy = [[int(source.paretovariate(0.8)) for _ in range(n)] for n in (2, 7, 19)]
    return [[5], [3] * 6, [40, 1, 2, 1], [1, 1, 1, 90], *heavy]


def numbers_of(sizes: list[int]) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def ids(count: int, *, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.int32)


def test_a_window_is_of_the_document_of_its_first_token():
    source = random.Random(5)
    for _ in range(20):
        lengths = [source.randint(1, 30) for _ in range(source.randint(1, 12))]
        width = source.randint(1, 9)
        count = sum(lengths) // width
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].int()
        found = window_documents(starts, count, width)
        assert found.tolist() == slow.documents_of_windows(lengths, count, width)
        assert found.dtype == torch.int64


@pytest.mark.parametrize("sizes", worlds())
def test_every_prefix_is_as_even_as_can_be(sizes: list[int]):
    documents = numbers_of(sizes)
    order = spread_over_documents(documents, seed=1)
    assert order.sort().values.tolist() == list(range(len(documents)))
    for count in range(1, len(documents) + 1):
        given = Counter(documents[order[:count]].tolist())
        assert sorted(given[n] for n in range(len(sizes))) == slow.evenest_counts(sizes, count)


def test_the_spread_is_the_seeds_and_knows_no_names():
    documents = numbers_of([9, 30, 4, 17])
    order = spread_over_documents(documents, seed=1)
    assert torch.equal(order, spread_over_documents(documents, seed=1))
    assert torch.equal(order, spread_over_documents(100 + 7 * documents, seed=1))
    others = {tuple(spread_over_documents(documents, seed=s)[:4].tolist()) for s in range(20)}
    assert len(others) == 20
    assert len(spread_over_documents(documents[:0], seed=1)) == 0
    # Which window of a document comes first, and which document, is left to chance.
    firsts = torch.stack([spread_over_documents(documents, seed=s) for s in range(1000)])[:, 0]
    shares = torch.bincount(documents[firsts], minlength=4) / 1000
    assert float((shares - 0.25).abs().max()) < 0.06
    of_longest = firsts[documents[firsts] == 1] - 9
    assert float((of_longest.double().mean() - 14.5).abs()) < 2.2


@pytest.mark.parametrize("sizes", worlds())
@pytest.mark.parametrize("most", [1, 2, 4, 20])
def test_groups_divide_no_document_and_are_about_equal(sizes: list[int], most: int):
    documents = numbers_of(sizes)
    groups = document_groups(documents, most=most)
    assert groups.tolist() == sorted(groups.tolist())  # in order
    assert groups.unique().tolist() == list(range(min(most, len(sizes))))
    assert len({*zip(documents.tolist(), groups.tolist(), strict=True)}) == len(sizes)
    if len(sizes) < 10:
        best = slow.least_largest_group(sizes, most)
        # Half a document too many at most, of which the longest may be the half.
        assert int(torch.bincount(groups).max()) <= best + max(sizes) / 2


def test_groups_follow_the_order_of_appearance():
    rows = torch.tensor([5, 5, 2, 9, 2, 5, 9, 9, 2])
    assert document_groups(rows).tolist() == [0, 0, 1, 2, 1, 0, 2, 2, 1]
    assert document_groups(rows, most=2).unique().tolist() == [0, 1]
    many = numbers_of([3] * 1000)
    assert torch.bincount(document_groups(many)).tolist() == [150] * 20
    assert document_groups(many[:0]).tolist() == []


def test_one_of_each_stretch():
    assert one_of_each_stretch(7, 7, seed=0).tolist() == list(range(7))
    assert one_of_each_stretch(3, 9, seed=0).tolist() == [0, 1, 2]
    drawn = torch.stack([one_of_each_stretch(103, 10, seed=seed) for seed in range(1500)])
    bounds = torch.arange(11) * 103 // 10
    assert bool((drawn >= bounds[:-1]).all()) and bool((drawn < bounds[1:]).all())
    assert len(drawn.unique()) == 103  # any window may be drawn
    assert torch.equal(drawn[4], one_of_each_stretch(103, 10, seed=4))


# --- a stream that no document fills alone ------------------------------------------------------


def joined(lengths: list[int], quota: int, most: int) -> DocumentStream:
    stream = DocumentStream(quota, most)
    for number, length in enumerate(lengths):
        stream.add(ids(length, first=1000 * number))
    return stream


def test_a_long_document_gives_no_more_than_it_may():
    stream = joined([900, 10, 500, *[40] * 20], quota=400, most=50)
    tokens, starts = stream.joined()
    assert stream.missing == stream.lacking == 0 and len(tokens) == 400
    assert starts.tolist() == [0, 50, 60, 110, 150, 190, 230, 270, 310, 350, 390]
    assert Counter((tokens // 1000).tolist())[0] == 50
    for first, last in ((0, 50), (60, 110)):  # in a row
        assert tokens[first:last].diff().tolist() == [1] * 49
    assert int(tokens[0]) > 0  # and not from the front


def test_the_place_in_a_document_is_its_own():
    """Whatever comes before it, a document gives the same tokens."""
    alone = DocumentStream(400, 50)
    alone.add(ids(900))
    behind = DocumentStream(400, 50)
    behind.add(ids(90, first=5000))
    behind.add(ids(900))
    assert alone.missing == 350 and behind.missing == 300
    for stream in (alone, behind):
        for number in range(1, 10):
            stream.add(ids(50, first=2000 * number))
    assert torch.equal(alone.joined()[0][:50], behind.joined()[0][50:100])
    # Places are spread over the document.
    places = []
    for number in range(150):
        stream = DocumentStream(200, 10)
        stream.add(ids(200, first=number * 1000))
        for filler in range(19):
            stream.add(ids(10, first=10**6 + filler))
        places.append(int(stream.joined()[0][0]) - number * 1000)
    assert min(places) < 10 and max(places) > 180
    assert abs(sum(places) / 150 - 95) < 3 * 191 / 12**0.5 / 150**0.5


@pytest.mark.parametrize(
    "lengths", [[900, 10, 500, 40, 30], [390, 5, 5], [5, 5, 390], [150, 160, 170], [400]]
)
def test_where_the_text_ends_long_documents_give_more_and_equally(lengths: list[int]):
    stream = joined(lengths, quota=400, most=50)
    assert stream.missing > 0 and stream.lacking == 0
    tokens, starts = stream.joined()
    level = slow.level_that_fills(lengths, 400)
    expected = [min(length, level) for length in lengths]
    expected[-1] -= sum(expected) - 400
    assert Counter((tokens // 1000).tolist()) == Counter(dict(enumerate(expected)))
    assert starts.tolist() == [sum(expected[:n]) for n in range(len(expected))]


def test_too_little_is_what_all_together_lack():
    stream = joined([100, 20], quota=400, most=50)
    assert (stream.missing, stream.lacking) == (330, 280)


def test_without_a_cap_the_text_is_taken_from_the_front():
    tokens, starts = joined([300, 0, 300], quota=400, most=400).joined()
    assert tokens.tolist() == [*range(300), *range(2000, 2100)]
    assert starts.tolist() == [0, 300]


# --- what a study keeps of it -------------------------------------------------------------------


class Stored(NamedTuple):
    study: StudyConfig
    dense: Stage
    store: Store


@pytest.fixture(scope="module")
def stored(checkpoint_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The dense activations of a study."""
    folder = tmp_path_factory.mktemp("stored")
    study = study_from_data(tiny_study(checkpoint_folder, write_text(folder / "text.txt")))
    (dense,) = plan_study(study).runs[0].temporary()
    store = Store(folder / "artifacts")
    for stage in (dense.parents["corpus"], dense):
        make_stages(store, [stage], device="cpu", progress=lambda *_: None)
    return Stored(study, dense, store)


def test_windows_and_rows_of_a_study_know_their_documents(stored: Stored, tmp_path: pathlib.Path):
    study, dense, store = stored
    corpus = store.at_hand(dense.parents["corpus"])
    config = {"prompts": 30}
    work = mock.Mock(spec=Work, parents={"corpus": corpus}, out=tmp_path, config=config)
    documents = load_window_documents(work, "eval_first", "eval_second")
    windows = load_windows(work, "eval_first", "eval_second")
    splits = split_tokens(study.corpus, load_tokenizer(study.models[0]))
    # Each window's first token lies between the beginnings of its document and of the next.
    assert len(documents) == len(windows) and documents.diff().min() >= 0
    first = documents[: len(documents) // 2 + len(documents) % 2]
    assert int(first.max()) < len(splits.eval_first_starts) <= int(documents[len(first)])
    width = windows.shape[1] - 1
    for number, document in enumerate(first.tolist()):
        starts = [*splits.eval_first_starts.tolist(), len(splits.eval_first)]
        assert starts[document] <= number * width < starts[document + 1]
    prompts, of = _prompts(work)
    table = pd.read_parquet(tmp_path / "prompts.parquet")
    assert torch.equal(prompts, windows[table["window"].tolist()])
    assert table["document"].tolist() == of.tolist()
    assert torch.equal(of, documents[table["window"].tolist()])
    assert table["document"].nunique() == len(table) == 30  # of as many documents as can be
    rows = load_file(store.at_hand(dense) / "eval_documents.safetensors")["documents"]
    per_window = windows.shape[1] - study.activations.skip_first
    assert rows.dtype == torch.int32
    assert rows.view(-1, per_window).tolist() == [[n] * per_window for n in documents.tolist()]
    assert len(load_file(store.at_hand(dense) / "eval.safetensors")["activations"]) == len(rows)


def test_the_null_is_made_of_the_windows_for_refitting(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
):
    """They are drawn from all of train, and the stores' rows are found by their numbers."""
    study, dense, store = stored
    stores = dict.fromkeys(("dense_activations", "pruned_activations"), dense)
    parents = {role: store.at_hand(stage) for role, stage in stores.items()}
    corpus = store.at_hand(dense.parents["corpus"])
    work = mock.Mock(
        spec=Work,
        parents={**parents, "corpus": corpus},
        stage=mock.Mock(parents=stores),
        device="cpu",
    )
    none = CommonChange(torch.zeros(16).double(), torch.ones(16).double(), torch.tensor(0))
    monkeypatch.setattr("prunelens.study.questions.transfer.load_common_change", lambda _: none)
    plain = Statistics(torch.zeros(16), torch.ones(16))
    refit = torch.tensor([3, 17, 150])
    source = _null_source(work, plain, refit, 16)
    windows = load_windows(work, "train")[refit]
    own = run_to_site(load_model(study.models[0]), windows, "resid_post", 1)[:, 1:]
    for rows in source.refit:
        assert rows.num_tokens == 3 * 15
        torch.testing.assert_close(rows.rows(torch.arange(45)), own.flatten(0, 1))
    assert source.evaluation[0].num_tokens == 100 * 15


def test_conditions_read_the_same_windows_of_a_cut_text(
    checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path
):
    data = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    data["perplexity"] = {"context_tokens": [16, 32], "max_tokens": 310}
    dense, magnitude, _ = plan_study(study_from_data(data)).runs
    store, tables = Store(tmp_path / "artifacts"), []
    for run in (dense, magnitude):
        stage = run.stages["perplexity"]
        for needed in parents_first([stage], but=store.has):
            make_stages(store, [needed], device="cpu", progress=lambda *_: None)
        tables.append(pd.read_parquet(store.at_hand(stage) / "windows.parquet"))
    number = ["context_tokens", "window"]
    assert tables[0][number].equals(tables[1][number])
    assert (tables[0]["nll"] != tables[1]["nll"]).all()
    for context, count in ((16, 20), (32, 10)):
        drawn = tables[0].loc[tables[0]["context_tokens"] == context, "window"]
        of_all = 1500 // (context - 1)  # eval is 100 windows of 15 tokens and a BOS
        ends = [of_all * (n + 1) // count for n in range(count)]
        assert np.searchsorted(ends, drawn, side="right").tolist() == list(range(count))


def test_rows_of_the_planted_world_have_documents(tmp_path: pathlib.Path):
    config = {"train_tokens": 64, "eval_tokens": 4001}
    made = mock.Mock(spec=Work, out=tmp_path, parents={}, config=config, progress=print)
    STAGES["planted_activations"].made([made])
    rows = load_file(tmp_path / "eval_documents.safetensors")["documents"]
    assert rows.dtype == torch.int32 and rows.tolist() == sorted(rows.tolist())
    assert len(rows) == 4001 and len(rows.unique()) > 10
    half = read_json(tmp_path / "rows.json")["eval_first_rows"]
    assert rows[half - 1] < rows[half]  # none is in both halves
