"""A hub on 127.0.0.1 that speaks what `huggingface_hub` needs to upload and to download.

Written from the requests that the client sends: repositories are folders of bytes in memory, one
token may write, every file is stored as sent (no Git LFS, no Xet).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

import huggingface_hub
import pytest

TOKEN = "hf_of_the_test"
USER = "me"  # whose repositories the token may write


@dataclasses.dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclasses.dataclass
class FakeHub:
    address: str
    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    failure: int | None = None
    """The status of every answer, where it is to fail."""
    failures: list[int] = dataclasses.field(default_factory=list)
    """Of the next answers to GET and HEAD, one after the other; 0: the connection breaks."""
    broken_file: str | None = None
    """The file that cannot be fetched: its connection breaks half-way."""
    sent: list[str] = dataclasses.field(default_factory=list)
    """The files whose content was sent, in full."""


@contextlib.contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: object) -> Iterator[FakeHub]:
    """The client's endpoint, token and cache are the fake's until the block ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(self.path).path
        if self.hub.failure:
            self._answer(self.hub.failure, {"error": "out of order"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            _, _, _, user, name, what, _revision = path.split("/")
            self._change(f"{user}/{name}", what, body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self.hub.failure:
            self._answer(self.hub.failure, {"error": "out of order"})
        elif self.hub.failures:
            self._fail(self.hub.failures.pop(0))
        elif path.startswith("/api/models/"):
            user, name, *rest = path.removeprefix("/api/models/").split("/")
            self._tell(f"{user}/{name}", rest)
        else:
            user, name, _resolve, _revision, file = path[1:].split("/", 4)
            self._send(f"{user}/{name}", file)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != USER:
            self._answer(403, {"error": "You don't have the rights"})
        elif name in self.hub.repositories:
            told = {"error": "You already created this model repo"}
            self._answer(409, {**told, "url": f"{self.hub.address}/{name}"})
        else:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.repositories[name] = Repository(private)
            self._answer(200, {"url": f"{self.hub.address}/{name}"})

    def _change(self, name: str, what: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        if what == "preupload":
            told = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": told})
            return
        assert what == "commit", what
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "header":
                repository.messages.append(line["value"]["summary"])
            else:
                assert line["key"] == "file", line["key"]
                content = base64.b64decode(line["value"]["content"])
                repository.files[line["value"]["path"]] = content
        address = f"{self.hub.address}/{name}/commit/{repository.commit}"
        self._answer(200, {"commitUrl": address, "commitOid": repository.commit})

    def _tell(self, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in repository.files.items()
            ]
            self._answer(200, listed)
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            told = {"id": name, "sha": repository.commit, "private": repository.private}
            self._answer(200, {**told, "siblings": siblings})

    def _send(self, name: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif file not in repository.files:
            commit = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}
            self._answer(404, {"error": "Entry not found"}, commit)
        else:
            content = repository.files[file]
            headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit}
            if self.command == "GET" and file == self.hub.broken_file:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self._fail(0)
                return
            self._answer(200, content, headers)
            if self.command == "GET":
                self.hub.sent.append(file)

    def _fail(self, status: int) -> None:
        """Answer with that status, or break the connection off."""
        if status:
            self._answer(status, {"error": "out of order"})
        else:
            self.close_connection = True

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
