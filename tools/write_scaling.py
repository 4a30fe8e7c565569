"""Write the tables of docs/scaling.md: the paper's 24 runs on 1, 8 and 64 GPUs, simulated.

.venv/bin/python tools/write_scaling.py

What stands between `<!-- scaling: begin -->` and `<!-- scaling: end -->` is written anew.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence

from prunelens.model import model_shape
from prunelens.study.plan import plan_study
from prunelens.study.preflight.hours import Schedule, Task, simulate, study_tasks
from prunelens.study_file import read_study

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling: begin -->\n", "<!-- scaling: end -->\n"
STUDIES = ("paper-a1", "paper-a3", "paper-b1", "paper-c1")  # 11 + 4 + 5 + 4 runs
WORKERS = (1, 8, 64)
BFLOAT16_PEAK, FLOAT32_PEAK = 989e12, 67e12  # of an H100 SXM or H200, without sparsity
SHARE = 0.30  # of the peak that is reached: an assumption
MATCHING = 1.8e11  # on 2 CPU threads, benchmarks/results/matching.json: 9,216^2 random, d 1152
RATES = {
    "language model": SHARE * BFLOAT16_PEAK,  # models.dtype
    "SAE training": SHARE * FLOAT32_PEAK,  # sae.dtype
    "SAE encoding": SHARE * FLOAT32_PEAK,
    "matching": MATCHING,
}


def tables() -> str:
    """Rates as a file for `--rates`, then a row for each number of GPUs, then the longest chain."""
    tasks = {name: _tasks(name) for name in STUDIES}
    together = side_by_side(tasks.values())
    hours = {task.name: task.hours for task in together}
    schedules = [simulate(together, workers) for workers in WORKERS]
    return "".join(
        (
            "```yaml\n" + "".join(f"{kind}: {rate:.4g}\n" for kind, rate in RATES.items()),
            "```\n\n",
            *_by_workers(schedules),
            "\n",
            *_by_study(tasks),
            "\nThe critical path, with its hours: ",
            ", then ".join(f"`{name}` ({hours[name]:.3f})" for name in schedules[0].chain),
            ".\n",
        )
    )


def _tasks(name: str) -> list[Task]:
    study = read_study(name)
    shapes = {model.label: model_shape(model) for model in study.models}
    rates = {model.label: RATES for model in study.models}
    return study_tasks(plan_study(study, resolve=False), shapes, rates)


def side_by_side(studies: Iterable[Sequence[Task]]) -> list[Task]:
    """The tasks of several studies that share workers and nothing else, one study after another."""
    tasks: list[Task] = []
    for study in studies:
        start = len(tasks)
        tasks += [t._replace(parents=tuple(start + parent for parent in t.parents)) for t in study]
    return tasks


def _by_workers(schedules: list[Schedule]) -> Iterator[str]:
    yield "| GPUs | makespan, hours | critical path, hours | idle share | times faster |\n"
    yield "|---:|---:|---:|---:|---:|\n"
    for found in schedules:
        faster = schedules[0].makespan_hours / found.makespan_hours
        yield (
            f"| {found.workers} | {found.makespan_hours:.3f} | {found.critical_path_hours:.3f}"
            f" | {found.idle_share:.1%} | {faster:.1f} |\n"
        )


def _by_study(tasks: dict[str, list[Task]]) -> Iterator[str]:
    yield "| study alone | on 1 | on 8 | on 64 | critical path |\n|---|---:|---:|---:|---:|\n"
    for name, own in tasks.items():
        found = [simulate(own, workers) for workers in WORKERS]
        hours = " | ".join(f"{schedule.makespan_hours:.3f}" for schedule in found)
        yield f"| `{name}` | {hours} | {found[0].critical_path_hours:.3f} |\n"


def page(text: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
