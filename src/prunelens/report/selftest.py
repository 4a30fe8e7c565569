"""The self-test: the shipped study of the planted worlds, and what it says to believe."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from prunelens import planted
from prunelens.analyses.grades import AUC_MARK, DECIDES, FOLLOWS_RATE, MEASURES, SEPARATES
from prunelens.config import StudyConfig
from prunelens.errors import UserError
from prunelens.report.write import write_results
from prunelens.study.alone import alone_in
from prunelens.study.folder import open_study
from prunelens.study.results import table_columns
from prunelens.study.run import run_study
from prunelens.study.schedule import Outcome
from prunelens.study_file import SHIPPED_STUDIES, read_study

STUDY = SHIPPED_STUDIES / "selftest.yaml"
NOT_TO_SET = ("models", "prunings", "questions")  # the worlds, and what is asked of them
OFTEN_WRONG = 0.1  # share of the latents beyond which a threshold's mistakes are worth a word
FAR_OFF = 0.05  # of a cosine or a scale, likewise
BELIEVE = {  # (tells survived from destroyed, follows firing rate where the truth does)
    (True, True): "believe it for which features survive, and for whether rare ones do",
    (True, False): "believe it for which features survive, not for whether rare ones do",
    (False, True): "believe its trend over firing rate, not what it says of single features",
    (False, False): "do not believe it for which features survive, nor for whether rare ones do",
}


class SelfTest(NamedTuple):
    """How the measures did where the truth is known."""

    grades: pd.DataFrame
    """`tables/selftest.csv` after a column `world` (independent, by_rate, none)."""
    nulls: pd.DataFrame
    """`tables/selftest_null.csv` after such a column: what is found where nothing is."""
    coverage: pd.DataFrame
    """`tables/coverage.csv`: what intervals and verdicts are worth."""
    failures: tuple[str, ...]
    """Every mark that was missed and every run that failed, in one line each."""
    outcome: Outcome
    """How the study ended."""

    @property
    def passed(self) -> bool:
        """Every mark was reached, and every run was done."""
        return not self.failures


def run_selftest(
    out: pathlib.Path,
    *,
    settings: Mapping[str, str] | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> SelfTest:
    """Run what is missing of the self-test, and judge every measure.

    Args:
        out: the study's folder; everything that a study leaves is there, `report.html` too.
        settings: dotted field -> YAML text; may make the test smaller, not change its worlds.
        workers: processes side by side; None: as many as cores and memory allow.
        quiet: show no progress.
    Raises: UserError for settings that are wrong or would change what is tested.
    """
    study = selftest_study(settings)
    with alone_in(out):
        outcome = run_study(study, out, workers=workers, quiet=quiet)
        tables = write_results(out, *open_study(out), redraw=outcome.num_executed > 0)
    grades, nulls, coverage = (
        _table(tables, name, outcome) for name in ("selftest", "selftest_null", "coverage")
    )
    return judge(grades, nulls, coverage, outcome)


def selftest_study(settings: Mapping[str, str] | None = None) -> StudyConfig:
    """The shipped study, with other sizes where `settings` has any."""
    shipped, study = read_study(STUDY), read_study(STUDY, dict(settings or {}))
    for field in NOT_TO_SET:
        if getattr(study, field) != getattr(shipped, field):
            raise UserError(
                f"--set {field}: would change what the self-test tests; set sizes alone, such as"
                " sae.steps, or run a study of your own with `prunelens run`"
            )
    return study


def judge(
    grades: pd.DataFrame, nulls: pd.DataFrame, coverage: pd.DataFrame, outcome: Outcome
) -> SelfTest:
    """Every run must be done and every mark reached; one that nothing was held against is missed.

    Args: as in `SelfTest`.
    """
    failures = [f"{r.run.name} failed: {r.reason}" for r in outcome.results if r.status == "failed"]
    failures += outcome.failures
    for row in missed(grades).itertuples():
        failures.append(f"{row.world}: {row_name(row.measure, row.step)} {row.reason}")
    for row in missed(nulls).itertuples():
        what = f"{row.measure} ({row.source}), {row.statistic} = {row.value:.3g}"
        failures.append(f"{row.world}: {what} {row.reason}")
    for row in missed(coverage).itertuples():
        failures.append(f"{row.world}: {row.name}: {row.measured:.1%} {row.reason}")
    if not failures:
        failures += _without_mark(grades, nulls, coverage)
    return SelfTest(grades, nulls, coverage, tuple(failures), outcome)


def missed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table whose mark is not reached."""
    return rows[(rows["mark"] != "") & ~rows["passed"].eq(True)]


def what_to_believe(grades: pd.DataFrame, nulls: pd.DataFrame) -> dict[str, str]:
    """A sentence per measure from its rows in all worlds, and one on SAEs that hardly learnt.

    Args: as in `SelfTest`.
    """
    finished = grades[grades["step"].isna()]
    speaks = set(nulls.loc[nulls["says_nothing"].eq(False) & nulls["passed"].ne(True), "measure"])
    found = {
        str(name): _sentence(rows, name in speaks)
        for name, rows in finished.groupby("measure", sort=False)
    }
    for name, rows in grades.dropna(subset="step").groupby("measure", sort=False):
        early, late = (rows.loc[rows["step"].agg(end)] for end in ("idxmin", "idxmax"))
        found[f"{name}, early"] = (
            "believe nothing that rests on a shared start until the SAEs have left it: after"
            f" {early['step']:.0f} steps it calls {early['false_survival']:.0%} of the destroyed"
            f" latents survived, after {late['step']:.0f} {late['false_survival']:.0%}"
        )
    return found


def row_name(measure: str, step: float) -> str:
    """What a row of grades is about; `step` is NaN at the end of training."""
    return f"{measure}, step {step:.0f}" if step == step else measure


def _table(tables: dict[str, pd.DataFrame], name: str, outcome: Outcome) -> pd.DataFrame:
    """As in the report, with the world of every row; without rows where every run failed."""
    table = tables.get(name, pd.DataFrame(columns=table_columns()[name])).copy()
    for text in ("mark", "reason"):
        table[text] = table[text].astype(object).where(table[text].notna(), "")
    if "world" not in table:
        worlds = {r.run.name: r.run.pruning.scope for r in outcome.results if r.run.pruning}
        table.insert(0, "world", table["run"].map(worlds))
    return table


def _without_mark(grades: pd.DataFrame, nulls: pd.DataFrame, coverage: pd.DataFrame) -> list[str]:
    """What should have been held against a mark, and was not."""
    marked = grades[grades["mark"] != ""]
    finished = marked[marked["step"].isna()]
    there = set(zip(finished["world"], finished["measure"], strict=True))
    missing = [
        f"{world}: {name} was not measured"
        for world, name in itertools.product(planted.CHOICES, sorted({*SEPARATES, *FOLLOWS_RATE}))
        if (world, name) not in there and (world != "none" or name in FOLLOWS_RATE)
    ]
    if len(finished) == len(marked):
        missing.append(
            "shared_init was not looked at before the SAEs had learnt; give sae.steps and"
            " sufficiency.checkpoints an early step"
        )
    decided = nulls[nulls["mark"] != ""].groupby("world")["measure"].agg(set)
    for world, name in itertools.product(planted.CHOICES, DECIDES):
        if name not in decided.get(world, ()):
            missing.append(f"{world}: {name} was not asked where nothing is")
    simulated = set(coverage["world"])
    worlds = ("none", "by_rate", "synthetic")
    return missing + [f"{w}: no interval was simulated" for w in worlds if w not in simulated]


def _sentence(rows: pd.DataFrame, speaks: bool) -> str:
    """From one measure's rows, one per world: what to believe, and where it is off."""
    changed = rows[rows["world"] != "none"]
    separates = bool((changed["auc"] >= AUC_MARK).all())
    follows = rows["follows_rate"].eq(True)
    told = [] if separates else [f"AUC {changed['auc'].min():.2f}"]
    told += _threshold_mistakes(changed)
    for row in rows[~follows].itertuples():
        rhos = f"{row.rate_rho:.2f} where the truth has {row.truth_rho:.2f}"
        told.append(f"rank correlation with firing rate {rhos}")
    for column, which in (("bias", "survived"), ("bias_rotated", "rotated")):
        off = changed[column].mean()
        if abs(off) > FAR_OFF:
            told.append(f"{off:+.2f} off what was planted for {which} latents")
    if MEASURES[rows["measure"].iloc[0]].survives != planted.SURVIVES:
        told.append("a rotated direction that fires where it did has survived for it")
    if speaks:
        told.append("it finds something where nothing is, and decides no claim")
    return BELIEVE[separates, bool(follows.all())] + (f" ({'; '.join(told)})" if told else "")


def _threshold_mistakes(rows: pd.DataFrame) -> list[str]:
    """What the threshold gets wrong often, in the worse of the worlds."""
    at = f"at {rows['threshold'].iloc[0]:g} it"
    feigned, missed = rows["false_survival"].max(), 1 - rows["recall"].min()
    told = []
    if feigned > OFTEN_WRONG:
        told.append(f"{at} calls {feigned:.0%} of the destroyed latents survived")
    if missed > OFTEN_WRONG:
        told.append(f"{at} misses {missed:.0%} of the survived latents")
    return told
