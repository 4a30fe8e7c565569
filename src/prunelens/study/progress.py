"""What a person sees while a study runs: what is being done, how far it is, how long it takes."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from prunelens.console import Console, in_words
from prunelens.study.artifacts.store import Stage

SECONDS_BETWEEN_LINES = 15  # where there is no terminal to draw a bar in


class StudyProgress:
    """A bar over all stages with the remaining time; plain lines where there is no terminal.

    Use as a context manager. Remaining time is what is left of the estimated work at the speed
    that was measured so far.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remaining]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total, self._done = 1.0, 0.0
        self._current: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> StudyProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(None, None, None)

    def start(self, total_cost: float) -> None:
        """Begin to count towards `total_cost` (floating-point operations, roughly)."""
        self._total = max(total_cost, 1.0)
        self._started = time.monotonic()
        self._task = self._bar.add_task("", total=self._total, remaining="")

    def update(self, stage: Stage, share: float) -> None:
        """A stage is being made and `share` of it, 0 to 1, is done."""
        self._current[stage.identity] = share * stage.cost
        self._show(stage.label)

    def finish(self, stage: Stage) -> None:
        """A stage has ended, well or not."""
        self._current.pop(stage.identity, None)
        self._done += stage.cost
        self._show(stage.label)

    def _show(self, label: str) -> None:
        if self._task is None:
            return
        done = self._done + sum(self._current.values())
        elapsed = time.monotonic() - self._started
        left = elapsed * (self._total - done) / done if done > 0.01 * self._total else None
        remaining = "" if left is None else f"about {in_words(max(0, left))} left"
        self._bar.update(self._task, completed=done, description=label, remaining=remaining)
        if not self._console.is_terminal and self._is_time_for_a_line():
            share = 100 * done / self._total
            line = f"{in_words(elapsed):>9}  {share:3.0f} %  {remaining:<21} {label}"
            self._console.print(line, markup=False, soft_wrap=True)

    def _is_time_for_a_line(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True
