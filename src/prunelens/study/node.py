"""What a node of a cluster does with an order: look whether it can carry it out, then do so.

Orders and answers are JSON. An answer says why each stage failed, or why no order of this study can
be carried out here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import platform
import socket
from collections.abc import Mapping, Sequence

import torch

from prunelens.errors import UserError
from prunelens.study.artifacts.disk import DiskError
from prunelens.study.artifacts.seal import library_versions
from prunelens.study.executor import Failures
from prunelens.study.worker import make_by_identity

PACKAGE = pathlib.Path(__file__).parents[1]


def order_of(request: str, identities: Sequence[str], *, device: str, log_folder: str) -> str:
    """What `carry_out` needs to know.

    Args:
        request: of `worker.request_of`.
        identities: of stages to be made in one go, their parents being there.
        device: `cpu`; `cuda`: the GPU that the node gives to this order.
        log_folder: where tracebacks go.
    """
    facts = {
        "request": {**json.loads(request), "device": device},
        "identities": list(identities),
        "log_folder": log_folder,
        "working_folder": str(pathlib.Path.cwd()),  # which relative paths of the study start from
        "versions": what_numbers_depend_on(),
    }
    return json.dumps(facts)


def carry_out(order: str) -> str:
    """Make the stages of an order; returns what `failures_of` reads."""
    facts = json.loads(order)
    try:
        _refuse_unlike(facts["versions"])
        _refuse_without_gpu(facts["request"]["device"])
        if pathlib.Path(facts["working_folder"]).is_dir():
            os.chdir(facts["working_folder"])
        _refuse_unseen(facts["request"]["artifacts"])
        made = make_by_identity(
            json.dumps(facts["request"]), facts["identities"], facts["log_folder"]
        )
    except UserError as error:  # nothing else of this study would get further
        return json.dumps({"stopped": str(error), "by_disk": isinstance(error, DiskError)})
    return json.dumps({"failures": made})


def failures_of(answer: str) -> Failures:
    """What `make_by_identity` returned on a node. Raises UserError where the node refused."""
    facts = json.loads(answer)
    if "stopped" in facts:
        raise (DiskError if facts["by_disk"] else UserError)(facts["stopped"])
    failures: Failures = facts["failures"]
    return failures


@functools.cache
def what_numbers_depend_on() -> dict[str, str]:
    """Versions by name; of prunelens the source as well, which changes while its version stays."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "python": platform.python_version(),
        **library_versions(),
        "prunelens's source": source.hexdigest()[:12],
    }


def _refuse_unlike(driver: Mapping[str, str]) -> None:
    """The same code and libraries, or the numbers are not those of one machine."""
    here = what_numbers_depend_on()
    for name in sorted(driver.keys() | here.keys()):
        if driver.get(name) != here.get(name):
            raise UserError(
                f"--executor: node {socket.gethostname()!r} has {name} {here.get(name)}, the"
                f" machine that runs the study {driver.get(name)}; install the same on all nodes"
            )


def _refuse_without_gpu(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--executor: Ray counts a GPU on node {socket.gethostname()!r}, but torch"
            f" {torch.__version__} cannot use one there; install a torch for it, or give --device"
            " cpu"
        )


def _refuse_unseen(artifacts: str) -> None:
    """The folder that all machines write to; a bucket is looked at when it is opened."""
    if "://" not in artifacts and not pathlib.Path(artifacts).is_dir():
        raise UserError(
            f"--out: node {socket.gethostname()!r} does not see the folder {artifacts!r}; put the"
            " study on one that all nodes share, or give --artifacts s3://…"
        )
