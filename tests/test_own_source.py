"""A source of text that somebody else declares, here, is what a study is run on."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator

import pytest

from prunelens.config import SOURCES, CorpusConfig
from prunelens.errors import UserError
from prunelens.report.write import run_and_report
from prunelens.study.exports import export_checkpoint
from prunelens.study.plan import plan_study
from prunelens.study.preflight.text_checks import text_check
from prunelens.study_file import read_study
from prunelens.text import READERS, Document, Reader, documents, fingerprint, named, register
from tiny_study import SENTENCES, tiny_study

NUMBER = 800


def _poems(config: CorpusConfig, most: int) -> Iterator[Document]:
    for number in range(NUMBER):
        text = f"{SENTENCES[number % 4]} {number} {SENTENCES[number % 3]} {config.split}"
        yield Document(f"poem {number}", text[:most])


POEMS = Reader(
    "poems",
    "poems made on the spot",
    _poems,
    lambda config: hashlib.sha256(f"{NUMBER} {config.split}".encode()).hexdigest(),
    needs="dataset",
)


@pytest.fixture
def study_file(checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    data = tiny_study(checkpoint_folder, tmp_path / "unused.txt")
    sizes = {"train_tokens": 1600, "eval_tokens": 800, "calibration_tokens": 400}
    data["corpus"] |= sizes | {"source": "poems", "paths": [], "dataset": "spring"}
    data |= {"questions": [], "prunings": data["prunings"][1:]}
    file = tmp_path / "mine.yaml"
    file.write_text(repr(data))
    yield file
    READERS.pop("poems", None), SOURCES.pop("poems", None)


def test_a_study_reads_it_once_it_is_declared(
    study_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match="'poems' is no source of text; there are stdlib, files, "):
        read_study(str(study_file))
    register(POEMS)
    study = read_study(str(study_file))
    corpus = study.corpus
    assert len(list(documents(corpus))) == NUMBER and named(corpus) == "corpus.dataset: 'spring'"
    with pytest.raises(ValueError, match="dataset: source 'poems' needs a data set id"):
        CorpusConfig(source="poems")
    other = study.model_copy(update={"corpus": corpus.model_copy(update={"split": "autumn"})})
    assert fingerprint(corpus) != fingerprint(other.corpus)
    ours, theirs = (set(plan_study(s).targets().values()) for s in (study, other))
    assert {s.identity for s in ours}.isdisjoint(s.identity for s in theirs)
    assert [found.level for found in text_check(study, study.models[0])] == ["ok"]

    out = tmp_path / "out"
    assert {run.status for run in run_and_report(study, out, quiet=True).results} == {"done"}
    assert "poems eval" in (out / "tables" / "perplexity.csv").read_text()
    export_checkpoint(out, "wanda-row-0.30", tmp_path / "exported")
    assert "poems made on the spot" in (tmp_path / "exported" / "README.md").read_text()


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="'hub' is there already"):
        register(READERS["hub"])


def test_what_a_study_file_may_name_is_what_is_read() -> None:
    assert {name: reader.needs for name, reader in READERS.items()} == SOURCES
