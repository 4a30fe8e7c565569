"""Strings of a study that become paths, addresses and names in tables: what they may hold."""

from __future__ import annotations

import pathlib
from typing import Annotated

from pydantic import AfterValidator, Field

FORMULA_STARTS = tuple("=+-@\t\r＝＋－＠")
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""


def _usable(place: str) -> str:
    """A path or hub id that the system takes; whether something is there is told later."""
    if not place.isprintable():
        raise ValueError(f"{place[:80]!r} holds a character that cannot be seen; remove it")
    try:
        pathlib.Path(place).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{place[:80]!r} names a home folder that there is not; write the path out"
        ) from None
    return place


Place = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_usable)]
"""A path, a hub id, or a part of one."""


def last_part(place: str) -> str:
    """What a path or an id is called: its last part, and `.`, `..` and `~` as what they mean."""
    last = place.rstrip("/").rsplit("/", 1)[-1]
    return pathlib.Path(place).expanduser().resolve().name if last in (".", "..", "~") else last


def refuse_as_name(name: str, *, field: str, fix: str) -> None:
    """Raises ValueError for what cannot stand in tables and run names.

    A name comes from a path or an id where the study gives no other, so it may be anything.
    """
    problem = None
    if not name.strip() or set(name) == {"."}:
        problem = "gives no name for tables"
    elif name.startswith(FORMULA_STARTS):
        problem = "begins as a spreadsheet's formula does"
    elif not name.isprintable():
        problem = "holds a character that cannot be seen"
    if problem:
        raise ValueError(f"{field}: {name[:80]!r} {problem}; {fix}")
