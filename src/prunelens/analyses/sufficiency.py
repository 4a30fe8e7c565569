"""Were the SAEs trained long enough that comparing their dictionaries says anything?

Dictionaries that hardly left a shared start agree because of the start, and dictionaries that
would still change with more steps differ because they were stopped.

A training *curve* is a table with the columns of CURVE_COLUMNS, one row per SAE and checkpoint;
the highest step is the end. `mean_init_retention` is the mean over latents of the cosine of the
decoder row with the row it (re)started from, `fvu` is measured on the evaluation set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from prunelens.errors import UserError
from prunelens.match import match_dictionaries, match_rates

CURVE_COLUMNS = ("seed", "step", "mean_init_retention", "fvu")
RETENTION_LIMIT = 0.9  # mean cosine to the start above which a dictionary has hardly left it
FALL_LIMIT = 0.02  # share of FVU that twice the steps may still take away
NOT_ENOUGH = "these dictionaries are not trained enough to compare"


class Sufficiency(NamedTuple):
    """Whether the SAEs of one run were trained enough, and the numbers that say so."""

    mean_init_retention: float
    """Cosine to the start at the end: mean over latents, the largest over seeds."""
    fvu_fall: float
    """1 - fvu(end) / fvu(last checkpoint before it), the largest over seeds. Shown, not judged."""
    fvu_fall_schedule: float
    """1 - fvu(end) / fvu(same step of the doubled training); below 0: coming down cost more
    progress than it gave. Shown, not judged. NaN without a doubled training."""
    fvu_fall_beyond_schedule: float
    """1 - fvu(end of the doubled training) / fvu(end). NaN without a doubled training."""
    trained_enough: bool | None
    """None where it cannot be said."""
    reason: str
    """The verdict in words, with its numbers, and why a number is NaN."""


def sufficiency(curves: pd.DataFrame, doubled: pd.DataFrame | None = None) -> Sufficiency:
    """The verdict on the SAEs of one run.

    They are not trained enough if their mean cosine to the start is above RETENTION_LIMIT, or if
    twice the steps lower FVU by more than FALL_LIMIT (`fvu_fall_beyond_schedule`). Each sees what
    the other cannot: at a very small rate twice the steps change little.

    The plain fall from the last checkpoint to the end (`fvu_fall`) is not judged, for it is large
    in a training that is long enough too: its rate comes down there. To take that part away one
    would have to know it, and `fvu_fall_schedule` is only near it: halfway, the doubled training
    has taken as many steps as ours at its end, from the same start through the same tokens, but
    its rate is still high, and it has restarted dead latents where ours had ceased to. Between the
    two ends nothing need be taken away: at both the rate has come down and restarts have long
    ceased, so that what is left is what more steps add.

    Args:
        curves: of the run's SAEs, all at the same steps.
        doubled: the curve of one of these SAEs trained twice as long (same seed, and the same
            number of steps between restarts of dead latents), with a row at half its steps. None:
            the run has none, and only a verdict against it is possible.
    Raises: UserError where a table lacks a column, a row or a step, or `doubled` is of no such SAE.
    Source: methods §0 and §7, `init_retention`.
    """
    own = _by_step(curves, "curves")
    retention = float(own["mean_init_retention"].iloc[-1].max())
    assert not math.isnan(retention), "retention is a cosine of unit vectors"
    before, end = own["fvu"].shift().iloc[-1], own["fvu"].iloc[-1]  # NaN without a row before
    fall = float(np.max([_fallen(before[seed], end[seed]) for seed in end.index]))
    schedule, beyond = (math.nan, math.nan) if doubled is None else _against(own, doubled)
    enough: bool | None = True
    if retention > RETENTION_LIMIT or beyond > FALL_LIMIT:  # NaN is not above the limit
        enough = False
    elif math.isnan(beyond):
        enough = None
    found = Sufficiency(retention, fall, schedule, beyond, enough, reason="")
    reason = _reason(found, has_checkpoint=len(own) > 1, has_doubled=doubled is not None)
    return found._replace(reason=reason)


def survival_by_step(
    dense: Mapping[int, Mapping[int, Float[Tensor, "latents d_model"]]],
    pruned: Mapping[int, Mapping[int, Float[Tensor, "latents d_model"]]],
    taus: Sequence[float],
) -> pd.DataFrame:
    """RQ2's two arms without controls at every checkpoint, in normalised coordinates.

    Args:
        dense, pruned: seed -> step -> decoder after so many steps. All have the same steps; a
            condition may lack some of the other's seeds.
        taus: match thresholds.
    Returns: columns step, tau, arm, init_a, init_b, mnn, one_way, greedy. Arm `shared_init`: the
        two SAEs of a seed; `cross_init`: a dense SAE and the pruned one of each other seed. Both
        are taken at that step.
    Raises: UserError where the steps differ.
    Source: methods §6, §7 RQ2.
    """
    rows = []
    for step in _common_steps({"dense": dense, "pruned": pruned}):
        for init_a, a in dense.items():
            for init_b, b in pruned.items():
                arm = "shared_init" if init_a == init_b else "cross_init"
                matches = match_dictionaries(a[step], b[step], lowest_tau=min(taus))
                for tau in taus:
                    rates = match_rates(matches, tau)
                    found = (rates.mnn, rates.one_way, rates.greedy)
                    rows.append((step, tau, arm, init_a, init_b, *found))
    columns = ["step", "tau", "arm", "init_a", "init_b", "mnn", "one_way", "greedy"]
    return pd.DataFrame(rows, columns=columns)


def _by_step(curves: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows by rising step; columns (measure, seed)."""
    if missing := [column for column in CURVE_COLUMNS if column not in curves]:
        raise UserError(f"{name}: the table has no column {missing[0]!r}; add it")
    points = curves["seed"].nunique() * curves["step"].nunique()
    if len(curves) == 0 or len(curves) != points or curves.duplicated(["seed", "step"]).any():
        raise UserError(
            f"{name}: {len(curves)} rows for {curves['seed'].nunique()} seeds at"
            f" {curves['step'].nunique()} steps; give every seed one row at each of the same steps"
        )
    return curves.pivot(index="step", columns="seed", values=["mean_init_retention", "fvu"])


def _against(own: pd.DataFrame, doubled: pd.DataFrame) -> tuple[float, float]:
    """What the schedule explains, and what more steps add."""
    longer = _by_step(doubled, "doubled")["fvu"]
    seeds, ours = list(longer.columns), list(own["fvu"].columns)
    if len(seeds) != 1 or seeds[0] not in ours:
        raise UserError(f"doubled: of seeds {seeds}; give the curve of one of the seeds {ours}")
    steps, half = list(longer.index), own.index[-1]
    if steps[-1] != 2 * half or half not in steps:
        raise UserError(
            f"doubled: has the steps {steps}; it must end at step {2 * half}, twice the own"
            f" {half}, and have a row at {half}"
        )
    end, curve = own["fvu"].loc[half, seeds[0]], longer[seeds[0]]
    return _fallen(curve[half], end), _fallen(end, curve[2 * half])


def _fallen(before: float, after: float) -> float:
    """The share of `before` that is gone in `after`; NaN where `before` is not above 0."""
    return float(1 - after / before) if before > 0 else math.nan


def _reason(found: Sufficiency, *, has_checkpoint: bool, has_doubled: bool) -> str:
    head = {
        True: "trained enough",
        False: NOT_ENOUGH,
        None: "only the distance from the start was looked at",
    }[found.trained_enough]
    parts, expected = [_judged_numbers(found)], {}
    if has_checkpoint:
        expected["fvu_fall"] = found.fvu_fall
    else:
        parts.append("they were not judged before their end")
    if has_doubled:
        expected["fvu_fall_schedule"] = found.fvu_fall_schedule
        expected["fvu_fall_beyond_schedule"] = found.fvu_fall_beyond_schedule
    else:
        parts.append("no training twice as long belongs to them")
    if undefined := [name for name, value in expected.items() if math.isnan(value)]:
        parts.append(f"undefined, for want of an FVU above 0 to compare: {', '.join(undefined)}")
    return f"{head}: {'; '.join(parts)}"


def _judged_numbers(found: Sufficiency) -> str:
    """What is above its limit; what is not follows in brackets, or stands alone."""
    beyond = found.fvu_fall_beyond_schedule
    cosine = f"{found.mean_init_retention:.3f} (limit {RETENTION_LIMIT})"
    fall = f"{100 * beyond:.1f} % (limit {100 * FALL_LIMIT:g} %)"
    judged = [
        (f"their mean cosine to the start is {cosine}", found.mean_init_retention, RETENTION_LIMIT),
        (f"twice the steps lower their FVU by {fall}", beyond, FALL_LIMIT),
    ]
    above = "; ".join(words for words, value, limit in judged if value > limit)
    within = "; ".join(words for words, value, limit in judged if value <= limit)  # nor NaN
    if above and within:
        return f"{above} [within its limit: {within}]"
    return above or within


def _common_steps(conditions: Mapping[str, Mapping[int, Mapping[int, Tensor]]]) -> list[int]:
    """The steps that every SAE has, rising."""
    steps = {
        f"{name} seed {seed}": sorted(by_step)
        for name, seeds in conditions.items()
        for seed, by_step in seeds.items()
    }
    common = next(iter(steps.values()), [])
    for name, found in steps.items():
        if found != common:
            raise UserError(
                f"{name}: has decoders at the steps {found}, but {next(iter(steps))} at {common};"
                " compare SAEs at the same steps"
            )
    return common
