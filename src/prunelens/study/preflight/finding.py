"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from prunelens.errors import UserError

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of a preflight."""

    level: Level
    """`error`: the study cannot run, or its numbers would mean nothing."""
    check: str
    """Which check, in a word or two."""
    what: str
    """What was found; of an error `field: value and what is wrong with it`."""
    fix: str = ""
    """What to do about it; empty where all is well."""


def refuse(findings: Iterable[Finding]) -> None:
    """Raises UserError with the first error among the findings."""
    for finding in findings:
        if finding.level == "error":
            raise UserError(f"{finding.what}; {finding.fix}")
