"""Kill a study again and again, let it end, and hold its results against an undisturbed run.

    python tests/faults/kill.py                                    # 10 moments of study.yaml
    python tests/faults/kill.py --study demo --moments 50 --seed 1

Exit code 0 if every file of the results is byte-identical and nothing is left over.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pandas as pd
import psutil

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # as pytest has it
import warm

STUDY = str(pathlib.Path(__file__).with_name("study.yaml"))
COMMAND = [sys.executable, "-c", warm.COMMAND_LINE]
UNDRAWN = f"""
from prunelens.report import write
write.write_figures = write.write_page = lambda *_: None
{warm.COMMAND_LINE}
"""
POLL_SECONDS = 0.01
COME_AND_GO = ("activations", "damaged", "unfinished")
ORPHAN_SECONDS = 60.0  # what imports looks for its parent when it is through: seconds, or many
RUN_SECONDS = 3600.0  # the longest that an undisturbed run may take


class Timeline(NamedTuple):
    """How an undisturbed run went."""

    results: dict[str, bytes]
    """See `results_of`."""
    seconds: float
    """From its start to its end."""
    published: list[float]
    """When each artifact that stays was there, in seconds since the start, ascending."""


class Kill(NamedTuple):
    """A moment, as progress and not as time: resumed and slower runs are met at the same place."""

    artifacts: int
    """So many artifacts have to be there …"""
    delay: float
    """… and so many seconds have to have passed since."""
    workers: int
    """Processes of the run that is killed."""
    whole_group: bool
    """All of its processes are killed; else the parent alone, and the workers have to notice."""


def kill_again_and_again(
    study: str,
    folder: pathlib.Path,
    undisturbed: Timeline,
    *,
    moments: int,
    generator: random.Random,
) -> list[str]:
    """Kill one run of `study` at random moments, resuming it after each; then let it end.

    Args:
        study: a file, or the name of a shipped study.
        folder: a new one, for its results.
        undisturbed: an earlier run of the same study.
        moments: how many; each is drawn from the whole duration, and they come in order.
        generator: draws the moments, the number of workers and which processes are killed.
    Returns: what is wrong, one line each; nothing if all is well.
    """
    problems = []
    landed = 0
    for number, kill in enumerate(_draw(undisturbed, moments, generator), start=1):
        if number == 1:  # as people start it: what it imports, and its workers' too, may be met
            process: subprocess.Popen[str] | warm.Popen = start(study, folder, workers=kill.workers)
        else:
            process = start_at_once(study, folder, workers=kill.workers, is_drawn=True)
        is_killed = _kill(process, folder, kill, startup=undisturbed.published[0])
        landed += is_killed
        if left := wait_for_orphans(process.pid):
            problems.append(f"kill {number}: still running: {left}")
        print(f"kill {number}/{moments}: {kill}{'' if is_killed else ' came too late'}", flush=True)
    end = start_at_once(study, folder, workers=2, is_drawn=True)
    code = end.wait(RUN_SECONDS)
    if code != 0:
        problems.append(f"the last run ended with exit code {code}")
    if left := wait_for_orphans(end.pid):
        problems.append(f"after the end still running: {left}")
    if landed < moments - 1:
        problems.append(f"only {landed} of {moments} kills met a running study")
    return [*problems, *differences(undisturbed.results, results_of(folder)), *leftovers(folder)]


def run_undisturbed(study: str, folder: pathlib.Path, *, workers: int = 2) -> Timeline:
    """Run a study into a new folder, and note when each artifact came."""
    process = start_at_once(study, folder, workers=workers, is_drawn=True)
    started, published = time.monotonic(), list[float]()
    while process.poll() is None:
        now = time.monotonic() - started
        published += [now] * (num_artifacts(folder) - len(published))
        assert now < RUN_SECONDS, f"{study} takes longer than {RUN_SECONDS} s"
        time.sleep(POLL_SECONDS)
    assert process.returncode == 0, f"{study} ended with exit code {process.returncode}"
    return Timeline(results_of(folder), time.monotonic() - started, published)


def start(
    study: str, folder: pathlib.Path, *more: str, workers: int = 1, **options: object
) -> subprocess.Popen[str]:
    """The command line at work in a session of its own; `options` are those of Popen."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    return subprocess.Popen(
        [*COMMAND, *_arguments(study, folder, *more, workers=workers)],
        start_new_session=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def start_at_once(
    study: str, folder: pathlib.Path, *more: str, workers: int = 1, is_drawn: bool = False
) -> warm.Popen:
    """The same without the seconds of imports, where no signal is meant to meet them.

    Figures and page take longer than a tiny study: `is_drawn` where they are meant.
    """
    code = warm.COMMAND_LINE if is_drawn else UNDRAWN
    arguments = _arguments(study, folder, *more, workers=workers)
    return warm.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def _arguments(study: str, folder: pathlib.Path, *more: str, workers: int) -> list[str]:
    arguments = ["run", study, "--out", str(folder), "--workers", str(workers), *more]
    return [*arguments, "--quiet", "--device", "cpu"]


def results_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of the tables, latents.parquet, and runs.csv without its times, by name."""
    paths = sorted(path for path in (folder / "tables").rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for name in ("latents.parquet", "runs.csv"):
        if (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    if "runs.csv" in found:
        runs = pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
        found["runs.csv"] = runs.drop(columns="wall_seconds").to_csv(index=False).encode()
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """The files in which two `results_of` differ, one line each."""
    names = sorted(expected.keys() | found.keys())
    return [f"{name} differs" for name in names if expected.get(name) != found.get(name)]


def leftovers(folder: pathlib.Path) -> list[str]:
    """What a finished study must not have: half-written, unfinished or set aside."""
    kept = folder / "artifacts"
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    left += [path for name in ("unfinished", "damaged") for path in kept.glob(f"{name}/*")]
    return [f"left over: {path.relative_to(folder)}" for path in sorted(set(left))]


def num_artifacts(folder: pathlib.Path) -> int:
    """Finished artifacts, without the activation stores, which come and go."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder / "artifacts") as kinds:
        kept = [kind for kind in kinds if kind.name not in COME_AND_GO and kind.is_dir()]
        return sum(not name.endswith(".tmp") for kind in kept for name in os.listdir(kind))  # noqa: PTH208
    return 0


def on_a_busy_machine(seconds: float) -> float:
    """What `seconds` of a machine to oneself may become beside what else runs now, at most 4x."""
    return seconds * min(4.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def wait_for_orphans(session: int, seconds: float = ORPHAN_SECONDS) -> list[str]:
    """The processes of a session whose leader has ended that are there even after so long."""
    deadline = time.monotonic() + seconds
    while (left := _members(session)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return left


def _members(session: int) -> list[str]:
    found = []
    for number in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
            if os.getsid(number) != session:
                continue
            process = psutil.Process(number)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{number} {' '.join(process.cmdline())[:80]}")
    return found


def _draw(undisturbed: Timeline, moments: int, generator: random.Random) -> list[Kill]:
    kills = []
    for moment in sorted(generator.uniform(0, undisturbed.seconds) for _ in range(moments)):
        there = bisect.bisect_right(undisturbed.published, moment)
        since = undisturbed.published[there - 1] if there else 0.0
        workers, whole_group = generator.choice([1, 2]), generator.choice([True, False])
        kills.append(Kill(there, moment - since, workers, whole_group))
    return kills


def _kill(process: subprocess.Popen[str], folder: pathlib.Path, kill: Kill, startup: float) -> bool:
    """Whether the moment came before the run had ended.

    Where what the moment waits for was there from the start, the run first gets the time in which
    an undisturbed one made its first artifact: else most kills would meet the imports.
    """
    is_resumed = 0 < kill.artifacts <= num_artifacts(folder)
    since = time.monotonic() + startup if is_resumed else None
    if kill.artifacts == 0:
        since = time.monotonic()
    while process.poll() is None and (since is None or time.monotonic() < since + kill.delay):
        if since is None and num_artifacts(folder) >= kill.artifacts:
            since = time.monotonic()
        time.sleep(POLL_SECONDS)
    is_running = process.poll() is None
    if is_running and kill.whole_group:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)
    elif is_running:
        process.kill()
    process.wait()
    return is_running


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--study", default=STUDY, help="a file or a shipped study; default: ours")
    parser.add_argument("--moments", type=int, default=10, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--keep", action="store_true", help="do not delete what was made")
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prunelens-faults-"))
    undisturbed = run_undisturbed(given.study, folder / "undisturbed")
    count = len(undisturbed.published)
    print(f"undisturbed: {undisturbed.seconds:.1f} s, {count} artifacts", flush=True)
    problems = kill_again_and_again(
        given.study,
        folder / "killed",
        undisturbed,
        moments=given.moments,
        generator=random.Random(given.seed),
    )
    if given.keep or problems:
        print(f"see {folder}")
    else:
        shutil.rmtree(folder)
    print("\n".join(problems) or f"{len(undisturbed.results)} files are identical, nothing is left")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
