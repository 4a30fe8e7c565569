"""`make audit`: silence of the service is not taken for health."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest

PATH = pathlib.Path(__file__).parents[1] / "tools" / "audit.py"
SKIPPED = {"name": "a", "skip_reason": "not found"}
SOUND = {"name": "b", "version": "1", "vulns": []}
FLAW = {"id": "PYSEC-1", "fix_versions": ["3"], "aliases": ["CVE-1"]}
FLAWED = {"name": "c", "version": "2", "vulns": [FLAW, {**FLAW, "id": "PYSEC-2", "aliases": []}]}


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_service_that_knows_no_package_was_not_reached(audit: Any) -> None:
    assert audit.judged({"dependencies": [SKIPPED, SKIPPED]}) is None
    assert audit.judged({"dependencies": []}) is None


def test_known_vulnerabilities_fail(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audit.judged({"dependencies": [SKIPPED, SOUND, FLAWED]})
    assert (found.num_audited, found.num_skipped, len(found.known)) == (2, 1, 2)
    assert audit._told(found, "pypi") == 1
    assert "c 2: PYSEC-1 (mended in 3)" in capsys.readouterr().out
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "why", "PYSEC-2": "why"})
    assert audit._told(audit.judged({"dependencies": [SOUND, FLAWED]}), "pypi") == 0


def test_where_nobody_can_be_asked_it_says_so_and_passes(
    audit: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "OUT", tmp_path / "build")
    monkeypatch.setattr(audit, "_installed", lambda folder: False)
    assert audit.main() == 0
    monkeypatch.setattr(audit, "_installed", lambda folder: True)
    monkeypatch.setattr(audit, "_bill_of_materials", lambda tools, out: None)
    monkeypatch.setattr(audit, "_asked", lambda tools, service: None)
    assert audit.main() == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.endswith("nothing was checked") for line in told] == [True, False, True]
