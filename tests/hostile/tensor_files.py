"""Safetensors files that are not what they say: made from a good one, each wrong in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]
HTML = "<img src=x onerror=alert(1)>\n\x1b[31m"


def damaged(kind: str, good: bytes) -> bytes:
    """The file `good` with one thing wrong."""
    (size,) = struct.unpack("<Q", good[:8])
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    name = next(name for name in header if name != "__metadata__")
    return KINDS[kind](good, header, body, name)


def file_of(header: Header | bytes, body: bytes = b"", size: int | None = None) -> bytes:
    """Length, header and tensors; the length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def _lying(**facts: Any) -> Callable[[bytes, Header, bytes, str], bytes]:
    """The first tensor with other facts."""
    return lambda good, header, body, name: file_of({**header, name: header[name] | facts}, body)


def _whole(content: Header | bytes) -> Callable[[bytes, Header, bytes, str], bytes]:
    return lambda good, header, body, name: file_of(content)


def _renamed(to: str) -> Callable[[bytes, Header, bytes, str], bytes]:
    return lambda good, header, body, name: file_of(
        {to if n == name else n: facts for n, facts in header.items()}, body
    )


def _twice(good: bytes, header: Header, body: bytes, name: str) -> bytes:
    """Two tensors in the same bytes."""
    return file_of({**header, "zz": header[name]}, body)


KINDS: dict[str, Callable[[bytes, Header, bytes, str], bytes]] = {
    "empty": lambda good, header, body, name: b"",
    "three bytes": lambda good, header, body, name: good[:3],
    "torn in the header": lambda good, header, body, name: good[:20],
    "torn in a tensor": lambda good, header, body, name: good[:-4],
    "longer than told": lambda good, header, body, name: good + b"more",
    "header of 2^63 bytes": lambda good, header, body, name: file_of(header, body, size=2**63),
    "header of 99 MB": lambda good, header, body, name: file_of(header, body, size=99_000_000),
    "no header": _whole(b""),
    "no JSON": _whole(b'{"a":'),
    "a list": _whole(b"[1, 2]"),
    "not UTF-8": _whole(b'{"\xff\xfe": {}}'),
    "nested": _whole(b"[" * 100_000),
    "no tensors": _whole({}),
    "no names": _whole({"__metadata__": {}}),
    "beyond the end": _lying(data_offsets=[0, 10**9]),
    "negative offset": _lying(data_offsets=[-4, 4]),
    "offsets reversed": _lying(data_offsets=[16, 0]),
    "overlapping": _twice,
    "other type": _lying(dtype="F64"),
    "unknown type": _lying(dtype="PICKLE"),
    "4 TB": _lying(shape=[10**6, 10**6]),
    "overflow": _lying(shape=[2**40, 2**40]),
    "negative shape": _lying(shape=[-1, -2]),
    "empty name": _renamed(""),
    "hostile name": _renamed(HTML),
    "10^12 by 0": _whole({"x": {"dtype": "F32", "shape": [10**12, 0], "data_offsets": [0, 0]}}),
}
