"""README's example runs, its study file is valid, and its numbers are those of the demo."""

import pathlib
import re

import pytest

from prunelens.config import study_from_data
from prunelens.study.finished import Study
from prunelens.study_file import parse_yaml

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "runs" / "demo"
with_a_demo = pytest.mark.skipif(
    not (DEMO / "report.html").exists(), reason="run `make demo` first"
)


def block(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []
    words = [word for word in README.split("## Your model")[0].split() if re.search("[a-z]", word)]
    assert len(words) <= 250


@with_a_demo
def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(block("python")[0], "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert printed.startswith("Perplexity 15")
    assert len(printed.splitlines()) >= 7  # a sentence, a heading, five latents


def test_the_program_step_by_step_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    exec(compile(block("python", text)[1], "python.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    before, after = re.search(r"perplexity ([\d.]+) -> ([\d.]+)", printed).groups()
    assert 1 < float(before) < float(after)
    assert re.search(r"shared start: [01]\.\d+", printed)


def test_the_study_file_is_valid():
    study = study_from_data(parse_yaml(block("yaml")[0], where="README.md"))
    assert study.sae.steps == 20_000
    assert len(study.conditions()) == 3


@with_a_demo
def test_the_demo_passes_its_own_check():
    judged = Study(DEMO).table("sufficiency")["trained_enough"].dropna()
    assert len(judged) == 2 and judged.all()
    assert "not trained enough to compare" not in (DEMO / "report.html").read_text("utf-8")
    assert set(Study(DEMO).answers["training"]) == {"trained enough", "dense trained enough"}


@with_a_demo
def test_the_numbers_are_those_of_the_demo():
    """But for what another machine's arithmetic changes."""
    answers = Study(DEMO).answers
    heading, _, *rows = re.search("demo: begin -->\n(.*?)<!--", README, re.DOTALL)[1].splitlines()
    assert float(re.search(r"dense ([\d.]+)", heading)[1]) == pytest.approx(
        answers["dense_perplexity"].iloc[0], rel=0.01
    )
    for row, found in zip(rows, answers.itertuples(), strict=True):
        name, perplexity, features, verdict = (cell.strip() for cell in row.split("|")[1:-1])
        assert name.lower() == f"{found.method} {100 * found.sparsity:.0f} %"
        assert float(perplexity) == pytest.approx(found.perplexity, rel=0.05)
        kept, noise, ratio, low, high = map(float, re.findall(r"[\d.]+", features))
        assert kept == pytest.approx(found.persistence, abs=0.03)
        assert noise == pytest.approx(found.persistence / found.relative, abs=0.03)
        assert max(low, found.low) <= min(high, found.high), (low, high, found.low, found.high)
        assert low <= ratio <= high
        assert set(verdict.split(", ")) & set(found.dense_sae.split(", ")), (
            verdict,
            found.dense_sae,
        )
