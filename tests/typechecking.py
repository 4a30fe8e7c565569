"""What stands before every function of prunelens under pytest: a check of its annotations.

jaxtyping's import hook would put its own decorator there. At every call that binds the arguments to
the signature and checks each of them twice, and where a name is imported for type checkers alone it
compiles new checks: a third of the time of a study as small as those of the tests. All that shapes
need of it is a scope of their own for the names of axes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as mypy has it
_BY_JAXTYPING = jaxtyping.jaxtyped
_SCOPE = jaxtyping.jaxtyped("context")
_CALLS = 20  # of every function in every test; what a loop calls more often has these shapes
_test = 0  # number of the one that runs


def next_test() -> None:
    """Every function is checked again."""
    global _test
    _test += 1


def typechecker(function: Callable) -> Callable:
    """The function with its arguments and its return checked against their annotations."""
    if any(hint in ("Self", Self) for hint in function.__annotations__.values()):
        return function  # beartype knows Self only where it decorates the whole class
    return _CHECK(function)


def _decorator(*, typechecker: Callable) -> Callable:
    return functools.partial(_checked, by_jaxtyping=_BY_JAXTYPING(typechecker=typechecker))


def _checked(function: Callable, *, by_jaxtyping: Callable) -> Callable:
    if inspect.isclass(function) or inspect.isgeneratorfunction(function):
        return by_jaxtyping(function)
    if "<locals>" in function.__qualname__:  # beartype would keep alive what it closes over, and
        return function  # compile anew at every outer call; mypy has looked at it
    checks = None if _unknown(function) else typechecker(function)
    if checks is function:
        return function

    checked_in, left = _test, _CALLS

    @functools.wraps(function)
    def in_a_scope(*args: object, **kwargs: object) -> object:
        __tracebackhide__ = True
        nonlocal checks, checked_in, left
        if checked_in != _test:
            checked_in, left = _test, _CALLS
        if not left:
            return function(*args, **kwargs)
        left -= 1
        if checks is None:  # the whole module is there now; what is not is for type checkers alone
            function.__annotations__ |= dict.fromkeys(_unknown(function), Any)
            checks = typechecker(function)
        with _SCOPE:
            return checks(*args, **kwargs)

    return in_a_scope


def _unknown(function: Callable) -> list[str]:
    """The parameters whose annotations name what is not in the function's module."""
    found = []
    for name, hint in function.__annotations__.items():
        try:
            eval(hint if isinstance(hint, str) else "None", function.__globals__)
        except NameError:
            found.append(name)
    return found


# The hook looks for its decorator here; it imports this module for the first function it meets.
jaxtyping.jaxtyped = _decorator
