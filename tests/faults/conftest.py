"""The tiny study that most faults are tried on, and what the whole harness is told."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any, NamedTuple

import pytest

from faults.kill import results_of
from prunelens.config import StudyConfig, study_from_data
from prunelens.report.write import run_and_report
from tiny_study import tiny_study, write_text


def pytest_addoption(parser: pytest.Parser) -> None:
    """Only where pytest is told of this folder: `pytest tests/faults --moments 50`."""
    group = parser.getgroup("faults")
    group.addoption("--moments", type=int, default=6, help="kills of a study; default: 6")
    group.addoption("--flips", type=int, default=3, help="single flipped bits; default: 3")
    group.addoption("--fault-seed", type=int, default=0, help="draws moments and bits")


class Finished(NamedTuple):
    """A tiny study that has ended."""

    study: StudyConfig
    folder: pathlib.Path
    results: dict[str, bytes]
    with_activations: pathlib.Path
    """The same, but that it was told to keep them."""

    def copy(self, folder: pathlib.Path) -> pathlib.Path:
        """The same somewhere else, to be damaged."""
        return pathlib.Path(shutil.copytree(self.folder, folder))

    def copy_without(self, folder: pathlib.Path, *kinds: str) -> pathlib.Path:
        """The same, but that artifacts of some kinds are still to be made, and all results."""
        copy = self.copy(folder)
        for part in ("tables", *(f"artifacts/{kind}" for kind in kinds)):
            shutil.rmtree(copy / part)
        for name in ("latents.parquet", "runs.csv"):
            (copy / name).unlink()
        return copy


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; figures and page take longer than the study itself."""
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_data(
    checkpoint_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The tiny study as data."""
    return tiny_study(checkpoint_folder, write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(scope="session")
def finished(tiny_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An undisturbed run, with nothing from `pool`: whoever has all answers makes no activations.

    Copy it before changing it.
    """
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    study = study_from_data(tiny_data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        patch.setattr("prunelens.report.write.write_page", lambda *_: None)
        keeping = study_from_data({**tiny_data, "keep_activations": True})
        run_and_report(keeping, folder, quiet=True)
        kept = shutil.copytree(folder, folder.with_name("kept"))
        run_and_report(study, folder, quiet=True)
    assert not list(folder.glob("artifacts/activations/*"))
    return Finished(study, folder, results_of(folder), pathlib.Path(kept))
