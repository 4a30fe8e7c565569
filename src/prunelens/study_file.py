"""A study's YAML file (or the name of a shipped study) -> StudyConfig."""

from __future__ import annotations

import pathlib
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError

SHIPPED_STUDIES = pathlib.Path(__file__).parent / "data" / "studies"


def read_study(source: str | pathlib.Path, settings: dict[str, str] | None = None) -> StudyConfig:
    """The study in a YAML file, or the shipped study of that name.

    Args:
        source: a path, or a name such as `demo`.
        settings: dotted field -> YAML text that replaces it, as `--set sae.steps=500` gives.
    Raises: UserError where the file is missing, is no YAML, or says something invalid.
    """
    path = pathlib.Path(source)
    if not path.is_file():
        path = SHIPPED_STUDIES / f"{source}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED_STUDIES.glob("*.yaml")))
        raise UserError(f"study: no file or shipped study {str(source)!r}; shipped are: {shipped}")
    data = parse_yaml(read_text(path), where=str(path))
    return study_from_data(with_settings(data, settings or {}))


def with_settings(data: Any, settings: dict[str, str]) -> Any:
    """Plain study data with dotted fields replaced by YAML texts, as `--set` does."""
    for field, text in settings.items():
        _replace(data, field, parse_yaml(text, where=f"--set {field}"))
    return data


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file. Raises UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study: cannot read {str(path)!r} as UTF-8 text ({error})") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML 1.2 to plain data, duplicate keys refused; `where` names the text in errors."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not valid YAML ({problem})") from None


def _replace(data: Any, field: str, value: Any) -> None:
    """Set the dotted `field` of nested mappings and lists in place."""
    *parents, last = field.split(".")
    for part in parents:
        if isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict):
            data = data.setdefault(part, {})
        else:
            raise UserError(f"--set {field}: {part!r} is no place in the study")
    if isinstance(data, list) and last.isdigit() and int(last) < len(data):
        data[int(last)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise UserError(f"--set {field}: {last!r} is no place in the study")
