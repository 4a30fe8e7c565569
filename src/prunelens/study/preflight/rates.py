"""Rates of a device that is not this one, read from a file."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable
from typing import Any

from prunelens.errors import UserError
from prunelens.study.kind import WORK_KINDS
from prunelens.study_file import parse_yaml, read_text


def read_rates(path: str | pathlib.Path, models: Iterable[str]) -> dict[str, dict[str, float]]:
    """Model label -> kind of work -> operations a second (those of `study.cost`).

    Args:
        path: YAML or JSON with one number for each kind of work in `WORK_KINDS`, good for every
            model; or what `prunelens plan --json` printed on the device.
        models: the labels that rates are wanted for.
    Raises: UserError where the file is not that, or lacks a kind or a model.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"--rates: no file {str(path)!r}; give YAML with a rate for each kind")
    content = parse_yaml(read_text(path), where=f"--rates: {str(path)!r}")
    if not isinstance(content, dict):
        raise UserError(f"--rates: {str(path)!r} must be a mapping of kinds of work to rates")
    if not isinstance(content.get("device"), dict):
        rates = _checked(content, path)
        return dict.fromkeys(models, rates)
    measured = content["device"].get("flops_per_second")
    if not isinstance(measured, dict) or not measured:
        raise UserError(
            f"--rates: {str(path)!r} is a plan that was not calibrated; make it without"
            " --no-calibration"
        )
    for model in models:
        if model not in measured:
            raise UserError(
                f"--rates: {str(path)!r} has no rates of model {model!r}, only of"
                f" {', '.join(map(str, measured))}; give a plan of the same models"
            )
    return {model: _checked(measured[model], path) for model in models}


def _checked(given: Any, path: pathlib.Path) -> dict[str, float]:
    kinds = list(WORK_KINDS)
    if not isinstance(given, dict) or set(given) != set(kinds):
        names = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise UserError(
            f"--rates: {str(path)!r} has {names}; it must have exactly {', '.join(kinds)}"
        )
    return {kind: _rate(kind, given[kind], path) for kind in kinds}


def _rate(kind: str, value: Any, path: pathlib.Path) -> float:
    try:
        number = (
            math.nan if isinstance(value, bool) else float(value)
        )  # YAML 1.2 reads 1e12 as text
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(
            f"--rates: {kind} of {str(path)!r} is {value!r}; give operations a second, e.g. 1.0e+13"
        )
    return number
