"""Write the planted world's grades into docs/methods.md, from a finished self-test.

.venv/bin/prunelens selftest --out FOLDER
.venv/bin/python tools/write_methods_grades.py FOLDER

A block of the page that starts with `<!-- grades:begin NAME -->` and ends with
`<!-- grades:end NAME -->` is written anew; all else stays. Two decimals, so that another machine's
arithmetic seldom changes them.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
import typing
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from prunelens.analyses.grades import MEASURES, grades
from prunelens.config import StudyConfig
from prunelens.errors import UserError
from prunelens.planted import Choice
from prunelens.study.artifacts.store import Store
from prunelens.study.folder import open_study
from prunelens.study.matrix import Run

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"
SECTIONS = {  # block -> the measures of that section of the page
    "survival": ("shared_init", "shared_start", "cross_init"),
    "warm_start": ("warm_start",),
    "persistence": ("persistence", "persistence_jaccard"),
    "noise": ("excess_isotropic", "excess_shuffled", "relative_isotropic", "relative_shuffled"),
    "scaling": ("scaling",),
    "activation_matching": ("activation_shared_init", "activation_cross_init"),
    "subspace": ("subspace_shared_init", "subspace_cross_init"),
}
WORLDS: tuple[Choice, ...] = ("independent", "by_rate", "none")
GRADED_FROM = (  # columns of the fates that any measure is graded from
    *("seed", "latent", "alive", "fate", "true_cosine", "true_scale", "true_share"),
    *("firing_rate_first_half", "init_retention"),
)
assert sorted(sum(SECTIONS.values(), ())) == sorted(MEASURES)


class SelfTest(NamedTuple):
    """What a finished self-test says, from all worlds."""

    grades: pd.DataFrame
    """tables/selftest.csv."""
    alone: pd.DataFrame
    """run, the columns of a grade for scaling with each latent regressed alone, then what nothing
    left looks like: unpaired_together and unpaired_alone, means over latents of what should be
    0."""
    made_from: str
    """A sentence that says by what settings."""


def filled(page: str, found: SelfTest) -> str:
    """The page (docs/methods.md) with every block written from a self-test.

    Raises: UserError where the page lacks a block or has an unknown one, or a grade is missing.
    """
    rows = _by_world(found.grades)
    texts = {name: _section(rows, measures) for name, measures in SECTIONS.items()}
    texts |= {f"world_{world}": _whole(rows[world]) for world in WORLDS}
    texts |= {"marks": _marks(found.grades), "undertrained": _undertrained(found.grades)}
    texts |= {"scaling_alone": _alone(found.alone), "made": found.made_from}
    begun = re.findall(r"<!-- grades:begin (\w+) -->", page)
    if sorted(begun) != sorted(texts):
        odd = sorted(set(begun) ^ set(texts)) or sorted({n for n in begun if begun.count(n) > 1})
        raise UserError(f"{PAGE.name}: block {odd[0]!r} is unknown, missing or doubled; mend it")
    for name, text in texts.items():
        marks = f"<!-- grades:begin {name} -->", f"<!-- grades:end {name} -->"
        parts = re.split("|".join(map(re.escape, marks)), page)
        if len(parts) != 3:
            raise UserError(f"{PAGE.name}: block {name!r} has no end; write {marks[1]} after it")
        page = f"{parts[0]}{marks[0]}\n{text}\n{marks[1]}{parts[2]}"
    return page


def read_selftest(folder: pathlib.Path) -> SelfTest:
    """The grades of a finished self-test. Raises: UserError where the folder has none."""
    path = folder / "tables" / "selftest.csv"
    if not path.is_file():
        raise UserError(
            f"FOLDER: {str(folder)!r} has no tables/selftest.csv; make it with `prunelens"
            " selftest --out FOLDER`"
        )
    text = (folder / "environment.json").read_text(encoding="utf-8")
    version = json.loads(text)["libraries"]["prunelens"]
    plan, store = open_study(folder)
    made_from = f"prunelens {version}, {described(plan.study)}"
    pruned = [run for run in plan.runs if "grades" in run.stages]
    alone = [_grade_alone(run, store) for run in pruned if store.has(run.stages["grades"])]
    return SelfTest(pd.read_csv(path), pd.DataFrame(alone), made_from)


def described(study: StudyConfig) -> str:
    """The settings of a self-test in a sentence, and the commands that make the grades."""
    sae, corpus = study.sae, study.corpus
    return (
        f"study `{study.name}`: {corpus.train_tokens:,} tokens to train"
        f" on and {corpus.eval_tokens:,} to measure on; expansion {sae.expansion}, k {sae.k},"
        f" {sae.steps:,} steps of {sae.batch_tokens:,} tokens at a learning rate of"
        f" {sae.learning_rate:g}; seeds {', '.join(map(str, sae.seeds))}, of which the first"
        f" {sae.control_seeds} with control SAEs. Made by `prunelens selftest --out FOLDER`,"
        " then `python tools/write_methods_grades.py FOLDER`."
    )


def _grade_alone(run: Run, store: Store) -> dict[str, object]:
    """Of scaling without the joint fit, which is no table's column."""
    assert run.pruning
    latents = pd.read_parquet(store.read(run.stages["scaling"]) / "latents.parquet")
    fates = pd.read_parquet(store.read(run.stages["grades"]) / "fates.parquet")
    pruned, unpaired = (latents[latents["source"] == name] for name in ("pruned", "unpaired"))
    simple = pruned[["seed", "latent", "alone"]].rename(columns={"alone": "scaling"})
    table = fates[[*GRADED_FROM]].merge(simple, on=["seed", "latent"], validate="one_to_one")
    row = grades(table, choice=typing.cast(Choice, run.pruning.scope)).iloc[0].to_dict()
    together, alone = unpaired["scaling"].mean(), unpaired["alone"].mean()
    return {"run": run.name, **row, "unpaired_together": together, "unpaired_alone": alone}


def _by_world(graded: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """World -> one row per measure, by name; those of early training steps are left out."""
    found: dict[str, pd.DataFrame] = {}
    for world in WORLDS:
        of_world = graded["run"].str.contains(rf"/planted-{world}-[0-9.]+$")
        rows = graded[of_world & graded["step"].isna()].set_index("measure")
        missing = [name for name in MEASURES if list(rows.index).count(name) != 1]
        if missing:
            raise UserError(
                f"FOLDER: not one grade of {missing[0]} in the world {world!r}; give the folder of"
                " a whole self-test in which no run failed"
            )
        found[world] = rows.loc[list(MEASURES)]
    return found


def _section(rows: dict[str, pd.DataFrame], measures: tuple[str, ...]) -> str:
    """One line per measure; where a cell has two numbers, the second is of the world `by_rate`."""
    even, by_rate = rows["independent"], rows["by_rate"]
    head = (
        "measure", "AUC", "recall", "false survival", "effect of rate, none planted",
        "effect of rate, one planted", "marks",
    )  # fmt: skip
    lines = []
    for name in measures:
        both = (even.loc[name], by_rate.loc[name])
        pairs = [
            " / ".join(_number(row[column]) for row in both)
            for column in ("auc", "recall", "false_survival")
        ]
        effects = [f"{_effect(row)}, truth {_number(row['truth_rho'])}" for row in both]
        lines.append((f"`{name}`", *pairs, *effects, _both_marks(both)))
    return _table(head, lines)


def _whole(rows: pd.DataFrame) -> str:
    """Everything about one world."""
    head = (
        "measure", "survived at", "latents", "AUC", "precision", "recall", "false survival",
        "bias", "bias, rotated", "effect of rate", "truth's", "mark",
    )  # fmt: skip
    columns = ("auc", "precision", "recall", "false_survival", "bias", "bias_rotated")
    lines = []
    for name, row in rows.iterrows():
        numbers = [_number(row[column]) for column in columns]
        first = (f"`{name}`", f"{row['threshold']:g}", f"{row['num_latents']:.0f}")
        lines.append((*first, *numbers, _effect(row), _number(row["truth_rho"]), _mark(row)))
    return _table(head, lines)


def _undertrained(graded: pd.DataFrame) -> str:
    """What `shared_init` says of destroyed latents, by training step."""
    rows = graded[graded["step"].notna()].sort_values(["run", "step"])
    if rows.empty:
        raise UserError("FOLDER: no grades by training step; ask the question `sufficiency`")
    lines = [
        (str(row["run"]).split("/")[-1], f"{row['step']:.0f}", _number(row["false_survival"]))
        for _, row in rows.iterrows()
    ]
    return _table(("condition", "step", "destroyed latents called survived"), lines)


def _alone(alone: pd.DataFrame) -> str:
    """One line per world."""
    head = (
        "condition", "AUC", "recall", "false survival", "bias", "bias, rotated", "effect of rate",
        "truth's", "`unpaired`, together", "`unpaired`, alone",
    )  # fmt: skip
    columns = ("auc", "recall", "false_survival", "bias", "bias_rotated")
    lines = []
    for _, row in alone.iterrows():
        numbers = [_number(row[column]) for column in columns]
        last = [_number(row[f"unpaired_{how}"]) for how in ("together", "alone")]
        condition = str(row["run"]).split("/")[-1]
        lines.append((condition, *numbers, _effect(row), _number(row["truth_rho"]), *last))
    return _table(head, lines)


def _marks(graded: pd.DataFrame) -> str:
    """How many marks were reached, and which were not."""
    marked = graded[graded["mark"].notna()]
    missed = marked[~marked["passed"].astype(bool)]
    text = f"{len(marked) - len(missed)} of {len(marked)} graded rows reach their marks."
    for _, row in missed.iterrows():
        text += f" **`{row['measure']}` ({str(row['run']).split('/')[-1]}) {row['reason']}.**"
    return text


def _both_marks(rows: tuple[pd.Series, pd.Series]) -> str:
    marks = [_mark(row) for row in rows]
    return marks[0] if marks[0] == marks[1] else " / ".join(mark or "none" for mark in marks)


def _mark(row: pd.Series) -> str:
    """Empty where no mark is set."""
    if not isinstance(row["mark"], str) or not row["mark"]:
        return ""
    return "reached" if bool(row["passed"]) else f"**{row['reason']}**"


def _effect(row: pd.Series) -> str:
    low, high = _number(row["rate_low"]), _number(row["rate_high"])
    return f"{_number(row['rate_rho'])} ({low} to {high})"


def _number(value: float) -> str:
    """Two decimals, no negative zero; empty where undefined."""
    text = "" if math.isnan(value) else f"{value:.2f}"
    return text.removeprefix("-") if text == "-0.00" else text


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    rows: list[tuple[str, ...]] = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str]) -> None:
    """Write the page."""
    try:
        if len(arguments) != 1:
            raise UserError("FOLDER: give one folder, of a finished self-test")
        found = read_selftest(pathlib.Path(arguments[0]))
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
