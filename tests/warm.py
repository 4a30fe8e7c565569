"""Processes of Python that begin where others are after ten seconds of imports.

They are forked from one that has imported everything. All else is as with `python -c code …`: each
is a child of who starts it, with arguments, environment, folder, pipes, a session and an exit code
of its own, and is killed and interrupted like any. `Popen` and `run` are those of subprocess. What
imports do, or when a signal meets them, is for a process from the start.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import json
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

COMMAND_LINE = "from prunelens.cli import main; main()"
IMPORTED = (
    "matplotlib.pyplot",
    "transformers.modeling_utils",
    "prunelens.cli.app",
    "prunelens.report.write",
    "prunelens.study.worker",
)
BESIDE = 200  # above every file descriptor that a process has when it begins
_BECOME_SUBREAPER = 36
_READ_ON_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "PYTHON", "JAXTYPING", "MPL")


class Popen(subprocess.Popen):
    """Of [sys.executable, "-c", code, …] alone; without preexec_fn."""

    def _execute_child(self, *given: Any) -> None:
        """What subprocess.Popen does when all pipes are there."""
        if sys.platform != "linux":
            super()._execute_child(*given)  # type: ignore[misc]
            return
        wanted = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        own = (wanted[name] for name in ("p2cread", "c2pwrite", "errwrite"))
        files = {number: file if file != -1 else number for number, file in enumerate(own)}
        self.pid = _begin(wanted["args"], files, wanted["cwd"], wanted["env"], wanted)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(wanted[name] for name in pipes))  # type: ignore[attr-defined]


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Its exit code and what it has said, when it has ended."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(command, **pipes, **options) as process:
        said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """The process that this one forks its workers from is such a one."""
    start, begun = multiprocessing.util.spawnv_passfds, list[int]()

    def begin(path: Any, words: list[str], files: Sequence[int]) -> int:
        if sys.platform != "linux" or "multiprocessing.forkserver" not in words[-1]:
            return start(path, words, files)
        begun.append(_begin(words[-3:], {number: number for number in (0, 1, 2, *files)}))
        return begun[-1]

    multiprocessing.util.spawnv_passfds = begin
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = start
        for pid in begun:  # prunelens knows them by their command line, and these have another
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # multiprocessing reaps it


def _begin(
    command: Sequence[str],
    files: dict[int, int],
    folder: str | None = None,
    environment: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> int:
    """The number of the new process; `files` are what it has open, by their numbers there."""
    _, flag, code, *arguments = map(os.fspath, command)
    assert flag == "-c"
    environment = dict(os.environ if environment is None else environment)
    order = {
        "code": code,
        "arguments": arguments,
        "files": list(files),
        "folder": os.path.abspath(folder or "."),  # noqa: PTH100 (may be bytes or a path)
        "environment": environment,
        "is_leader": bool(options and options["start_new_session"]),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    told = {name: v for name, v in environment.items() if name.startswith(_READ_ON_IMPORT)}
    origin = _origin(frozenset(told.items()))
    # What loses its parent becomes a child of this process, only while that is meant.
    ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(origin, [json.dumps(order).encode()], list(files.values()))
        number = int(origin.recv(64))
        assert origin.recv(64) == b"orphaned"
    finally:
        ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 0, 0, 0, 0)
    return number


@functools.cache
def _origin(environment: frozenset[tuple[str, str]]) -> socket.socket:
    """Orders to a process that has imported everything, with this of the environment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        env={**os.environ, **dict(environment)},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(orders: socket.socket) -> dict[str, Any]:
    """In the process that has imported everything; returns in those that are forked from it."""
    while True:
        message, files, *_ = socket.recv_fds(orders, 2**20, 16)
        if not message:
            os._exit(0)
        if not (between := os.fork()):
            if process := os.fork():
                orders.send(str(process).encode())
                os._exit(0)
            orders.close()
            return _become(message, files)
        os.waitpid(between, 0)
        orders.send(b"orphaned")
        for file in files:
            os.close(file)


def _become(message: bytes, files: Sequence[int]) -> dict[str, Any]:
    """What the order says, but for its code."""
    order: dict[str, Any] = json.loads(message)
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, BESIDE) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, order["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["is_leader"]:
        os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    sys.argv, sys.path[0] = ["-c", *order["arguments"]], ""
    return order


def _keep_one_for_workers() -> str | None:
    """Fork what this process would start to fork its workers from, before it does anything.

    Returns: in that one its code, else None.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = os.fork()
    if not kept:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as where it is started
        ours.close()
        message, files, *_ = socket.recv_fds(theirs, 2**20, 16)
        if not message:
            os._exit(0)
        theirs.close()
        return str(_become(message, files)["code"])
    theirs.close()
    start = multiprocessing.util.spawnv_passfds

    def begin(path: Any, words: list[str], files: Sequence[int]) -> int:
        if ours.fileno() == -1 or "multiprocessing.forkserver" not in words[-1]:
            return start(path, words, files)
        order = {
            "code": words[-1],
            "arguments": [],
            "files": list(files),
            "folder": os.getcwd(),  # noqa: PTH109
            "environment": dict(os.environ),
            "is_leader": False,
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        }
        socket.send_fds(ours, [json.dumps(order).encode()], list(files))
        ours.close()
        return kept

    multiprocessing.util.spawnv_passfds = begin
    return None


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # else each goes through all of this again when it ends: seconds
    code = _serve(socket.socket(fileno=int(sys.argv[1])))["code"]
    if "multiprocessing.forkserver" not in code:
        code = _keep_one_for_workers() or code
    this, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
