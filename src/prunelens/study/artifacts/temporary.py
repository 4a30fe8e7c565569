"""Names of folders that are being written: no two makers share one, and a dead one's is known."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import time

import psutil

FORGOTTEN_SECONDS = 86_400.0  # age at which what another machine left unfinished is nobody's


def temporary_beside(folder: pathlib.Path) -> pathlib.Path:
    """A name for what is to become `folder`, or was it: no other process of any machine has it."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    return folder.with_name(f"{folder.name}.{host}-{os.getpid()}-{os.urandom(4).hex()}.tmp")


def is_left(folder: pathlib.Path) -> bool:
    """Whether whoever wrote to a temporary folder is gone, as far as can be told from here."""
    parts = folder.name.split(".")[1].split("-")
    try:
        age = time.time() - folder.stat().st_mtime
        if len(parts) != 3 or not parts[1].isdecimal() or age > FORGOTTEN_SECONDS:
            return True
        host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
        return parts[0] == host and not psutil.pid_exists(int(parts[1]))
    except FileNotFoundError:
        return False
