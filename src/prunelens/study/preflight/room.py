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
# The need is an estimate to within a few tenths: well below it is an error, about it a warning.
SURELY_TOO_LITTLE, PERHAPS_TOO_LITTLE = 0.75, 1.25


def disk_checks(disk: Disk, out: pathlib.Path, *, downloads: float) -> Iterator[Finding]:
    """Free disk at the study's folder, and at the hub's cache where something will be fetched.

    Args:
        disk: what the study writes.
        out: the study's folder; what is there already counts as written.
        downloads: bytes of weights still to be fetched.
    """
    need = max(0.0, disk.peak - _written(out))
    place, cache = _existing(out), _existing(cache_folder())
    together = place.stat().st_dev == cache.stat().st_dev
    free = shutil.disk_usage(place).free
    yield _disk_finding(
        f"--out: {str(out)!r}", free, need + (downloads if together else 0.0), "study"
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
    folder = pathlib.Path("/sys/fs/cgroup")
    limit = _number(folder / "memory.max")
    if limit is None:
        return float(memory.total), float(memory.available)
    used = _number(folder / "memory.current") or 0.0
    return min(memory.total, limit), min(memory.available, max(0.0, limit - used))


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


def _written(out: pathlib.Path) -> float:
    """Bytes of the artifacts that are there."""
    files = (path for path in (out / "artifacts").rglob("*") if path.is_file())
    return float(sum(path.stat().st_size for path in files))


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _number(path: pathlib.Path) -> float | None:
    """A limit of the kernel; None where there is none, or it says `max`."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
