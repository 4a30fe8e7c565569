"""The explorer's server: this machine alone, this folder alone, and labels only where asked for."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from http import HTTPStatus

import pytest

from prunelens.errors import UserError
from prunelens.report.explorer.folder import CONTENT_SECURITY_POLICY, FRONT, POLICY_PLACE
from prunelens.report.explorer.labels import ADDRESS, NeuronpediaLabels, first_label
from prunelens.report.explorer.server import HEADERS, serve_explorer

HOSTILE = "</script><script>alert(1)</script>\u2028\"'); alert(2); //"


@pytest.fixture
def folder(tmp_path):
    """A folder to serve, with something beside it that must stay unseen."""
    served = tmp_path / "explorer"
    (served / "data" / "v0").mkdir(parents=True)
    (served / "index.html").write_text("<!doctype html>secret")
    (served / "data" / "study.js").write_text('prunelens.receive("study",{});\n')
    (served / "data" / "v0" / "latents.js").write_text('prunelens.receive("v0/latents",[1]);\n')
    (served / "planted.js").write_text("secret\n")
    (served / ".hidden").write_text("no\n")
    secret = tmp_path / "secret.js"
    secret.write_text('prunelens.receive("outside","secret");\n')
    (served / "data" / "outside.js").symlink_to(secret)
    (served / "outside").symlink_to(tmp_path)
    (served / "data" / "inside.js").symlink_to(served / "data" / "study.js")
    return served


@contextlib.contextmanager
def served(folder, **options):
    with serve_explorer(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, target="/", *, method="GET", host=None, headers=(), body=b""):
    """Status, headers and body; over a plain socket, so that nothing is tidied up on the way."""
    host = [f"127.0.0.1:{server.server_port}"] if host is None else host
    lines = [f"{method} {target} HTTP/1.1", *(f"Host: {name}" for name in host), *headers]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", server.server_port))
        connection.sendall("\r\n".join(lines).encode() + body)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    head, _, found = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    return int(status.split()[1]), dict(field.split(": ", 1) for field in fields), found


def test_the_installed_page_is_served_with_the_data_of_the_folder(folder):
    page = (FRONT / "index.html").read_text().replace(POLICY_PLACE, CONTENT_SECURITY_POLICY)
    with served(folder) as server:
        for target, content in (
            ("/", page.encode()),
            ("/index.html", page.encode()),
            ("/app.js", (FRONT / "app.js").read_bytes()),
            ("/data/study.js?1", (folder / "data/study.js").read_bytes()),
            ("/data/v0/latents.js", (folder / "data/v0/latents.js").read_bytes()),
        ):
            status, headers, body = ask(server, target)
            assert status == 200
            assert body == content
            assert int(headers["Content-Length"]) == len(body)
            assert HEADERS.items() <= headers.items()
            assert "utf-8" in headers["Content-Type"]
            status, alike, body = ask(server, target, method="HEAD")
            assert (status, alike | {"Date": headers["Date"]}, body) == (200, headers, b"")


def test_the_policy_lets_nothing_in_from_elsewhere(folder):
    with served(folder) as server:
        policy = ask(server)[1]["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "target",
    [
        "/../secret.js", "/%2e%2e/secret.js", "/..%2fsecret.js", "/data/../../secret.js",
        "/data/%2e%2e/%2e%2e/secret.js", "/..\\secret.js", "/..%5csecret.js", "//secret.js",
        "/data/outside.js", "/outside/secret.js", "/outside/explorer/index.html", "/planted.js",
        "/data/inside.js", "/.hidden", "/data", "/data/", "/data/.", "/nothing.js", "/%00",
        "/index.html%00.js", "/index.html/", "/labels/v0/1.js", "secret.js", "*",
        "http://127.0.0.1/index.html", f"/data/{'x' * 300}.js", f"/{'x/' * 5000}x.js",
    ],
)  # fmt: skip
def test_nothing_else_is_served(folder, target):
    with served(folder) as server:
        status, headers, body = ask(server, target)
    assert status == 404
    assert b"secret" not in body
    assert HEADERS.items() <= headers.items()


@pytest.mark.parametrize(
    "content",
    [
        'prunelens.receive("study",alert(1));\n',
        'prunelens.receive("study",{});alert(1);\n',
        'prunelens.receive("other",{});\n',
        'prunelens.receive("study",{});',
        'prunelens.receive("study",{"a',
        'prunelens.receive("study","\u2028");\n',
        f'prunelens.receive("study",{"[" * 100_000});\n',
        "alert(1)",
        "",
    ],
)
def test_a_script_in_the_place_of_data_is_not_served(folder, content):
    """The page's policy would run it: it comes from the page's own address."""
    (folder / "data" / "study.js").write_text(content, encoding="utf-8")
    with served(folder) as server:
        assert ask(server, "/data/study.js")[0] == 404


@pytest.mark.parametrize("version", [" HTTP/9.9", " HTTP/x", " HTTP/1.1.1", " FTP/1.1", ""])
def test_a_malformed_request_is_answered_with_the_policy_too(folder, version):
    with served(folder) as server, socket.socket() as connection:
        connection.connect(("127.0.0.1", server.server_port))
        connection.sendall(f"GET /{version}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    for name, value in HEADERS.items():
        assert f"{name}: {value}\r\n".encode() in answer


def test_a_name_of_another_site_is_refused(folder):
    with served(folder) as server:
        port = server.server_port
        assert ask(server, host=[f"localhost:{port}"])[0] == 200
        for host in (
            [f"evil.example:{port}"], ["127.0.0.1"], [f"127.0.0.1:{port + 1}"], [], [""],
            [f"127.0.0.1:{port}", "evil.example"], [f"127.0.0.1:{port}.evil.example"],
        ):  # fmt: skip
            status, _, body = ask(server, host=host)
            assert status == 421
            assert b"page" not in body


def test_browsers_leave_port_80_out(folder):
    with serve_explorer(folder) as server:
        assert "127.0.0.1" not in server.hosts
        server.server_port = 80
        assert {"127.0.0.1", "localhost", "127.0.0.1:80"} <= server.hosts


def test_pages_of_other_sites_may_link_but_not_load(folder):
    def from_elsewhere(mode, destination):
        return [
            "Sec-Fetch-Site: cross-site",
            f"Sec-Fetch-Mode: {mode}",
            f"Sec-Fetch-Dest: {destination}",
        ]

    with served(folder) as server:
        assert ask(server, headers=from_elsewhere("navigate", "document"))[0] == 200
        assert ask(server, headers=["Sec-Fetch-Site: same-origin"])[0] == 200
        script = from_elsewhere("no-cors", "script")
        assert ask(server, "/data/study.js", headers=script)[0] == 403
        assert ask(server, headers=from_elsewhere("navigate", "iframe"))[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "XYZ"])
def test_only_reading_is_allowed(folder, method):
    with served(folder) as server:
        status, headers, _ = ask(server, method=method, body=b"GET /index.html HTTP/1.1\r\n\r\n")
    assert status in (405, 501)
    assert headers["Connection"] == "close"
    assert HEADERS.items() <= headers.items()


def test_it_listens_on_loopback_alone_and_without_looking_a_name_up(folder, monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("a name was looked up"))
    with serve_explorer(folder) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert server.address == f"http://127.0.0.1:{server.server_port}/"


def test_a_port_that_is_taken_or_none_is_told(folder):
    with serve_explorer(folder) as server:
        taken = server.server_port
        with pytest.raises(UserError, match=f"--port: {taken} cannot be used"):
            serve_explorer(folder, port=taken)
    with pytest.raises(UserError, match="--port: 65536 is outside"):
        serve_explorer(folder, port=65_536)


def test_a_label_is_data(folder):
    asked = []
    labels = NeuronpediaLabels(
        {"v1": "m/s"}, fetch=lambda address: (asked.append(address), _said)[1]
    )
    with served(folder, labels=labels) as server:
        for _ in range(2):
            status, headers, body = ask(server, "/labels/v1/7.js")
            assert status == 200
            assert headers["Content-Type"].startswith("text/javascript")
            name, data = _received(body)
            assert (name, data) == ("labels/v1/7", {"text": HOSTILE})
            assert b"<" not in body
            assert body.isascii()
        assert _received(ask(server, "/labels/v0/7.js")[2]) == ("labels/v0/7", {"text": None})
        for target in ("/labels/v1/7", "/labels/v1/x.js", "/labels/../7.js", "/labels/v1/7.js/x"):
            assert ask(server, target)[0] == 404
    assert asked == [f"{ADDRESS}m/s/7"]  # once: it is remembered; and not for a view without a name


_said = json.dumps({"explanations": [{"description": HOSTILE}]}).encode()


def _received(body):
    text = body.decode("ascii")
    assert text.startswith("prunelens.receive(")
    assert text.endswith(");\n")
    return tuple(json.loads(f"[{text[len('prunelens.receive(') : -len(');_')]}]"))


@pytest.mark.parametrize(
    ("failure", "times"),
    [
        (urllib.error.URLError("no route"), 2),
        (TimeoutError(), 2),
        (urllib.error.HTTPError("u", 429, "too many", None, None), 2),
        (urllib.error.HTTPError("u", 404, "none", None, None), 1),  # there is none: remembered
    ],
)
def test_without_a_connection_there_is_no_label_and_no_error(failure, times):
    asked = []

    def fetch(address):
        asked.append(address)
        raise failure

    labels = NeuronpediaLabels({"v0": "m/s"}, fetch=fetch)
    assert [labels("v0", 3), labels("v0", 3)] == [None, None]
    assert len(asked) == times


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ({"explanations": [{"description": "  "}, {"description": " dogs \n"}]}, "dogs"),
        ({"explanations": []}, None),
        ({"explanations": None}, None),
        ({"explanations": [None, 3, {"description": 4}]}, None),
        ([], None),
        (None, None),
        ({"explanations": [{"description": "x" * 9_999}]}, "x" * 500),
    ],
)
def test_whatever_is_answered_there_is_a_label_or_none(answer, label):
    assert first_label(json.dumps(answer).encode()) == label
    assert first_label(b"<html>") is None
    assert first_label(b"\xff\xfe") is None


def test_without_labels_no_connection_is_tried(folder, monkeypatch):
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, lambda *_, **__: pytest.fail("a connection was tried"))
    with served(folder) as server:
        assert ask(server)[0] == 200
        assert ask(server, "/labels/v0/1.js")[0] == 404


def test_a_redirection_is_not_followed(folder, monkeypatch):
    from prunelens.report.explorer import labels

    def answer(self):
        if self.path.startswith("/there"):
            self._send(_said, "application/json")
        else:
            self._send(b"", "text/plain", HTTPStatus.FOUND, Location=f"{self.server.address}there")

    with served(folder) as server:
        monkeypatch.setattr(labels, "ADDRESS", server.address)
        monkeypatch.setattr(server.RequestHandlerClass, "do_GET", answer)
        assert NeuronpediaLabels({"v0": "there?"})("v0", 1) == HOSTILE[:500]
        assert NeuronpediaLabels({"v0": "m/s"})("v0", 1) is None
