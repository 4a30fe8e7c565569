"""The planted world: measures held against the truth, and intervals by simulation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from prunelens import planted
from prunelens.activations import Statistics
from prunelens.analyses.coverage import COLUMNS as COVERAGE_COLUMNS
from prunelens.analyses.coverage import coverage
from prunelens.analyses.grades import (
    COLUMNS,
    NULL_COLUMNS,
    grades,
    latent_truth,
    null_grades,
    undertrained_grades,
)
from prunelens.match import match_dictionaries
from prunelens.sae.architectures import load_sae
from prunelens.study.artifacts.store import Stage
from prunelens.study.kind import Question, Table
from prunelens.study.parents import sae_role
from prunelens.study.planted_stages import load_world
from prunelens.study.questions.arms import CONDITIONS
from prunelens.study.sae_stages import decoders_by_step
from prunelens.study.work import Work, read_json

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

SIMULATED = {"independent": "synthetic", "none": "none", "by_rate": "by_rate"}  # by scope
TOKENS_PER_SET = {"synthetic": 100, "none": 1000, "by_rate": 1000}  # of eval: 1,000 and 100 sets


def _grades(work: Work) -> None:
    """Every measure of the run, and what a shared start feigns while SAEs are hardly trained."""
    truth = _Truth(work.parents["world"])
    saes = _plain_saes(work)
    known = [truth.of(saes["dense", seed]).assign(seed=seed) for seed in work.config["seeds"]]
    fates = pd.read_parquet(work.parents["fates"] / "fates.parquet")
    fates = fates.merge(pd.concat(known), on=["seed", "latent"], validate="one_to_one")
    found = grades(fates, choice=truth.choice)
    if early := [_early_matches(saes, truth, seed) for seed in work.config["seeds"]]:
        found = pd.concat([found, undertrained_grades(pd.concat(early))], ignore_index=True)
    fates.to_parquet(work.out / "fates.parquet")
    found.to_parquet(work.out / "grades.parquet")
    null_grades(fates, choice=truth.choice).to_parquet(work.out / "null.parquet")


def _coverage(work: Work) -> None:
    """What intervals and verdicts are worth."""
    sets = work.config["sets"]
    coverage(work.config["world"], sets, progress=work.share(sets)).to_parquet(
        work.out / "coverage.parquet"
    )


def _early_matches(
    saes: dict[tuple[str, int], pathlib.Path], truth: _Truth, seed: int
) -> pd.DataFrame:
    """Matches of the shared-init arm at every step that both SAEs were looked at."""
    dense, pruned = (decoders_by_step(saes[condition, seed]) for condition in CONDITIONS)
    tables = [pd.DataFrame(columns=["step", "cosine", "mutual", "fate"])]
    for step in sorted(dense.keys() & pruned.keys()):
        matches = match_dictionaries(dense[step], pruned[step])
        known = truth.of(saes["dense", seed], decoder=dense[step])
        found = {"cosine": matches.similarity_a, "mutual": matches.mutual, "fate": known["fate"]}
        tables.append(pd.DataFrame({"step": step, **found}))
    return pd.concat(tables[1:] or tables)


class _Truth:
    """What is known of a pruned world."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._before, self._after = planted.dense_world(), load_world(folder)
        known = pd.read_parquet(folder / "truth.parquet")
        angles, shares = (torch.tensor(known[name].to_numpy()) for name in ("angle", "share"))
        self._truth = planted.Truth(list(known["fate"]), angles, shares)
        self.choice: planted.Choice = read_json(folder / "choice.json")

    def of(self, sae: pathlib.Path, *, decoder: Tensor | None = None) -> pd.DataFrame:
        """The fate of every latent of a dense SAE, or of a decoder from earlier in its training."""
        if decoder is None:
            decoder = load_sae(sae).decoder_weight.detach()
        sigma = Statistics.load(sae / "normalisation.safetensors").sigma
        return latent_truth(decoder, sigma, self._before, self._after, self._truth)


def _plain_saes(work: Work) -> dict[tuple[str, int], pathlib.Path]:
    """(condition, seed) -> folder."""
    return {
        (condition, sae.init_seed): folder
        for condition in CONDITIONS
        for sae, folder in work.saes(condition).items()
    }


def _is_known(run: LayerPlan) -> bool:
    """Whether somebody knows the truth."""
    return run.model.config.is_planted and "fates" in run.answers


def _plan_grades(run: LayerPlan) -> Mapping[str, Stage]:
    if not _is_known(run):
        return {}
    fates = run.answers["fates"]
    saes = {
        sae_role(of, sae, plain=True): plan.saes[sae]
        for of, plan in zip(CONDITIONS, (run.dense, run), strict=True)
        for sae in run.seeds()
    }
    parents = {"world": run.prune, "fates": fates, **saes}
    return {"grades": run.stage("grades", {"seeds": fates.config["seeds"]}, parents)}


def _plan_coverage(run: LayerPlan) -> Mapping[str, Stage]:
    if not _is_known(run):
        return {}
    assert run.prune
    world = SIMULATED[run.prune.config["choice"]]
    sets = run.study.corpus.eval_tokens // TOKENS_PER_SET[world]
    return {"coverage": run.stage("coverage", {"world": world, "sets": sets}, {})}


GRADES = Question(
    "grades",
    2,
    _grades,
    of="pruned",
    tables=(
        Table(
            "selftest",
            "planted run, measure, step",
            "which measures tell the truth where it is known (`prunelens selftest` alone)",
            "grades.parquet",
            COLUMNS,
        ),
        Table(
            "selftest_null",
            "planted run, measure, source, statistic",
            "what they find where nothing is (likewise)",
            "null.parquet",
            NULL_COLUMNS,
        ),
    ),
    plan=_plan_grades,
)
COVERAGE_TABLE = Table(
    "coverage",
    "world, interval or verdict",
    "how often 95 % intervals hold the truth and verdicts are wrong (likewise)",
    "coverage.parquet",
    COVERAGE_COLUMNS,
    leading=("run",),
)
COVERAGE = Question(
    "coverage",
    2,
    _coverage,
    of="pruned",
    tables=(COVERAGE_TABLE,),
    plan=_plan_coverage,
)
