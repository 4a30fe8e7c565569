"""Artifacts in, artifact out: the only place that knows both files and library functions.

Each function in the modules below reads its parents' folders by role and writes its own files; the
result depends on the stage's config and its parents alone. `model_stages`: text to activations;
`sae_stages`: SAEs; `arm_stages`: pairs of SAEs; `question_stages`: what else is asked of them;
`output_stages`: what needs the model's output again (transfer, ablations); `planted_stages`: the
world with known truth in the model's place.
"""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Callable

import torch

from prunelens.errors import UserError
from prunelens.study.arm_stages import ARM_STAGES
from prunelens.study.model_stages import MODEL_STAGES
from prunelens.study.output_stages import OUTPUT_STAGES
from prunelens.study.planted_stages import PLANTED_STAGES
from prunelens.study.question_stages import QUESTION_STAGES
from prunelens.study.sae_stages import make_sae
from prunelens.study.store import Stage, Store
from prunelens.study.work import Work

STAGES = {
    **MODEL_STAGES,
    "sae": make_sae,
    **ARM_STAGES,
    **QUESTION_STAGES,
    **OUTPUT_STAGES,
    **PLANTED_STAGES,
}


def make_stage(
    store: Store, stage: Stage, *, device: str, progress: Callable[[float], None]
) -> None:
    """Make the artifact of one stage whose parents are there and verified.

    The number of threads is the one that its config names.
    """
    torch.set_num_threads(stage.config["threads"])
    parents = {role: store.folder(parent) for role, parent in stage.parents.items()}
    with store.writing(stage, device=device) as out:
        work = Work(stage, parents, out, lambda: store.partial(stage), device, progress)
        STAGES[stage.name](work)


def failure_of(make: Callable[[], None], log_path: pathlib.Path) -> str | None:
    """Call `make`; None if it succeeds, else why it failed, in one line.

    The traceback of what is not the user's mistake goes to `log_path`.
    """
    try:
        make()
    except UserError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # one run's failure, of any kind, must not stop the others
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text(traceback.format_exc(), encoding="utf-8")
        first = (str(error).splitlines() or [""])[0][:200]
        return f"{type(error).__name__}: {first} (traceback in logs/{log_path.name})"
    return None
