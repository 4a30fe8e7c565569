"""Is there room: free disk against what is written, memory against what is held."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

import psutil
import torch

from prunelens.config import StudyConfig
from prunelens.hub import cache_folder
from prunelens.study.footprint import Disk, Memory
from prunelens.study.preflight.finding import Finding, Level

GIGABYTE = 1e9
GROUPS, OWN_GROUPS = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/proc/self/cgroup")
# The need is an estimate to within a few tenths: well below it is an error, about it a warning.
SURELY_TOO_LITTLE, PERHAPS_TOO_LITTLE = 0.75, 1.25


def disk_checks(disk: Disk, artifacts: pathlib.Path) -> Iterator[Finding]:
    """Free disk where a study writes, and at the hub's cache where something will be fetched.

    Args:
        disk: what the study writes.
        artifacts: the folder of its artifacts; what is there already counts as written.
    """
    need = max(0.0, disk.peak - bytes_written(artifacts))
    place, cache = _existing(artifacts), _existing(cache_folder())
    together = place.stat().st_dev == cache.stat().st_dev
    needs = [(f"--out: {str(artifacts)!r}", place, need + disk.downloads * together, "study")]
    if disk.downloads and not together:
        needs.append((f"HF_HUB_CACHE: {str(cache)!r}", cache, disk.downloads, "weights to fetch"))
    for where, folder, need, what in needs:
        free = shutil.disk_usage(folder).free
        text = f"{where} has {_in_gigabytes(free)} free for about {_in_gigabytes(need)} ({what})"
        level = _level(free, need)
        fix = "" if level == "ok" else "make room, or name a folder on a larger disk"
        yield Finding(level, "disk", text, fix)


def memory_checks(memory: Memory, study: StudyConfig, device: str) -> Iterator[Finding]:
    """The memory of the machine, and of the GPU where one is used, against one worker's need."""
    needs = [("the machine's", memory.host, *machine_memory(), "take a smaller model")]
    if device.startswith("cuda"):
        free, total = map(float, torch.cuda.mem_get_info(device))
        smaller = "lower sae.batch_tokens or models.dtype"
        needs.append(("its own", memory.device, total, free, smaller))
    for whose, need, total, free, smaller in needs:
        text = (
            f"--device: {device!r} has {_in_gigabytes(total)} of {whose} memory"
            f" ({free / GIGABYTE:.1f} free) for about {_in_gigabytes(need)} of one worker"
        )
        level = _level(total, need)
        if level == "ok" and free < need:
            level = "warning"
        fix = "" if level == "ok" else f"free some, or {smaller}"
        if level == "error" and any(model.device_map for model in study.models):
            level, fix = "warning", "device_map keeps what is over elsewhere, which is slow"
        yield Finding(level, "memory", text, fix)


def _in_gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:.1f} GB"


def machine_memory() -> tuple[float, float]:
    """Bytes in all and bytes free, within what a container or a cluster's job may take."""
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    for limit, used in _limits():
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total, free


def _level(there: float, need: float) -> Level:
    if there < SURELY_TOO_LITTLE * need:
        return "error"
    return "warning" if there < PERHAPS_TOO_LITTLE * need else "ok"


def bytes_written(artifacts: pathlib.Path) -> float:
    """Bytes of the artifacts that are there."""
    files = [artifacts, *artifacts.rglob("*")]
    return float(sum(path.stat().st_size for path in files if path.is_file()))


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _limits() -> Iterator[tuple[float, float]]:
    """What this process's control groups may take, and what they cannot give back of it. Bytes.

    A group is bound by those above it, too. Version 2 of the kernel's interface, then version 1.
    """
    try:
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in groups:
        if controllers == "":
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = GROUPS / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and folder.is_relative_to(root):
                yield limit, max(0.0, (used or 0.0) - _statistic(folder, names[2]))


def _statistic(folder: pathlib.Path, name: str) -> float:
    """A line of `memory.stat`; 0 if it is not there."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def _number(path: pathlib.Path) -> float | None:
    """A limit of the kernel; None where there is none, or it says `max`."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
