"""Write the table of README.md from the tables of a finished demo.

    .venv/bin/python tools/write_readme.py runs/demo

What stands between `<!-- demo: begin -->` and `<!-- demo: end -->` is written anew.
"""

from __future__ import annotations

import pathlib
import sys

from prunelens.study.finished import Study

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- demo: begin -->\n", "<!-- demo: end -->\n"
NAMES = {"magnitude": "Magnitude", "wanda": "Wanda"}


def shown(study: Study) -> str:
    """A row for every pruned run."""
    answers = study.answers
    dense = answers["dense_perplexity"].iloc[0]
    rows = [
        f"| pruning | perplexity (dense {dense:.1f}) | persistence; noise leaves; of that |"
        " dense SAE |",
        "|---|---|---|---|",
    ]
    for run in answers.itertuples():
        noise = run.persistence / run.relative
        rows.append(
            f"| {NAMES[run.method]} {100 * run.sparsity:.0f} % | {run.perplexity:.1f} |"
            f" {run.persistence:.2f}; {noise:.2f}; {run.relative:.3f} ({run.low:.3f} to"
            f" {run.high:.3f}) | {run.dense_sae} |"
        )
    return "\n".join(rows) + "\n"


def written(before: str, study: Study) -> str:
    """README with that table in its place."""
    head, _, rest = before.partition(BEGIN)
    return head + BEGIN + shown(study) + END + rest.partition(END)[2]


if __name__ == "__main__":
    study = Study(sys.argv[1])
    README.write_text(written(README.read_text(encoding="utf-8"), study), encoding="utf-8")
