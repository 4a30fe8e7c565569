"""A study of seconds, on a tiny model and a text of a few sentences."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from prunelens.config import StudyConfig
from prunelens.report.write import run_and_report
from prunelens.study.matrix import STORES, parents_first
from prunelens.study.plan import plan_study
from prunelens.study.schedule import Outcome

SENTENCES = ["def greet(name):", "return 'hello ' + name", "The quick brown fox", "jumps over it"]


def write_text(path: pathlib.Path, num_lines: int = 400) -> pathlib.Path:
    """Lines of random sentences, each with its number; returns the path."""
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(SENTENCES, 6)) + f" {n}" for n in range(num_lines)]
    path.write_text("\n".join(lines))
    return path


def tiny_study(checkpoint_folder: pathlib.Path, text_file: pathlib.Path) -> dict[str, Any]:
    """Two pruned conditions, two seeds, all questions."""
    return {
        "name": "tiny",
        "models": [{"name": str(checkpoint_folder), "layers": [1]}],
        "corpus": {
            "source": "files",
            "paths": [str(text_file)],
            "document": "line",
            "context_tokens": 16,
            "train_tokens": 3200,
            "eval_tokens": 1600,
            "calibration_tokens": 800,
        },
        "perplexity": {"context_tokens": [16]},
        "prunings": [
            {"criterion": "magnitude", "scope": "global", "sparsities": [0.5]},
            {"criterion": "wanda", "scope": "row", "sparsities": [0.3]},
        ],
        "sae": {
            "expansion": 4,
            "k": 4,
            "steps": 24,
            "batch_tokens": 64,
            "learning_rate": 1e-3,
            "resample_every": 8,  # each looks for the worst inputs in all of the text
            "checkpoint_every": 5,
            "seeds": [0, 1],
        },
        "transfer": {"ce_tokens": 320, "refit_tokens": 320},
        "causal": {"prompts": 4, "group_size": 4, "contexts_per_latent": 4},
        "threads_per_stage": 1,
    }


def run_with_pool(
    study: StudyConfig,
    out: pathlib.Path,
    pool: pathlib.Path,
    run: Callable[..., Outcome] = run_and_report,
) -> Outcome:
    """Run a study that many tests look at, beginning with what others have made of its stages.

    For tests of what a study holds, not of how it is made. `pool` is the fixture of that name.
    """
    for stage in parents_first(plan_study(study).targets().values()):
        there = pool / stage.name / stage.identity
        if there.exists():
            shutil.copytree(there, out / "artifacts" / stage.name / stage.identity)
    outcome = run(study, out, quiet=True)
    for meta in (out / "artifacts").glob("*/*/meta.json"):
        kind, identity = meta.parts[-3:-1]
        if kind not in STORES and not (pool / kind / identity).exists():
            half = pool / kind / f"{identity}.{os.getpid()}"
            shutil.copytree(meta.parent, half)
            try:
                half.rename(pool / kind / identity)
            except OSError:  # another test has been quicker
                shutil.rmtree(half)
    return outcome
