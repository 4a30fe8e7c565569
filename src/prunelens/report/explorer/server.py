"""The explorer's folder at an address of this machine alone.

What is shown is the user's own study, so the server answers nobody else: it listens on loopback, to
requests that name this address (a page of another site whose name is made to lead here does not),
and tells browsers to give what it serves to no other page.
"""

from __future__ import annotations

import errno
import http.server
import logging
import pathlib
import re
import socketserver
import sys
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from prunelens.errors import UserError
from prunelens.report.explorer.folder import CONTENT_SECURITY_POLICY, front_files, is_data, script
from prunelens.study.artifacts.links import is_plain

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LARGEST_PORT = 65_535
HTTP_PORT = 80  # browsers leave it out
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
HEADERS = {
    # A page cannot say by itself who may frame it.
    "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
DATA = re.compile(r"/data/([a-z0-9-]{1,32}(?:/[a-z0-9-]{1,32}){0,2})\.js", re.ASCII)
LABEL = re.compile(r"/labels/(v\d+)/(\d{1,9})\.js", re.ASCII)

Labels = Callable[[str, int], str | None]


def serve_explorer(
    folder: pathlib.Path, *, port: int = 0, labels: Labels | None = None
) -> ExplorerServer:
    """A server of an explorer's folder on 127.0.0.1, listening; `serve_forever` answers.

    Args:
        folder: what `write_explorer` wrote.
        port: 0 takes a free one.
        labels: view and latent -> label, for `labels/<view>/<latent>.js`; None: there are none.
    Raises: UserError where the port is not free or may not be used.
    """
    if not 0 <= port <= LARGEST_PORT:
        raise UserError(f"--port: {port} is outside 0 to {LARGEST_PORT}; leave it out")
    try:
        return ExplorerServer(folder, port, labels)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"--port: {port} cannot be used ({error.strerror}); choose another or leave it out"
        ) from None


class ExplorerServer(http.server.ThreadingHTTPServer):
    """Answers GET and HEAD for the files of one folder."""

    def __init__(self, folder: pathlib.Path, port: int, labels: Labels | None) -> None:
        self.folder, self.labels = folder, labels
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """How a browser on this machine names the server."""
        names = {HOST, "localhost"}
        with_port = {f"{name}:{self.server_port}" for name in names}
        return with_port | names if self.server_port == HTTP_PORT else with_port

    def server_bind(self) -> None:
        """As the base class, without looking the host's name up in the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    server: ExplorerServer
    protocol_version = default_request_version = "HTTP/1.1"  # else some refusals had no headers
    server_version, sys_version = "prunelens", ""
    timeout = 60.0  # of a connection on which nothing is asked

    def do_GET(self) -> None:
        """A file of the folder, or a label."""
        if not self._is_for_us():
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif not self._is_from_us():
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.server.labels and (asked := LABEL.fullmatch(self.path)):
            self._send_label(asked[1], int(asked[2]))
        elif (found := self._file()) is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            name, content = found
            suffix = pathlib.PurePosixPath(name).suffix
            self._send(content, MEDIA_TYPES.get(suffix, "application/octet-stream"))

    do_HEAD = do_GET  # noqa: N815

    def _method_not_allowed(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _method_not_allowed  # noqa: N815

    def _is_for_us(self) -> bool:
        named = self.headers.get_all("Host", [])
        return len(named) == 1 and named[0] in self.server.hosts

    def _is_from_us(self) -> bool:
        """A page of ours or the user asks, not a page of another site (where browsers say so)."""
        came_from = self.headers.get("Sec-Fetch-Site", "none")
        return came_from in ("none", "same-origin") or (
            self.headers.get("Sec-Fetch-Mode") == "navigate"  # a link to the page
            and self.headers.get("Sec-Fetch-Dest") == "document"
        )

    def _file(self) -> tuple[str, bytes] | None:
        """Name and content of the file that is asked for; None where there is none.

        The page is the installed one, whatever the folder holds: that may have come from someone
        else, and so may its data.
        """
        asked = urllib.parse.unquote(self.path.partition("?")[0])
        name = "index.html" if asked == "/" else asked.removeprefix("/")
        if asked.startswith("/") and name in front_files():
            return name, front_files()[name]
        if not (data := DATA.fullmatch(asked)) or not is_plain(self.server.folder, name):
            return None
        content = (self.server.folder / name).read_bytes()
        return (name, content) if is_data(data[1], content) else None

    def _send_label(self, view: str, latent: int) -> None:
        assert self.server.labels
        name, text = f"labels/{view}/{latent}", self.server.labels(view, latent)
        self._send(script(name, {"text": text}).encode("ascii"), MEDIA_TYPES[".js"])

    def _refuse(self, status: HTTPStatus, **headers: str) -> None:
        self.close_connection = True  # a body that is not read would be taken for a request
        text = f"{status.value} {status.phrase}\n"
        self._send(text.encode(), MEDIA_TYPES[".txt"], status, Connection="close", **headers)

    def _send(
        self, body: bytes, media_type: str, status: HTTPStatus = HTTPStatus.OK, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        """The safety headers go with every answer, the base class's refusals included."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the terminal has the address and nothing else."""
        log.debug(format, *args)
