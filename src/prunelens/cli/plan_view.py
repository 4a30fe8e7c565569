"""A preflight on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prunelens.cli.printing import print_table, say_whole
from prunelens.console import in_words
from prunelens.study.preflight.preview import Preflight

_STYLES = {"error": "bold red", "warning": "yellow", "ok": "dim"}  # in this order
LONG = 24.0  # hours on a CPU, from which on a GPU is advised


def show_preflight(name: str, found: Preflight) -> None:
    """Print the matrix as a table, then needs and times as lines, then the checks.

    Args:
        name: the study's.
        found: all that is shown.
    """
    totals = found.totals
    total = {"run": "total", **totals, "shared": "", "hours": (found.hours or {}).get("total")}
    print_table(
        f"{name}: {totals['runs']} runs, {totals['saes'] + totals['control_saes']} SAEs,"
        f" {totals['stages']} stages{_how_long(found)}",
        [_cells(row) for row in [*found.runs, total]],
    )
    for line in _lines(found):
        say_whole(line)
    print_table(
        "The schedule on so many workers",
        [
            {
                "workers": row["workers"],
                "makespan": _time(row["makespan_hours"]),
                "critical path": _time(row["critical_path_hours"]),
                "idle": "-" if row["idle_share"] is None else f"{row['idle_share']:.0%}",
            }
            for row in found.schedule
        ],
    )
    if found.schedule:
        say_whole("critical path: " + " > ".join(found.schedule[0]["chain"]))
    for check in sorted(found.checks, key=lambda check: list(_STYLES).index(check["level"])):
        fix = f"; {check['fix']}" if check["fix"] else ""
        line = f"{check['level']} ({check['check']}): {check['what']}{fix}"
        say_whole(line, _STYLES[check["level"]])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    time = {} if row["hours"] is None else {"time": _time(row["hours"])}
    return {
        "run": row["run"],
        **time,
        "SAEs": str(row["saes"]),
        "controls": str(row["control_saes"]),
        "stages": str(row["stages"]),
        "shared": str(row["shared"]),
        "forward": _short(row["forward_tokens"]),
        "trained on": _short(row["sae_tokens"]),
        "FLOPs": f"{row['flops']:.2e}",
    }


def _how_long(found: Preflight) -> str:
    """As the end of the headline: the time of one worker, and what to do where it is long."""
    if not found.hours:
        return ""
    hours, on_cpu = found.hours["total"], found.device["device"] == "cpu"
    if not found.device["calibration_seconds"]:
        return f", about {_time(hours)} at the given rates"
    advice = ": use a GPU" if on_cpu and hours >= LONG else ""
    return f", about {_time(hours)} on this {'CPU' if on_cpu else 'GPU'}{advice}"


def _time(hours: float) -> str:
    return in_words(3600 * hours)


def _lines(found: Preflight) -> Iterator[str]:
    disk, memory, device = found.disk, found.memory, found.device
    yield "shared: stages that runs above need as well; tokens, FLOPs and time are counted once"
    yield "stages: " + ", ".join(f"{count} {name}" for name, count in found.stages.items())
    yield (
        f"disk: {disk['peak_gigabytes']:.2f} GB at most (activation stores"
        f" {disk['stores_gigabytes']:.2f}, each up to {disk['store_gigabytes']:.2f}),"
        f" {disk['kept_gigabytes']:.2f} GB at the end;"
        f" weights to download: {disk['downloads_gigabytes']:.2f} GB"
    )
    yield (
        f"memory: {memory['device_gigabytes']:.2f} GB on the device (model forward"
        f" {memory['forward_gigabytes']:.2f}, perplexity {memory['perplexity_gigabytes']:.2f}, SAE"
        f" training {memory['sae_training_gigabytes']:.2f}), {memory['host_gigabytes']:.2f} GB of"
        " the machine's"
    )
    yield (
        f"device: {device['device']} ({device['name']}, {device['memory_gigabytes']:.0f} GB),"
        f" {device['cores']} cores"
    )
    if found.hours:
        parts = [f"{kind} {_time(hours)}" for kind, hours in found.hours.items() if kind != "total"]
        yield f"time: {_time(found.hours['total'])} ({', '.join(parts)})"
    if found.settings:
        yield "set: " + ", ".join(f"{name}={value}" for name, value in found.settings.items())
    yield from (f"note: {note}" for note in found.notes)


def _short(count: int) -> str:
    """1234567 -> 1.2 M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)
