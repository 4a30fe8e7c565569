"""A preflight on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from prunelens.console import Console
from prunelens.study.preflight.preview import Preflight

_STYLES = {"error": "bold red", "warning": "yellow", "ok": "dim"}  # in this order
WIDE = 110  # letters, below which the matrix leaves columns out


def show_preflight(found: Preflight, console: Console) -> None:
    """Print the matrix as a table, then totals, needs and hours as lines, then the checks."""
    totals = {"run": "total", **found.totals, "shared": "", "hours": None}
    if found.hours:
        totals["hours"] = found.hours["total"]
    rows = [_cells(row) for row in [*found.runs, totals]]
    left_out = {"stages", "shared", "FLOPs"} if console.width < WIDE else set()
    if found.hours is None:
        left_out.add("hours")
    shown = [name for name in rows[0] if name not in left_out]
    table = Table(*shown)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False, markup=False)
    if found.schedule:
        schedule = Table("workers", "hours", "critical path", "idle")
        for row in found.schedule:
            idle = "-" if row["idle_share"] is None else f"{row['idle_share']:.0%}"
            hours = (f"{row[name]:.2f}" for name in ("makespan_hours", "critical_path_hours"))
            schedule.add_row(str(row["workers"]), *hours, idle)
        console.print(schedule)
        chain = "critical path: " + " > ".join(found.schedule[0]["chain"])
        console.print(chain, highlight=False, markup=False)
    for check in sorted(found.checks, key=lambda check: list(_STYLES).index(check["level"])):
        fix = f"; {check['fix']}" if check["fix"] else ""
        line = f"{check['level']} ({check['check']}): {check['what']}{fix}"
        console.print(line, style=_STYLES[check["level"]], highlight=False, markup=False)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "run": row["run"],
        "SAEs": str(row["saes"]),
        "controls": str(row["control_saes"]),
        "stages": str(row["stages"]),
        "shared": str(row["shared"]),
        "forward": _short(row["forward_tokens"]),
        "trained on": _short(row["sae_tokens"]),
        "FLOPs": f"{row['flops']:.2e}",
        "hours": f"{row['hours'] or 0:.2f}",
    }


def _lines(found: Preflight) -> Iterator[str]:
    disk, memory, device = found.disk, found.memory, found.device
    yield "shared: stages that runs above need as well; tokens, FLOPs and hours are counted once"
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
        parts = [f"{kind} {hours:.2f}" for kind, hours in found.hours.items() if kind != "total"]
        yield f"hours: {found.hours['total']:.2f} ({', '.join(parts)})"
    if found.settings:
        yield "set: " + ", ".join(f"{name}={value}" for name, value in found.settings.items())
    yield from (f"note: {note}" for note in found.notes)


def _short(count: int) -> str:
    """1234567 -> 1.2 M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)
