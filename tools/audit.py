"""`make audit`: known vulnerabilities of the pinned packages, and a bill of what is installed.

Writes `build/audit/sbom.json` (CycloneDX) and `build/audit/vulnerabilities.json` (pip-audit). Both
tools live in an environment of their own, so that they change nothing of what they look at.

Exit codes: 0 nothing known, or nobody to ask, which is told; 1 a vulnerability is known.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import venv
from collections.abc import Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
OUT = ROOT / "build" / "audit"
TOOLS = ("pip-audit==2.10.1", "cyclonedx-bom==7.5.0")
SERVICES = ("pypi", "osv")  # where pip-audit asks; the first that answers will do
SECONDS = 300  # for one step
ACCEPTED: Mapping[str, str] = {}
"""Id of a vulnerability -> why it does not matter here."""


class Audit(NamedTuple):
    """What a service said."""

    num_audited: int
    """Packages that it knows."""
    num_skipped: int
    """Packages that it does not know, such as builds of one's own."""
    known: list[str]
    """One line per vulnerability that is not accepted."""


def main() -> int:
    """Make both files; returns the exit code."""
    OUT.mkdir(parents=True, exist_ok=True)
    tools = OUT / "venv"
    if not _installed(tools):
        print(f"audit: {', '.join(TOOLS)} cannot be installed from here; nothing was checked")
        return 0
    bill = OUT / "sbom.json"
    _bill_of_materials(tools, bill)
    print(f"audit: {bill.relative_to(ROOT)} lists what is installed")
    for service in SERVICES:
        found = _asked(tools, service)
        if found is not None:
            return _told(found, service)
    print("audit: no vulnerability service can be reached from here; nothing was checked")
    return 0


def judged(report: Any) -> Audit | None:
    """What pip-audit's report says; None where the service knew no package at all.

    A mirror of a package index that has no such data answers "not found" for every package, and
    pip-audit then finds no known vulnerabilities.
    """
    packages = report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return None
    known = [
        f"{package['name']} {package['version']}: {found['id']}"
        f" (mended in {', '.join(found['fix_versions']) or 'no version yet'})"
        for package in audited
        for found in package["vulns"]
        if not {found["id"], *found.get("aliases", ())} & set(ACCEPTED)
    ]
    return Audit(len(audited), len(packages) - len(audited), known)


def _told(found: Audit, service: str) -> int:
    for line in found.known:
        print(f"audit: {line}")
    unknown = f", {found.num_skipped} unknown to it" if found.num_skipped else ""
    print(
        f"audit: {len(found.known)} known vulnerabilities in {found.num_audited} packages"
        f" ({service}{unknown})"
    )
    return 1 if found.known else 0


def _installed(folder: pathlib.Path) -> bool:
    """Whether the tools are there, once they have been installed if they were not."""
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == "\n".join(TOOLS):
        return True
    venv.create(folder, with_pip=True, clear=True)
    command = [_program(folder, "python"), "-m", "pip", "install", "--quiet", *TOOLS]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    stamp.write_text("\n".join(TOOLS), encoding="utf-8")
    return True


def _bill_of_materials(tools: pathlib.Path, out: pathlib.Path) -> None:
    """CycloneDX, of the environment that this script runs in."""
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"]
    command = [_program(tools, "cyclonedx-py"), "environment", sys.executable, *options]
    subprocess.run([*command, "--output-file", str(out)], check=True, timeout=SECONDS)


def _asked(tools: pathlib.Path, service: str) -> Audit | None:
    """What a service says of the pinned versions; None where it cannot be reached."""
    report = OUT / "vulnerabilities.json"
    report.unlink(missing_ok=True)
    command = [_program(tools, "pip-audit"), "--vulnerability-service", service]
    command += ["--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--output", str(report)]
    command += ["--timeout", "15", "--progress-spinner", "off"]
    try:
        subprocess.run(command, check=False, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if not report.is_file():  # it ended in an error of the connection
        return None
    return judged(json.loads(report.read_text(encoding="utf-8")))


def _program(folder: pathlib.Path, name: str) -> str:
    return str(folder / ("Scripts" if sys.platform == "win32" else "bin") / name)


if __name__ == "__main__":
    sys.exit(main())
