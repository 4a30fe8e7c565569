"""What jaxtyping's import hook puts on every annotated function of prunelens under pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as mypy has it


def typechecker(function: Callable) -> Callable:
    """The function with its arguments and its return checked against their annotations."""
    if any(hint in ("Self", Self) for hint in function.__annotations__.values()):
        return function  # beartype knows Self only where it decorates the whole class
    return _CHECK(function)
