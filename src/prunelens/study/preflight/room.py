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


def disk_checks(disk: Disk, artifacts: pathlib.Path, *, downloads: float) -> Iterator[Finding]:
    """Free disk where a study writes, and at the hub's cache where something will be fetched.

    Args:
        disk: what the study writes.
        artifacts: the folder of its artifacts; what is there already counts as written.
        downloads: bytes of weights still to be fetched.
    """
    need = max(0.0, disk.peak - bytes_written(artifacts))
    place, cache = _existing(artifacts), _existing(cache_folder())
    together = place.stat().st_dev == cache.stat().st_dev
    free = shutil.disk_usage(place).free
    yield _disk_finding(
        f"--out: {str(artifacts)!r}", free, need + (downloads if together else 0.0), "study"
    )
    if downloads and not together:
        free = shutil.disk_usage(cache).free
        yield _disk_finding(f"HF_HUB_CACHE: {str(cache)!r}", free, downloads, "weights to fetch")


def memory_checks(memory: Memory, study: StudyConfig, device: str) -> Iterator[Finding]:
    """The memory of the machine, and of the GPU where one is used, against one worker's need."""
    total, free = machine_memory()
    host = memory.host
    findings = [_memory_finding(device, "the machine's", host, total, free, "take a smaller model")]
    if device.startswith("cuda"):
        free, total = map(float, torch.cuda.mem_get_info(device))
        smaller = "lower sae.batch_tokens or models.dtype"
        own = _memory_finding(device, "its own", memory.device, total, free, smaller)
        findings.append(own)
    for finding in findings:
        if finding.level == "error" and any(model.device_map for model in study.models):
            fix = "device_map keeps what is over elsewhere, which is slow"
            finding = finding._replace(level="warning", fix=fix)
        yield finding


def machine_memory() -> tuple[float, float]:
    """Bytes in all and bytes free, within what a container or a cluster's job may take."""
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    for limit, used in _limits():
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total, free


def _disk_finding(where: str, free: float, need: float, what: str) -> Finding:
    text = f"{where} has {free / GIGABYTE:.1f} GB free for about {need / GIGABYTE:.1f} GB ({what})"
    level = _level(free, need)
    fix = "" if level == "ok" else "make room, or name a folder on a larger disk"
    return Finding(level, "disk", text, fix)


def _memory_finding(
    device: str, whose: str, need: float, total: float, free: float, smaller: str
) -> Finding:
    text = (
        f"--device: {device!r} has {total / GIGABYTE:.1f} GB of {whose} memory"
        f" ({free / GIGABYTE:.1f} free) for about {need / GIGABYTE:.1f} GB of one worker"
    )
    level = _level(total, need)
    if level == "ok" and free < need:
        level = "warning"
    return Finding(level, "memory", text, "" if level == "ok" else f"free some, or {smaller}")


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
