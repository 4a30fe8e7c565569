"""A local server that speaks S3, on 127.0.0.1: moto's."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

import pytest


class Server(NamedTuple):
    """A running server."""

    url: str
    """Its address, http://127.0.0.1:port."""
    bucket: str
    """The address of a bucket, s3://name."""


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Serve an empty bucket from this process, and name it and its keys in the environment."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed (the extra `dev`)")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        urllib.request.urlopen(request).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            yield Server(url, "s3://bucket")
    finally:
        server.stop()
