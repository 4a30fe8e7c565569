"""Whether SAEs were trained enough, on the page."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.sufficiency import FALL_LIMIT, RETENTION_LIMIT
from prunelens.report.by_run import KEYS
from prunelens.report.panels.panel import Tables
from prunelens.report.panels.training import training
from prunelens.report.questions.section import FigureOf, Section
from prunelens.report.sufficiency import training_verdicts, verdict_words


def _made(tables: Tables) -> dict[str, pd.DataFrame]:
    return {"training by run": _training(training_verdicts(tables))}


def _training(verdicts: pd.DataFrame) -> pd.DataFrame:
    if not len(verdicts):
        return verdicts
    names = ["mean_init_retention", "fvu_fall", "fvu_fall_schedule", "fvu_fall_beyond_schedule"]
    made = verdicts[[*KEYS, *names]].reset_index(drop=True)
    made.insert(len(KEYS), "verdict", verdict_words(verdicts))
    made["why"] = verdicts["reason"].to_numpy()
    return made


SUFFICIENCY = Section(
    "sufficiency",
    "Were the SAEs trained enough to compare?",
    "Dictionaries that hardly left a shared start agree because of the start, and dictionaries"
    " that would still change with more steps differ because they were stopped.",
    "Nearly every latent is alive at the end of training. That says nothing about how far"
    " latents have come.",
    f"The mean cosine of latents to their start: above {RETENTION_LIMIT} they hardly left it."
    " And what twice the steps change, from one seed of the dense and of the followed condition"
    f" trained twice as long: an FVU that falls by more than {100 * FALL_LIMIT:g} % between the"
    " two ends (fvu_fall_beyond_schedule) was not settled. At both ends the learning rate has"
    " come down. That replaces the fall from the last checkpoint to the end (fvu_fall), which"
    " is shown but not judged: the learning rate coming down there makes it large in a training"
    " that is long enough too. fvu_fall_schedule compares the two trainings at equal steps, the"
    " end of ours: there they differ in the learning rate, and in that the longer one still"
    " restarted dead latents where ours no longer did.",
    figures={
        "fig7_training": FigureOf(
            training,
            ("training_curves", "survival_by_step"),
            "Figure 7: SAEs while they are trained",
        )
    },
    tables={"training by run": "Verdict on the SAEs of every run"},
    more={
        "training_curves": "Every SAE that was judged",
        "survival_by_step": "Survival by training step, every pair",
    },
    made=_made,
)
