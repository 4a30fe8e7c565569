"""Kill a study again and again, let it end, and hold its results against an undisturbed run.

    python tests/faults/kill.py                                    # 10 moments of study.yaml
    python tests/faults/kill.py --study demo --moments 50 --seed 1

Exit code 0 if every file of the results is byte-identical and nothing is left over.
"""

from __future__ import annotations

import argparse
import atexit
import bisect
import contextlib
import functools
import json
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

STUDY = str(pathlib.Path(__file__).with_name("study.yaml"))
COMMAND = [sys.executable, "-c", "from prunelens.cli import main; main()"]
POLL_SECONDS = 0.01
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
) -> Forked:
    """The same, forked from a process that has imported everything: where imports are not meant.

    Figures and page take longer than a tiny study: `is_drawn` where they are meant.
    """
    server = _fork_server()
    assert server.stdin and server.stdout
    left = pathlib.Path(tempfile.mkdtemp(prefix="prunelens-run-"))
    arguments = _arguments(study, folder, *more, workers=workers)
    order = [arguments, str(left), is_drawn, dict(os.environ)]
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return Forked(int(server.stdout.readline()), left)


class Forked:
    """What `start_at_once` has started; the part of Popen that is needed here."""

    def __init__(self, pid: int, left: pathlib.Path) -> None:
        self.pid, self.returncode, self._left = pid, None, left

    def poll(self) -> int | None:
        """Its exit code, once there is one."""
        code = self._left / "code"
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
            self._said = (self._left / "stderr").read_text()
            shutil.rmtree(self._left)
        return self.returncode

    def wait(self, timeout: float = RUN_SECONDS) -> int:
        """Its exit code, when it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(COMMAND, timeout)
            time.sleep(POLL_SECONDS)
        return self.returncode

    def communicate(self, timeout: float = RUN_SECONDS) -> tuple[None, str]:
        """What it has said on stderr, when it has ended."""
        self.wait(timeout)
        return None, self._said

    def kill(self) -> None:
        """SIGKILL, where it has not ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _arguments(study: str, folder: pathlib.Path, *more: str, workers: int) -> list[str]:
    arguments = ["run", study, "--out", str(folder), "--workers", str(workers), *more]
    return [*arguments, "--quiet", "--device", "cpu"]


_SERVE = """
import json, os, pathlib, signal, sys
import matplotlib.pyplot, prunelens.cli.app, prunelens.report.write, transformers.modeling_utils
from prunelens.cli import main
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    arguments, left, is_drawn, environment = json.loads(line)
    if os.fork():
        continue
    os.environ |= environment
    if not is_drawn:
        write = prunelens.report.write
        write.write_figures = write.write_page = lambda *_: None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if run := os.fork():  # this process waits for the run, and tells how it ended
        print(run, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
        pathlib.Path(left, "half").write_text(str(code))
        os.rename(f"{left}/half", f"{left}/code")
        os._exit(0)
    os.setsid()
    for number, path in enumerate([os.devnull, os.devnull, f"{left}/stderr"]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["prunelens", *arguments]
    main()
"""


@functools.cache
def _fork_server() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, "-c", _SERVE], text=True, **pipes)
    atexit.register(server.communicate)  # which closes its stdin, so that it ends
    return server


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
    paths = folder.glob("artifacts/*/*/meta.json")
    kinds = [path.parts[-3] for path in paths if not path.parts[-2].endswith(".tmp")]
    return sum(kind not in ("activations", "damaged", "unfinished") for kind in kinds)


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
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


def _draw(undisturbed: Timeline, moments: int, generator: random.Random) -> list[Kill]:
    kills = []
    for moment in sorted(generator.uniform(0, undisturbed.seconds) for _ in range(moments)):
        there = bisect.bisect_right(undisturbed.published, moment)
        since = undisturbed.published[there - 1] if there else 0.0
        workers, whole_group = generator.choice([1, 2]), generator.choice([True, False])
        kills.append(Kill(there, moment - since, workers, whole_group))
    return kills


def _kill(process: Forked, folder: pathlib.Path, kill: Kill, startup: float) -> bool:
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
