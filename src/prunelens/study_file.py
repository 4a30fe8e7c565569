"""A study's YAML file (or the name of a shipped study) -> StudyConfig."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import YAMLError

from prunelens.config import StudyConfig, study_from_data
from prunelens.errors import UserError

SHIPPED_STUDIES = pathlib.Path(__file__).parent / "data" / "studies"
MOST_BYTES = 200_000  # of a study file; the paper's studies have under 3,000
MOST_VALUES = 10_000  # with every alias written out
MOST_DEPTH = 20  # lists and mappings inside each other; a study has 5


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
    """The text of a UTF-8 file. Raises UserError where it is too large or cannot be read."""
    try:
        with path.open("rb") as file:  # a device or a pipe has no size to look up
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(_too_large(str(path)))
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study: cannot read {str(path)!r} as UTF-8 text ({error})") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML 1.2 to plain data, duplicate keys refused; `where` names the text in errors.

    What the text would become is measured before it is made, so that no file of a few lines fills
    the memory. Tags (`!!python/…`, but also `!!set`) are refused: a study has no use for them.
    Raises: UserError where it is too large or no YAML.
    """
    if len(text) > MOST_BYTES:
        raise UserError(_too_large(where))
    try:
        _measure(YAML(typ="safe", pure=True).parse(text), where)
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not valid YAML ({problem})") from None


def _measure(found: Iterable[events.Event], where: str) -> None:
    """Raises UserError for tags, deep nesting, and more values than a study can have.

    An alias counts as many values as it stands for: ten lists of ten aliases to each other are
    10^10 values in a few hundred bytes.
    """
    total = 0
    size_of: dict[str, int] = {}  # by anchor; known once its value has ended
    opened: list[tuple[str | None, int]] = []  # anchor, and the total where it began
    for event in found:
        if getattr(event, "tag", None):
            raise UserError(f"{where}: the tag {str(event.tag)!r} is not read; write plain values")
        if isinstance(event, events.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                size_of[anchor] = total - before
        elif isinstance(event, events.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise UserError(f"{where}: *{event.anchor} is inside itself; write plain values")
            total += size_of.get(event.anchor, 1)  # what is undefined is told on loading
        elif isinstance(event, events.NodeEvent):
            if isinstance(event, events.CollectionStartEvent):
                opened.append((event.anchor, total))
            elif event.anchor:
                size_of[event.anchor] = 1
            total += 1
        if total > MOST_VALUES:
            raise UserError(
                f"{where}: more than {MOST_VALUES} values (aliases written out); no study has that"
                " many, shorten it"
            )
        if len(opened) > MOST_DEPTH:
            raise UserError(
                f"{where}: lists and mappings more than {MOST_DEPTH} deep; no study has that,"
                " check the brackets"
            )


def _too_large(where: str) -> str:
    return f"{where}: larger than {MOST_BYTES} bytes, which no study is; check that it is one"


def _replace(data: Any, field: str, value: Any) -> None:
    """Set the dotted `field` of nested mappings and lists in place."""
    *parents, last = field.split(".")
    for part in parents:
        if _is_entry(data, part):
            data = data[int(part)]
        elif isinstance(data, dict):
            data = data.setdefault(part, {})
        else:
            raise UserError(f"--set {field}: {part!r} is no place in the study")
    if _is_entry(data, last):
        data[int(last)] = value
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise UserError(f"--set {field}: {last!r} is no place in the study")


def _is_entry(data: Any, part: str) -> bool:
    """Whether `part` counts an entry of a list; thousands of digits are no number to Python."""
    is_number = part.isdecimal() and len(part) <= len(str(MOST_VALUES))
    return isinstance(data, list) and is_number and int(part) < len(data)
