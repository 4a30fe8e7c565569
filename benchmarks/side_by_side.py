"""What the benchmarks share: contenders in turn, peak memory, a JSON report that says where it ran.

Absolute times of one machine mean little and those of two moments even less, so contenders take
turns in one process and what is reported is a ratio of medians. Every script here ends in
`publish`, which prints one JSON document and, with `--save`, puts it into `benchmarks/results/`;
`python tools/write_performance.py` makes the table of docs/performance.md from those files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch

RESULTS = pathlib.Path(__file__).parent / "results"
VERSIONS_OF = (
    *("torch", "numpy", "transformers", "prunelens", "triton", "numba"),
    *("eai-sparsify", "sae-lens", "llmcompressor"),
)


class Times(NamedTuple):
    """Milliseconds per call of one contender."""

    median: float
    least: float
    rounds: int


class Mark(NamedTuple):
    """One thing that was asked of prunelens, and what was measured."""

    row: int
    """Of the table in docs/performance.md."""
    what: str
    """What is compared with what, in words; a ratio unless it says otherwise."""
    asked: float
    """The bound."""
    direction: str
    """`at least` or `at most`."""
    measured: float

    @property
    def reached(self) -> bool:
        """Whether the bound is kept."""
        if self.direction == "at least":
            return self.measured >= self.asked
        return self.measured <= self.asked


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="keep the report in benchmarks/results")
    return parser


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    device: str = "cpu",
) -> dict[str, Times]:
    """Call every contender in turn, `rounds` times after one call that warms it up.

    With `repeats`, a turn is that many calls on end, and their mean is what counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
            started = now(device)
            for _ in range(repeats):
                call()
            if round_ > 0:
                seconds[name].append((now(device) - started) / repeats)
    return {
        name: Times(round(1e3 * statistics.median(taken), 3), round(1e3 * min(taken), 3), rounds)
        for name, taken in seconds.items()
    }


def now(device: str = "cpu") -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Watch this process; gives a function for the most bytes held beyond those at the start."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: float(peak - before)
    finally:
        done.set()
        watcher.join()


def publish(
    name: str,
    *,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    marks: Sequence[Mark],
    save: bool,
    variant: str = "",
) -> None:
    """Print the report as JSON; with `save`, write it to `benchmarks/results/NAME.json` too.

    Where a script measures in several ways, each `variant` has a file of its own.
    """
    report = {
        "benchmark": name,
        **({"variant": variant} if variant else {}),
        "settings": dict(settings),
        "results": results,
        "marks": [{**mark._asdict(), "reached": mark.reached} for mark in marks],
        "setting": _where_it_ran(),
    }
    text = json.dumps(_plain(report), indent=1) + "\n"
    print(text, end="")
    if save:
        RESULTS.mkdir(exist_ok=True)
        file = f"{name}_{variant}.json" if variant else f"{name}.json"
        (RESULTS / file).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Named tuples as objects, whatever holds them."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _where_it_ran() -> dict[str, Any]:
    installed = {}
    for package in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": installed,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_since": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
    }


def _cpu_name() -> str:
    """The processor's name and what of it torch uses."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([names[0] if names else platform.machine(), *units])


def _git(*arguments: str) -> str:
    folder = pathlib.Path(__file__).parent.parent
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder)
    return done.stdout.strip()
