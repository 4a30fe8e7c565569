"""The Ray executor: each group of stages is a task on some node of a cluster.

Driver and nodes exchange JSON: the study and the identities of stages go out, what failed comes
back. Artifacts go through the store, which every node has to see: a shared folder or a bucket.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import pathlib
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future
from typing import Any, Self

from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage
from prunelens.study.executor import Failures, NodeLostError
from prunelens.study.matrix import Plan
from prunelens.study.needs import Needs, borne_by, needs_of, no_node, node_needs
from prunelens.study.node import carry_out, failures_of, order_of

log = logging.getLogger(__name__)

NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0"}
# Ray reads it when it is imported. Despite its name it is heeded everywhere; without it the parts
# of a Ray of this machine alone would listen to the network.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_closed_by: dict[str, str] = {}  # the variables that this module imported Ray with; it keeps them
OBJECT_STORE_BYTES = 80_000_000  # about the least that Ray takes: only short texts are exchanged
SECONDS_TO_ANSWER = 5.0
SECONDS_FOR_ANOTHER_NODE = 600.0  # what Kubernetes or an autoscaler takes to replace one, and more
SECONDS_BETWEEN_LOOKS = 5.0
LONGEST_FOLDER = 30  # letters; Ray makes sockets far below it, whose paths may have 107
NONE_LEFT = "no node of the Ray cluster that is left can make %s; waiting up to %.0f s for one"
DEVICES = ("auto", "cpu", "cuda")


class Tasks:
    """Makes stages as tasks of the Ray that this process is connected to."""

    shares_fate = False

    def __init__(
        self,
        ray: Any,
        needs: Mapping[str, Needs],
        *,
        request: str,
        log_folder: str,
        at_once: int | None,
    ) -> None:
        self.at_once = at_once
        self._ray, self._carry_out = ray, ray.remote(carry_out)
        self._needs, self._request, self._log_folder = needs, request, log_folder
        self._waiting: dict[Any, tuple[Stage, Future[Failures]]] = {}

    def submit(self, stages: list[Stage]) -> Future[Failures]:
        """Queue a task; Ray finds a node that has what it needs.

        Ends with `NodeLostError` where that node died. Ray itself never tries again: it would also
        give a stage that kills its process to one node after the other, and one that takes too much
        memory without end.
        """
        needs = self._needs[stages[0].identity]
        order = order_of(
            self._request,
            [stage.identity for stage in stages],
            device="cuda" if needs.num_gpus else "cpu",
            log_folder=self._log_folder,
        )
        options = {"name": stages[0].label, "max_retries": 0, **needs._asdict()}
        answer = self._carry_out.options(**options).remote(order)
        told: Future[Failures] = Future()
        self._waiting[answer] = stages[0], told

        def tell(answered: Future[str]) -> None:
            if self._waiting.pop(answer, None):
                self._tell(answered, told)

        answer.future().add_done_callback(tell)
        return told

    @contextlib.contextmanager
    def watched(self) -> Iterator[Self]:
        """In this block, give up tasks that no node which is left can make.

        Another one has some time to come first. Ray would let them wait for ever.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._give_up_stranded, args=(done,), daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            done.set()
            watcher.join()

    def cancel(self) -> None:
        """End every task at once; what they were at can be made again."""
        for answer in list(self._waiting):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(answer, force=True)

    def _tell(self, answered: Future[str], told: Future[Failures]) -> None:
        """Hand on how a task ended."""
        kinds = self._ray.exceptions
        error = answered.exception()
        if error is None:
            try:
                told.set_result(failures_of(answered.result()))
            except UserError as refusal:
                told.set_exception(refusal)
        elif isinstance(error, kinds.RayTaskError) or not isinstance(error, kinds.RayError):
            told.set_exception(error)  # our own function raised: a bug
        elif isinstance(error, kinds.NodeDiedError):
            log.warning("a node of the Ray cluster died; what it was making goes to another one")
            told.set_exception(NodeLostError())
        else:
            log.warning("a Ray task ended without an answer: %s", _one_line(error))
            told.set_exception(BrokenExecutor())

    def _give_up_stranded(self, done: threading.Event) -> None:
        since: dict[Any, float] = {}
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            nodes, now = nodes_of(self._ray), time.monotonic()
            for answer, (stage, told) in list(self._waiting.items()):
                need = self._needs[stage.identity]
                if borne_by(need, nodes):
                    since.pop(answer, None)
                elif answer not in since:
                    since[answer] = now
                    log.warning(NONE_LEFT, stage.label, SECONDS_FOR_ANOTHER_NODE)
                elif now - since[answer] < SECONDS_FOR_ANOTHER_NODE:
                    continue
                elif self._waiting.pop(answer, None):  # it has not been answered meanwhile
                    told.set_exception(no_node(stage, need, nodes))


@contextlib.contextmanager
def cluster(
    plan: Plan,
    *,
    address: str | None,
    device: str,
    request: str,
    log_folder: pathlib.Path,
    at_once: int | None = None,
) -> Iterator[Tasks]:
    """Connect to a Ray cluster, or start one on this machine, for as long as the block lasts.

    Args:
        plan: whose stages may have to be made.
        address: of the cluster, as `ray.init` takes it; None: what RAY_ADDRESS names, else a new
            one on this machine. A connection that the caller has made already is used and kept.
        device: `cpu`; `cuda`: a GPU for each stage that can use one; `auto`: that, if there is any.
        request: what `make_by_identity` is told of the study.
        log_folder: where tracebacks go, on all nodes.
        at_once: the most tasks at one time; None: as many as the cluster bears.
    Raises: UserError where Ray is not installed, no cluster answers, or no node has what a stage
        needs.
    """
    if device not in DEVICES:
        raise UserError(
            f"--device: {device!r} with --executor ray; give one of {', '.join(DEVICES)}"
        )
    with _connected(address) as ray:
        nodes = nodes_of(ray)
        gpu = device != "cpu" and any(node.num_gpus for node in nodes)
        if device == "cuda" and not gpu:
            raise UserError("--device: 'cuda', but no node of the Ray cluster has a GPU; give auto")
        tasks = Tasks(
            ray,
            needs_of(plan, nodes, gpu=gpu),
            request=request,
            log_folder=str(log_folder.absolute()),
            at_once=at_once,
        )
        try:
            with tasks.watched():
                yield tasks
        except BaseException:
            tasks.cancel()
            raise


def nodes_of(ray: Any) -> list[Needs]:
    """What each node has that is alive."""
    return node_needs(node["Resources"] for node in ray.nodes() if node["Alive"])


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module ray, connected."""
    asked, address = address, address or os.environ.get("RAY_ADDRESS") or "local"
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(_imported(alone=address == "local"))
        if ray.is_initialized():
            _refuse_other(asked, ray.get_runtime_context().gcs_address)
            yield ray
            return
        options: dict[str, Any] = {}
        if address == "local":
            _refuse_open(ray)
            options = {
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": stack.enter_context(_short_folder()),
            }
        else:
            _refuse_silent(address)
        _connect(ray, address, options)
        stack.callback(ray.shutdown)
        yield ray


@contextlib.contextmanager
def _imported(*, alone: bool) -> Iterator[Any]:
    """Ray, which tells nobody that it is used; `alone`: no one but this process can use it.

    The variables that tell Ray so are put back at the end of the block.
    """
    if alone and "ray" not in sys.modules:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        given = {name: os.environ[name] for name in token if name in os.environ}
        _closed_by.update(LOOPBACK | token | given)
    with _variables(NO_TELEMETRY | (_closed_by if alone else {})):
        try:
            import ray
        except ImportError:
            raise UserError(
                "--executor: 'ray' needs Ray, which is not installed; pip install 'prunelens[ray]'"
            ) from None
        yield ray


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """In this block, environment variables have these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Call `ray.init`, which takes SIGTERM for itself; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _no_answer(address, _one_line(error)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _refuse_open(ray: Any) -> None:
    """Raises UserError where a Ray of this machine would listen to the network."""
    # As the variable was when Ray was imported; to set it later is of no use.
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        raise UserError(
            "--executor: 'ray' was imported before, and so a Ray of this machine would listen to"
            " the network; set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before ray is imported (in a"
            " notebook: restart it), or give the --address of a cluster"
        )


def _refuse_other(asked: str | None, connected: str) -> None:
    if asked not in (None, "auto", connected):
        raise UserError(
            f"--address: {asked!r}, but this process is connected to the Ray cluster at"
            f" {connected!r}; call ray.shutdown() before, or leave the address out"
        )


def _refuse_silent(address: str) -> None:
    """Raises UserError where nothing listens; Ray would ask for minutes."""
    if address == "auto":
        return
    host = port = None
    with contextlib.suppress(ValueError):
        place = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        if place.scheme in ("", "ray"):
            host, port = place.hostname, place.port
    if not host or not port:
        raise UserError(
            f"--address: {address!r} is no address of a Ray cluster; give for example auto,"
            " 10.0.0.1:6379 or ray://10.0.0.1:10001"
        )
    try:
        socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise _no_answer(address, error.strerror or str(error)) from None


def _no_answer(address: str, why: str) -> UserError:
    return UserError(
        f"--address: no Ray cluster answers at {address!r} ({why}); give its head's address, for"
        " example 10.0.0.1:6379, or leave it out to start one here"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _short_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this user alone, for the logs and sockets of a Ray of this machine."""
    usual = tempfile.gettempdir()
    folder = usual if len(usual) <= LONGEST_FOLDER else "/tmp"
    return tempfile.TemporaryDirectory(prefix="ray-", dir=folder, ignore_cleanup_errors=True)
