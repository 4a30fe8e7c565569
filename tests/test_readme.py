"""The README's example runs and its study file is valid."""

import pathlib
import re

from prunelens.config import study_from_data
from prunelens.study_file import parse_yaml

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)[1]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    before, after = re.search(r"perplexity ([\d.]+) -> ([\d.]+)", printed).groups()
    assert 1 < float(before) < float(after)
    assert re.search(r"shared start: [01]\.\d+", printed)


def test_the_study_file_is_valid():
    study = study_from_data(parse_yaml(block("yaml"), where="README.md"))
    assert study.sae.steps == 20_000
    assert len(study.conditions()) == 3
