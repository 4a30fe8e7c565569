from __future__ import annotations

import gzip
import hashlib
import json
import pathlib
import random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import models, normalizers, trainers

from conftest import panicking
from prunelens import text
from prunelens.checkpoint import load_tokenizer
from prunelens.config import CorpusConfig
from prunelens.corpus import TokenSplits, joined_stream, split_documents, split_tokens, windows
from prunelens.errors import UserError
from prunelens.study_file import read_study
from prunelens.text import documents, fingerprint, stdlib_documents, stdlib_held_out
from prunelens.tokens import _encoder

WIKITEXT = pathlib.Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
Tokenizer = transformers.PreTrainedTokenizerFast
SPLITS = ("train", "calibration", "eval_first", "eval_second")


def lines_of_text(count: int) -> list[str]:
    source = random.Random(3)
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "says", "hello")
    return [" ".join(source.choices(words, k=12)) + f" {number}" for number in range(count)]


def config_of(path: pathlib.Path, **fields: Any) -> CorpusConfig:
    small = {
        "context_tokens": 16,
        "train_tokens": 1600,
        "eval_tokens": 640,
        "calibration_tokens": 320,
        "document": "line",
    }
    return CorpusConfig(source="files", paths=(str(path),), **{**small, **fields})


@pytest.fixture
def text_file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "some.txt"
    path.write_text("\n".join(lines_of_text(400)), encoding="utf-8")
    return path


# --- documents ----------------------------------------------------------------------------------


def test_what_a_document_of_a_text_file_is(tmp_path: pathlib.Path):
    path = tmp_path / "a.txt"
    content = " \n = One = \n\nfirst\n = = part = = \nmore\n\n\n = Two = \nlast"
    path.write_text(content, encoding="utf-8")

    def texts(document: str) -> list[str]:
        return [d.text for d in documents(config_of(path, document=document))]

    assert texts("file") == [content]
    assert texts("line") == [line for line in content.splitlines(True) if line.strip()]
    assert texts("blank_line") == [
        " = One = \n",
        "first\n = = part = = \nmore\n",
        " = Two = \nlast",
    ]
    assert texts("heading") == [
        " = One = \n\nfirst\n = = part = = \nmore\n\n\n",
        " = Two = \nlast",
    ]


def test_jsonl_parquet_and_globs_hold_the_same(tmp_path: pathlib.Path):
    texts = lines_of_text(5)
    pd.DataFrame({"body": texts, "n": range(5)}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts))
    for pattern, expected in (("a.parquet", texts), ("*.jsonl", texts), ("*", texts + texts)):
        config = config_of(tmp_path / pattern, text_field="body", document="file")
        assert [d.text for d in documents(config)] == expected


LINE = json.dumps({"text": "fine"})
READ = {
    "half a pair": ("a.jsonl", rb"""{"text": "a \ud83d b\udc00"}""", ["a \ufffd b\ufffd"]),
    "a whole pair": ("a.jsonl", rb"""{"text": "\ud83d\ude00"}""", ["\U0001f600"]),
    "long integer": ("a.jsonl", b'{"text": "a", "id": ' + b"7" * 5000 + b"}", ["a"]),
    "BOM": ("a.jsonl", f"\ufeff{LINE}\n{LINE}".encode(), ["fine", "fine"]),
    "BOM of text": ("a.txt", "\ufeffa\ufeffb".encode(), ["a\ufeffb"]),
    "gzip": ("a.jsonl.gz", gzip.compress(LINE.encode()), ["fine"]),
    "gzip of text": ("A.TXT.GZ", gzip.compress(b"a\r\nb"), ["a\n", "b"]),
    "capitals": ("A.JSONL", LINE.encode(), ["fine"]),
    "nested": ("a.jsonl", b'{"meta": {"text": {"en": "in"}}}', ["in"], "meta.text.en"),
    "with a dot": ("a.jsonl", b'{"m.x": "out", "m": {"x": "in"}}', ["out"], "m.x"),
    "both": ("a.jsonl", b'{"m": {"x.y": "in"}}', ["in"], "m.x.y"),
    "null above": ("a.jsonl", b'{"m": null}\n{"m": {"x": "in"}}', ["in"], "m.x"),
}


@pytest.mark.parametrize("case", READ)
def test_rows_as_they_come(case: str, tmp_path: pathlib.Path):
    name, content, expected, *field = READ[case]
    (tmp_path / name).write_bytes(content)
    config = config_of(tmp_path / name, text_field=field[0] if field else "text")
    assert [d.text for d in documents(config)] == expected
    assert len(fingerprint(config)) == 64


def test_nested_fields_of_parquet(tmp_path: pathlib.Path):
    rows = {"meta": [{"text": "in", "n": 1}, None, {"text": None, "n": 2}], "id": [1, 2, 3]}
    for extra, expected in (({}, ["in"]), ({"meta.text": ["a", "b", "c"]}, ["a", "b", "c"])):
        pd.DataFrame(rows | extra).to_parquet(tmp_path / "a.parquet")
        config = config_of(tmp_path / "a.parquet", text_field="meta.text")
        assert [d.text for d in documents(config)] == expected


@pytest.mark.parametrize("document", ["file", "line", "blank_line", "heading"])
def test_of_a_long_document_no_more_is_held_than_is_wanted(document: str, tmp_path: pathlib.Path):
    text_of = f" = One = \n{'a' * 100}\n\n = Two = \nb\n"
    (tmp_path / "a.txt").write_text(text_of)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in text_of.split("\n"))
    )
    for name in ("a.txt", "a.jsonl"):
        config = config_of(tmp_path / name, document=document)
        whole = [d.text for d in documents(config)]
        assert [d.text for d in documents(config, most=20)] == [t[:20] for t in whole]
        assert max(map(len, whole)) >= 100


def test_stdlib_selection_is_what_the_bundled_model_was_trained_on():
    modules = stdlib_documents()
    names = [name for name, _ in modules]  # unpacks as the training tool does
    assert len(set(names)) == len(names) > 300
    assert "argparse" in names and "json.decoder" in names and "asyncio" in names
    assert not any("test" in name.split(".")[:-1] for name in names)
    assert not any(name.startswith(("encodings.", "pydoc_data.")) for name in names)
    digest = int(hashlib.sha256(b"argparse").hexdigest(), 16)
    assert stdlib_held_out("argparse") == (digest % 10 == 0)
    assert 0.05 < sum(map(stdlib_held_out, names)) / len(names) < 0.15


def test_fingerprint_is_content_not_place(tmp_path: pathlib.Path):
    prints = []
    for folder, content in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(content)
        prints.append(fingerprint(config_of(tmp_path / folder / "x.txt")))
    assert prints[0] == prints[1] != prints[2]
    assert len(fingerprint(CorpusConfig())) == 64


# --- splits and windows -------------------------------------------------------------------------


def test_splits_are_disjoint_by_document_and_in_order(
    text_file: pathlib.Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(text_file)
    splits = split_tokens(config, tiny_tokenizer)
    texts = [d.text for d in documents(config)]
    quotas = {"train": 1500, "calibration": 300, "eval_first": 300, "eval_second": 300}
    assert {s: len(getattr(splits, s)) for s in SPLITS} == quotas
    expected: dict[str, list[str]] = {split: [] for split in SPLITS}
    for content in texts:  # u = sha256 / 2^256 in floats, independently
        u = int(hashlib.sha256(content.encode()).hexdigest(), 16) / 2**256
        split = SPLITS[(u >= 15 / 24) + (u >= 18 / 24) + (u >= 21 / 24)]
        expected[split].append(content)
    for split in SPLITS:
        stored, starts = getattr(splits, split), getattr(splits, f"{split}_starts").tolist()
        assert stored.dtype == torch.int32
        pieces = [stored[a:b].tolist() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for number, piece in enumerate(pieces):  # documents in their order, each in one piece
            ids = tiny_tokenizer(expected[split][number], add_special_tokens=False)["input_ids"]
            is_last = number == len(pieces) - 1
            whole = len(ids) if split == "train" else min(len(ids), 300 // 16)
            assert len(piece) == whole or (is_last and len(piece) < whole)
            first = max(range(len(ids)), key=lambda n: ids[n : n + len(piece)] == piece)
            assert ids[first : first + len(piece)] == piece
            assert split != "train" or first == 0
    monkeypatch.setattr("prunelens.corpus._BATCH_DOCUMENTS", 3)
    again = split_tokens(config, tiny_tokenizer)
    assert all(torch.equal(getattr(splits, s), getattr(again, s)) for s in SPLITS)


def test_identical_text_lands_in_one_split(tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer):
    path = tmp_path / "twice.txt"
    lines = lines_of_text(200)
    path.write_text("\n".join(lines * 2) + "\n", encoding="utf-8")
    splits = split_tokens(config_of(path), tiny_tokenizer)
    found = [
        {number for number in range(200) if f" {number}\n" in tiny_tokenizer.decode(part)}
        for part in splits[:4]
    ]
    assert all(found) and sum(map(len, found)) == len(set.union(*found))


def test_stdlib_evaluates_on_held_out_modules_only(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    lines = lines_of_text(400)
    modules = [text.Document(f"module{n}", line + "\n") for n, line in enumerate(lines)]
    copied = next(m for m in modules if not stdlib_held_out(m.name)).text
    held = next(name for name in (f"copy{n}" for n in range(1000)) if stdlib_held_out(name))
    modules.append(text.Document(held, copied))
    monkeypatch.setattr("prunelens.text.stdlib.stdlib_documents", lambda: modules)
    monkeypatch.setattr("prunelens.corpus._LEAST_DOCUMENTS", 1)  # so that lines stay whole
    config = config_of(pathlib.Path(), train_tokens=3200, eval_tokens=192)
    config = config.model_copy(update={"source": "stdlib"})
    splits = split_tokens(config, tiny_tokenizer)
    joined, _ = joined_stream(config, tiny_tokenizer)
    trained = {m.text for m in modules if not stdlib_held_out(m.name)}
    for part in (*splits[2:4], joined):
        whole = [line + "\n" for line in tiny_tokenizer.decode(part).split("\n")[:-1] if line]
        assert whole and not trained & set(whole)
    for part in splits[:2]:
        whole = [line + "\n" for line in tiny_tokenizer.decode(part).split("\n")[:-1]]
        assert set(whole) <= trained


@pytest.mark.parametrize("split", SPLITS)
def test_no_document_dominates_a_measurement(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer, split: str
):
    """Wherever a long file stands, it is a 16th at most, and gives the same tokens."""
    lines = [line + "\n" for line in lines_of_text(900)]
    bounds = dict(zip(SPLITS, ((0, 5), (5, 6), (6, 8), (8, 10)), strict=True))[split]
    longs = ("".join(lines_of_text(500)).upper() + str(number) for number in range(1000))
    long = next(
        text_of
        for text_of in longs
        if bounds[0]
        <= int(hashlib.sha256(text_of.encode()).hexdigest(), 16) / 2**256 * 10
        < bounds[1]
    )
    config = config_of(tmp_path / "a.jsonl", document="file", eval_tokens=1280)
    own = []
    for place in (0, 60):
        rows = [json.dumps({"text": content}) for content in (*lines[:place], long, *lines[place:])]
        (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
        even = {"even": ("train",)} if split == "train" else {}
        splits = split_tokens(config, tiny_tokenizer, **even)
        stream, starts = getattr(splits, split), getattr(splits, f"{split}_starts")
        pieces = stream.tensor_split(starts[1:])
        assert max(map(len, pieces)) == len(stream) // 16 and len(pieces) >= 16
        own.append({tuple(piece.tolist()) for piece in pieces})
    ids = tiny_tokenizer(long, add_special_tokens=False)["input_ids"]
    most = len(stream) // 16
    parts = {tuple(ids[first : first + most]) for first in range(len(ids) - most + 1)}
    assert len(own[0] & own[1] & parts) == 1


def test_a_split_of_few_long_documents_still_fills(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
):
    """Twenty files for all: with a 16th of each, no part of eval would be full."""
    lines = lines_of_text(1200)
    for number in range(20):
        text_of = "\n".join(lines[60 * number :][:60])
        (tmp_path / f"{number}.txt").write_text(text_of, encoding="utf-8")
    equal = {"train_tokens": 640, "calibration_tokens": 640, "eval_tokens": 1280}
    config = config_of(tmp_path / "*.txt", document="file", **equal)
    splits = split_tokens(config, tiny_tokenizer)
    for split in SPLITS[1:]:
        stream, starts = getattr(splits, split), getattr(splits, f"{split}_starts")
        lengths = [len(piece) for piece in stream.tensor_split(starts[1:])]
        assert sum(lengths) == 600 and len(lengths) < 16
        assert len(set(lengths[:-1])) <= 1  # all are long: they give equally


def test_the_demos_text_is_of_many_modules():
    """Its eval used to be filled by the first files: the longest has 28,427 of 60,000 tokens."""
    study = read_study("demo")
    tokenizer = load_tokenizer(study.models[0])
    splits = split_tokens(study.corpus, tokenizer, only=SPLITS[2:])
    for split in SPLITS[2:]:
        stream, starts = getattr(splits, split), getattr(splits, f"{split}_starts")
        pieces = stream.tensor_split(starts[1:])
        assert max(map(len, pieces)) == len(stream) // 16 and len(pieces) >= 16


def test_windows_open_with_one_bos():
    stream = torch.arange(1, 24, dtype=torch.int32)
    plain = windows(stream, 8, None)
    assert plain.dtype == torch.int64 and plain.tolist() == [[*range(1, 9)], [*range(9, 17)]]
    opened = windows(stream, 8, 0)
    assert opened.tolist() == [[0, *range(1 + 7 * n, 8 + 7 * n)] for n in range(3)]
    doubled = torch.cat([torch.zeros(1, dtype=torch.int32), stream])
    assert torch.equal(windows(doubled, 8, 0), opened)
    assert windows(stream[:3], 8, 0).shape == (0, 8)


def test_bos_options(text_file: pathlib.Path, tiny_tokenizer: Tokenizer):
    text_file.write_text("<bos>" + "\n<bos>".join(lines_of_text(400)), encoding="utf-8")
    for bos, expected in (("auto", 0), ("always", 0), ("never", None)):
        splits = split_tokens(config_of(text_file, bos=bos), tiny_tokenizer)
        assert splits.bos_token == expected
        cut = windows(splits.train, 16, splits.bos_token)
        assert cut.shape == (100, 16)
        if bos != "never":
            assert (cut[:, 0] == 0).all() and (cut[:, 1:] != 0).all()


def test_joined_stream_is_one_text(tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n words here\n", encoding="utf-8")
    stream, bos_token = joined_stream(config_of(path), tiny_tokenizer)
    assert bos_token == 0
    # the convention: "\n\n".join over the hub's rows, where a blank line is an empty row
    assert tiny_tokenizer.decode(stream) == "\n\n = One = \n\n\n\n\n words here\n"


def test_progress_counts_the_tokens_kept(text_file: pathlib.Path, tiny_tokenizer: Tokenizer):
    told: list[int] = []
    split_tokens(config_of(text_file), tiny_tokenizer, progress=told.append)
    assert told == sorted(told) and told[-1] == 2400


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="the shared WikiText-2 files are not here")
def test_wikitext_by_heading():
    config = config_of(WIKITEXT / "valid.txt", document="heading")
    articles = list(documents(config))
    assert len(articles) == 60  # the release's number of validation articles
    assert all(a.text.startswith(" = ") and not a.text.startswith(" = =") for a in articles)


# --- ready-made tokens --------------------------------------------------------------------------


def test_tokens_need_no_tokenizer(tmp_path: pathlib.Path):
    rows = torch.arange(1, 16 * 400 + 1).view(400, 16)
    save_file({"tokens": rows}, tmp_path / "t.safetensors")
    config = config_of(tmp_path / "t.safetensors", document="file")
    config = config.model_copy(update={"source": "tokens"})
    splits = split_tokens(config, None)
    assert splits.bos_token is None
    cut = torch.cat([windows(part, 16, None) for part in splits[:4]])
    assert cut.shape == (160, 16) and len(cut.unique(dim=0)) == 160
    assert (cut[:, 0] % 16 == 1).all()  # rows stay whole
    assert splits.train_starts.tolist() == list(range(0, 1600, 16))  # each is a document
    assert split_documents(splits, 16, *SPLITS).tolist() == list(range(160))
    assert torch.equal(joined_stream(config, None)[0], rows.int().flatten())
    rows[:, 0] = 0
    save_file({"tokens": rows}, tmp_path / "t.safetensors")
    opened = split_tokens(config, None)
    assert opened.bos_token == 0 and len(opened.train) == 1500
    assert (windows(opened.train, 16, 0)[:, 1] % 16 == 2).all()


def test_bad_tokens_files(tmp_path: pathlib.Path):
    path = tmp_path / "t.safetensors"
    config = config_of(path).model_copy(update={"source": "tokens"})

    def message(tensors: dict[str, torch.Tensor], **fields: Any) -> str:
        save_file(tensors, path)
        with pytest.raises(UserError) as caught:
            split_tokens(config.model_copy(update=fields), None)
        return str(caught.value)

    good = torch.arange(160).view(10, 16)
    wide = message({"tokens": torch.ones(4, 20, dtype=torch.long)})
    assert wide == (
        "corpus.context_tokens: 16, but the windows of t.safetensors are 20 wide;"
        " set context_tokens to 20"
    )
    assert "no tensor 'tokens' but ['ids']" in message({"ids": good})
    assert "must hold token ids as integers" in message({"tokens": good.float()})
    assert "ids below 0" in message({"tokens": good - 5})
    assert "corpus.bos: 'always'" in message({"tokens": good}, bos="always")
    assert "is more than the text holds" in message({"tokens": good})
    path.write_text("torn")
    with pytest.raises(UserError, match="is no safetensors file"):
        split_tokens(config, None)


# --- long texts ---------------------------------------------------------------------------------


def prefixing_tokenizer() -> Tokenizer:
    """As Llama 2's: it puts a space before whatever it is given, and has words across spaces."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(lines_of_text(20), trainer)
    return Tokenizer(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("kind", "gap"),
    [("bytes", " "), ("bytes", ""), ("bytes", "\n"), ("prefix", " "), ("prefix", "    ")],
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    kind: str, gap: str, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tiny_tokenizer if kind == "bytes" else prefixing_tokenizer()
    long = gap.join(lines_of_text(60)).replace(" ", gap)
    texts = ["short", long, "other"]
    whole = _encoder(tokenizer, None)(texts)
    seen: list[int] = []
    monkeypatch.setattr("prunelens.tokens.PIECE", 700)
    real = type(tokenizer).__call__

    def counting(self: Tokenizer, given: list[str], **named: Any) -> Any:
        seen.extend(map(len, given))
        return real(self, given, **named)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    pieces = _encoder(tokenizer, None)(texts)
    assert all(map(torch.equal, pieces, whole))
    assert max(seen) <= 700 and sum(size > 128 for size in seen) > 3


def test_one_long_line_is_not_tokenised_as_a_whole_and_the_cause_is_named(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A line of 50 MB took 8.6 GB, and more text was asked for."""
    (tmp_path / "a.txt").write_text(" ".join(lines_of_text(3000)))
    monkeypatch.setattr("prunelens.tokens.PIECE", 2000)
    read: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        for document in documents(*arguments, **named):
            read.append(len(document.text))
            yield document

    monkeypatch.setattr("prunelens.corpus.documents", counted)
    for document in ("file", "line", "blank_line"):
        with pytest.raises(UserError) as caught:
            split_tokens(config_of(tmp_path / "a.txt", document=document), tiny_tokenizer)
        said = str(caught.value)
        assert f"(corpus.document: '{document}' makes 1 of it, each in one split alone)" in said
        assert "; set another document: or cut the text into more, or give more text" in said
        assert "lower" not in said
    assert read == [16 * 1500] * 3


def test_a_tokenizer_that_panics_ends_in_one_line(
    text_file: pathlib.Path, tiny_tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
):
    tokenizer = panicking(tiny_tokenizer)
    text_file.write_text("a" * 40 + "c")
    with pytest.raises(UserError) as caught:
        split_tokens(config_of(text_file), tokenizer)
    said = str(caught.value)
    assert said.startswith("models.name: the tokenizer of ") and "retry-limit-in-match" in said
    assert "; mend the regular expressions" in said
    assert capfd.readouterr().err == ""  # Rust's own report


# --- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def local_dataset(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    frame = pd.DataFrame({"text": lines_of_text(400), "id": range(400)})
    frame.to_parquet(folder / "train.parquet")
    return folder


def hub_config(dataset: object, **fields: Any) -> CorpusConfig:
    base = config_of(pathlib.Path()).model_dump() | {"source": "hub", "dataset": str(dataset)}
    return CorpusConfig(**{**base, **fields})


def test_hub_rows_are_streamed(local_dataset: pathlib.Path, tiny_tokenizer: Tokenizer):
    config = hub_config(local_dataset)
    assert [d.text for d in documents(config)] == lines_of_text(400)
    assert isinstance(split_tokens(config, tiny_tokenizer), TokenSplits)
    before = fingerprint(config)
    pd.DataFrame({"text": ["other"]}).to_parquet(local_dataset / "train.parquet")
    assert fingerprint(config) != before


def test_bad_hub_datasets_give_one_line(
    local_dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.jsonl").write_bytes(READ["half a pair"][1])
    cases = {
        "corpus.split: 'dev'": hub_config(local_dataset, split="dev"),
        "corpus.subset: 'big'": hub_config(local_dataset, subset="big"),
        "corpus.text_field: ": hub_config(local_dataset, text_field="body"),
        "corpus.dataset: ": hub_config(tmp_path / "empty"),
        f"corpus.dataset: '{tmp_path / 'half'}' cannot be read (JSON": hub_config(
            tmp_path / "half"
        ),
        "corpus.dataset: 'org/none' is not in the local cache and the hub": hub_config("org/none"),
        "corpus.dataset: 'a/b/c' is neither": hub_config("a/b/c"),
    }
    for expected, config in cases.items():
        with pytest.raises(UserError) as caught:
            list(documents(config))
        assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_a_hub_dataset_is_identified_by_its_commit(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    asked = []

    def fetch(name: str, **named: Any) -> str:
        asked.append((name, named["repo_type"], named["revision"]))
        return "cache/snapshots/" + "c0ffee" * 6 + "abcd"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    config = hub_config("org/fingerprinted", revision="main")
    assert fingerprint(config) == fingerprint(config) == "c0ffee" * 6 + "abcd"
    assert asked == [("org/fingerprinted", "dataset", "main")]  # once per process


def test_a_gated_dataset_says_so(monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub

    def refuse(*_args: object, **_named: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/g' is a gated dataset on …")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "cache/abc")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"corpus.dataset: 'org/gated' is gated; accept"):
        list(documents(hub_config("org/gated")))


# --- bad input ----------------------------------------------------------------------------------


def test_bad_files_give_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "other.jsonl").write_text('{"body": "a", "n": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "deep.jsonl").write_text(f'{LINE}\n{{"text": "a", "x": {"[" * 9999}{"]" * 9999}}}')
    (tmp_path / "flat.jsonl").write_text('{"text": {"de": "a"}, "m": "b"}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 99)[:-9])
    (tmp_path / "flipped.txt.gz").write_bytes(gzip.compress(b"abc")[:10] + b"\xff" * 20)
    (tmp_path / "none.txt.gz").write_text("plain")
    (tmp_path / "torn.parquet").write_text("PAR1")
    latin = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    pd.DataFrame({"body": ["a"]}).to_parquet(tmp_path / "other.parquet")
    cases = {
        "missing.txt": "does not exist; check the path",
        "*.none": "matches no file; check the pattern",
        "": "is a folder; name files",
        "table.csv": "ends in '.csv'; source 'files' reads .txt, .jsonl, .parquet",
        "empty.txt": "holds no text; give a source that does",
        "latin.txt": "is not UTF-8 text",
        "torn.jsonl": "line 2 of torn.jsonl is not JSON",
        "deep.jsonl": "line 2 of deep.jsonl is nested too deeply; mend it or leave it out",
        "list.jsonl": "line 1 of list.jsonl is no JSON object",
        "other.jsonl": "line 1 of other.jsonl has no field 'text'; it has body, n",
        "number.jsonl": "'text' of line 1 of number.jsonl holds int, not text",
        "flat.jsonl": "'text' of line 1 of flat.jsonl holds dict, not text",
        "torn.jsonl.gz": "is no whole gzip file",
        "flipped.txt.gz": "is no whole gzip file",
        "none.txt.gz": "is no whole gzip file",
        "latin.parquet": "is no Parquet file",
        "torn.parquet": "is no Parquet file",
        "other.parquet": "has no field 'text'; it has body",
    }
    for name, expected in cases.items():
        with pytest.raises(UserError) as caught:
            list(documents(config_of(tmp_path / name)))
        said = str(caught.value)
        assert said.startswith("corpus.") and expected in said and "\n" not in said
    for field in ("text.en", "m.x", "x.y"):
        with pytest.raises(UserError, match=f"has no field '{field}'; it has text, m"):
            list(documents(config_of(tmp_path / "flat.jsonl", text_field=field)))
    monkeypatch.setattr("prunelens.text.files._MOST_IN_ROW", 20)
    with pytest.raises(UserError, match=r"line 1 of flat.jsonl is longer than 20 characters"):
        list(documents(config_of(tmp_path / "flat.jsonl")))


def test_too_little_text_says_by_how_much_to_lower(
    text_file: pathlib.Path, tiny_tokenizer: Tokenizer
):
    config = config_of(text_file, train_tokens=64_000, eval_tokens=6_400, calibration_tokens=6_400)
    with pytest.raises(UserError, match=r"is more than the text holds") as caught:
        split_tokens(config, tiny_tokenizer)
    fix = str(caught.value).rpartition("e.g. ")[2].split(", ")
    lowered = {field: int(value) for field, value in (part.split() for part in fix)}
    splits = split_tokens(config.model_copy(update=lowered), tiny_tokenizer)  # the advice holds
    assert len(splits.train) == lowered["train_tokens"] // 16 * 15


def test_other_bad_input(
    text_file: pathlib.Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(text_file)
    with pytest.raises(UserError, match=r"corpus.source: 'files' is text, .* no tokenizer"):
        split_tokens(config, None)
    with pytest.raises(UserError, match=r"corpus.eval_tokens: 31 is less than 2 windows of 16"):
        split_tokens(config.model_copy(update={"eval_tokens": 31}), tiny_tokenizer)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert split_tokens(config, bare).bos_token is None
    with pytest.raises(UserError, match=r"corpus.bos: 'always', but the tokenizer has no BOS"):
        split_tokens(config.model_copy(update={"bos": "always"}), bare)
    with pytest.raises(UserError, match=r"corpus.source: 'tokens' holds token ids, no text"):
        list(documents(config.model_copy(update={"source": "tokens"})))
    monkeypatch.setattr(
        text.stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(text_file.parent)}
    )
    with pytest.raises(UserError, match=r"corpus.source: 'stdlib' needs the standard library's"):
        stdlib_documents()
