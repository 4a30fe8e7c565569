"""Artifacts in, artifact out: the only place that knows both files and library functions.

The function of each kind of stage reads its parents' folders by role and writes its own files; the
result depends on the stage's config and its parents alone. `model_stages`: text to activations;
`planted_stages`: the world with known truth in their place; `sae_stages`: SAEs; `questions`: all
that is asked of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prunelens.config import NEEDS
from prunelens.errors import UserError, is_out_of_memory
from prunelens.interruption import is_interrupted
from prunelens.panics import is_panic
from prunelens.study.artifacts.disk import DiskError, stopped_by_disk
from prunelens.study.artifacts.store import Stage, Store
from prunelens.study.kind import Question, StageKind
from prunelens.study.model_stages import MODEL_STAGES
from prunelens.study.planted_stages import PLANTED_STAGES
from prunelens.study.questions import QUESTIONS
from prunelens.study.questions.predictor import PREDICTOR
from prunelens.study.sae_stages import SAE_STAGES
from prunelens.study.tracking import NOT_TRACKED, Tracking
from prunelens.study.work import Work

log = logging.getLogger(__name__)

STAGES: dict[str, StageKind] = {
    kind.name: kind for kind in (*MODEL_STAGES, *SAE_STAGES, *PLANTED_STAGES, *QUESTIONS, PREDICTOR)
}


def register(question: Question, *, needs: Sequence[str] = ()) -> None:
    """Ask one more question, of whoever names it among a study's `questions`.

    For what lives outside this package, from Python: in a script that runs the study itself. The
    command line and workers in other processes know nothing of it.

    Args:
        question: declared as those of prunelens are.
        needs: the questions whose answers it is made from, which have to be asked as well.
    Raises: UserError where there is a stage of that name.
    """
    if question.name in STAGES:
        raise UserError(f"question: there is a stage {question.name!r} already; name it otherwise")
    QUESTIONS.append(question)
    STAGES[question.name] = question
    for name in question.asked:
        NEEDS.setdefault(name, tuple(needs))


def make_stage(
    store: Store, stage: Stage, *, device: str, progress: Callable[[float], None]
) -> None:
    """Make the artifact of one stage whose parents are there and verified.

    The number of threads is the one that its config names.
    """
    make_stages(store, [stage], device=device, progress=lambda _stage, share: progress(share))


def make_stages(
    store: Store,
    stages: Sequence[Stage],
    *,
    device: str,
    progress: Callable[[Stage, float], None],
    tracking: Tracking = NOT_TRACKED,
) -> None:
    """`make_stage` of stages that share a `together` key, in one go; or of one stage."""
    (name,) = {stage.name for stage in stages}
    (threads,) = {stage.config["threads"] for stage in stages}
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        for identity in sorted(stage.identity for stage in stages):  # so that no two wait in turn
            stack.enter_context(store.locks.holding(identity))
        stages = [stage for stage in stages if not store.has(stage)]  # made while we waited
        if not stages:
            return
        facts: list[dict[str, Any]] = [{"device": device} for _ in stages]
        works = [
            Work(
                stage,
                {role: store.at_hand(parent) for role, parent in stage.parents.items()},
                stack.enter_context(store.writing(stage, of=len(stages), facts=known)),
                functools.partial(store.partial, stage),
                device,
                functools.partial(progress, stage),
                functools.partial(tracking.open, stage.label, stage.identity, stage.config),
                known,
            )
            for stage, known in zip(stages, facts, strict=True)
        ]
        STAGES[name].made(works)


def try_stages(
    store: Store,
    stages: Sequence[Stage],
    *,
    device: str,
    progress: Callable[[Stage, float], None],
    log_folder: pathlib.Path,
    tracking: Tracking = NOT_TRACKED,
) -> list[str | None]:
    """`make_stages`; for each stage None, or why it failed, in one line.

    Stages that cannot be made in one go are made one by one, so that each fails for itself; those
    that were published before it failed stay.
    """

    def attempt(part: Sequence[Stage], log_name: str) -> str | None:
        return failure_of(
            lambda: make_stages(store, part, device=device, progress=progress, tracking=tracking),
            log_folder / f"{log_name}.log",
        )

    if len(stages) > 1:
        failure = attempt(stages, f"{stages[0].identity[:12]}-and-{len(stages) - 1}-more")
        if failure is None:
            return [None] * len(stages)
        log.warning(
            "%d %s stages are made one by one, for in one go: %s",
            *(len(stages), stages[0].name, failure),
        )
        stages_left = [stage for stage in stages if not store.has(stage)]
    else:
        stages_left = list(stages)
    failures = {stage.identity: attempt([stage], stage.identity[:12]) for stage in stages_left}
    return [failures.get(stage.identity) for stage in stages]


def failure_of(make: Callable[[], None], log_path: pathlib.Path) -> str | None:
    """Call `make`; None if it succeeds, else why it failed, in one line.

    The traceback of what is not the user's mistake goes to `log_path`.
    Raises: DiskError where the disk cannot be written to: no other stage would get further.
        KeyboardInterrupt where `make` has failed after an interruption.
    """
    try:
        with stopped_by_disk(log_path.parent.parent):
            make()
    except DiskError:
        raise
    except BaseException as error:  # one run's failure, of any kind, must not stop the others
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if is_interrupted():  # a library has made something else of it
            raise KeyboardInterrupt from error
        return _in_one_line(error, log_path)
    return None


def _in_one_line(error: BaseException, log_path: pathlib.Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = (str(error).splitlines() or [""])[0][:200]
    if is_out_of_memory(error):
        return f"out of memory: {first or type(error).__name__}"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {first} (traceback in logs/{log_path.name})"
