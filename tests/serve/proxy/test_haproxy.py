from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from badinput.wire import exchange
from serve.served import Served

from rayllm.config import ServerConfig
from rayllm.errors import ConfigError
from rayllm.executor.ray_cluster import free_port
from rayllm.serve.proxy import haproxy
from rayllm.serve.proxy.haproxy import haproxy_binary, proxy_environment

needs_haproxy = pytest.mark.skipif(haproxy_binary() is None, reason="Ray brings HAProxy on Linux alone")
SERVER = ServerConfig(http_proxy="haproxy")


@pytest.fixture(scope="module")
def serves_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Serve itself writes for one application with one replica."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    folder = tmp_path_factory.mktemp("serve")
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        is_head=True,
        has_received_routes=True,
        bufsize=48 * 1024,
    )
    api = HAProxyApi(cfg=config, config_file_path=str(folder / "haproxy.cfg"))
    replica = ServerConfig(name="replica", host="127.0.0.1", port=30000)
    backend = BackendConfig(name="http-app", path_prefix="/", app_name="app", servers=[replica])
    api.set_backend_configs({"http-app": backend})
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@needs_haproxy
def test_haproxy_takes_serves_configuration_as_it_has_recovered(serves_config: str, tmp_path: Path) -> None:
    command = proxy_environment(SERVER, str(tmp_path))["RAY_SERVE_HAPROXY_BINARY_PATH"]
    path = tmp_path / "haproxy.cfg"
    path.write_text(serves_config)
    checked = subprocess.run([command, "-c", "-dR", "-f", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    config = path.read_text()
    assert re.findall(r"bind (\S+)", serves_config) != ["127.0.0.1:8000"]
    assert re.findall(r"bind (\S+)", config) == ["127.0.0.1:8000"]
    assert "use_backend http-app" in config
    assert "server replica 127.0.0.1:30000" in config
    assert "500.http" not in {Path(line.split()[-1]).parent.name for line in config.splitlines() if "errorfile" in line}


@needs_haproxy
def test_serves_own_paths_are_closed_and_ids_of_any_length_dropped(serves_config: str) -> None:
    config = haproxy.haproxy_config.adjusted(serves_config, "/pages")
    frontend = config.partition("frontend http_frontend")[2].partition("\nbackend ")[0]
    assert [line.split()[3] for line in frontend.splitlines() if "http-request return" in line] == ["405", "404", "404"]
    assert "http-request del-header x-request-id unless" in frontend
    assert "status 400" in config.partition("backend default_backend")[2]
    assert "errorfile 400 /dev/null" in config.partition("backend http-app")[2]  # whoever closes one half hears nothing
    frontend = "frontend http_frontend\n    bind x:1\n    # static use_backend selection below\n"
    without_app = f"{frontend}backend default_backend\n    http-request return status 404\n"
    assert "status 503" in haproxy.haproxy_config.adjusted(without_app, "/pages")
    assert "status 503" not in config


@needs_haproxy
def test_what_haproxy_says_by_itself_is_in_the_envelope(tmp_path: Path) -> None:
    proxy_environment(SERVER, str(tmp_path))
    pages = {int(path.stem): path.read_bytes() for path in (tmp_path / "haproxy").glob("*.http")}
    assert set(pages) == {*haproxy.haproxy_config.PAGES, 431}
    for status, page in pages.items():
        head, _, body = page.partition(b"\r\n\r\n")
        answered = int(head.split()[1])
        assert answered == (status if status < 500 else 503)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert f"Content-Length: {len(body)}".encode() in head
        assert (b"Retry-After" in head) == (answered == 503)


class _Ingress(http.server.BaseHTTPRequestHandler):
    """Says which request it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.command} {self.path}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_OPTIONS = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def _running(serves_config: str, folder: Path, replica_port: int | None) -> Iterator[int]:
    """HAProxy by itself, with Serve's configuration as it is mended; its port. None: Serve knows no replica (yet)."""
    environment = proxy_environment(SERVER, str(folder))
    port = free_port()
    config = serves_config.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    config = re.sub(r"stats socket \S+", f"stats socket {folder}/admin.sock", config)
    config = config.replace("127.0.0.1:30000 check", f"127.0.0.1:{replica_port}")
    if replica_port is None:
        of_app = r"^ +(use_backend|acl is_|acl backend_|http-request set-var).*$"
        config = re.sub(of_app, "", config, flags=re.MULTILINE)
        config = re.sub(r"^ +http-request return.*if healthcheck backend_.*$", "", config, flags=re.MULTILINE)
        config = config.partition("\nbackend http-app")[0] + "\n"
    path = folder / "haproxy.cfg"
    path.write_text(config)
    process = subprocess.Popen(
        [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(path)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def _get(*headers: str, line: str = "GET /x HTTP/1.1") -> bytes:
    return "\r\n".join([line, "Host: here", *headers, "", ""]).encode("latin-1")


MALFORMED = [
    _get("Bad Header"),
    _get("Bad : x"),
    _get(": x"),
    _get("B\xe4d: x"),
    _get("X: a\0b"),
    _get("X: a\rb"),
    _get("Host: there"),
    _get("Content-Length: abc"),
    _get("Content-Length: -5"),
    _get("Content-Length: "),
    _get("Content-Length: 5", "Content-Length: 6"),
    _get("Content-Length: " + "9" * 30),
    _get("Transfer-Encoding: gzip"),
    _get("Transfer-Encoding: gzip, chunked"),
    _get("Transfer-Encoding: chunked, gzip"),
    _get("Transfer-Encoding: xchunked"),
    _get("Upgrade: websocket", "Connection: upgrade"),
    _get(line="GET /\0 HTTP/1.1"),
    _get(line="GET /\xe4 HTTP/1.1"),
    _get(line="GET /x"),
    _get(line="GET /x http/1.1"),
    _get(line="GET /x HTTP/2.0"),
    _get(line="G{T /x HTTP/1.1"),
    _get(line="GET http://there/x HTTP/1.1"),
    b"GET / HTTP/1.1\r\nHost: x/health?\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 300,
    b"\0\xff\xfe\n\n",
]
TOO_LONG = [_get("X: " + "a" * 60_000), _get("X: " + "a" * 10**6), _get(line=f"GET /{'a' * 60_000} HTTP/1.1")]
TOO_LONG += [_get(*(f"x{i}: y" for i in range(200)))]
WELL_FORMED = [
    _get(),
    b"\r\n\r\n" + _get(),
    _get().replace(b"\r\n", b"\n"),
    _get("X: a", " folded"),
    _get("X: \xe4\x01"),
    _get("X: " + "a" * 40_000),
    _get("Content-Length: 0", "Content-Length: 0"),
    _get("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    _get(line="GET http://here/x HTTP/1.1"),
    _get(line="GET http://here:80/x HTTP/1.1"),
    _get(line="GET /x HTTP/1.0"),
    b"GET /x HTTP/1.1\r\n\r\n",
    _get(*(f"x{i}: y" for i in range(90))),
]


@needs_haproxy
def test_haproxy_refuses_what_it_cannot_parse_in_the_envelope(serves_config: str, tmp_path: Path) -> None:
    ingress = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ingress)
    thread = threading.Thread(target=ingress.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with _running(serves_config, tmp_path, ingress.server_address[1]) as port:
            for statuses, requests in ((400, MALFORMED), (431, TOO_LONG)):
                for data in requests:
                    answers = exchange(("127.0.0.1", port), data, timeout_s=20).answers
                    assert [answer.status for answer in answers] == [statuses], data[:80]
                    assert set(json.loads(answers[0].body)["error"]) == {"message", "type", "param", "code"}
            for data in WELL_FORMED:
                answers = exchange(("127.0.0.1", port), data, timeout_s=20).answers
                assert [(answer.status, answer.body[-2:]) for answer in answers] == [(200, b"/x")], data[:80]
            for method in ("FOO", "get", "MKCALENDAR", "X-Y"):
                [answer] = exchange(("127.0.0.1", port), _get(line=f"{method} /x HTTP/1.1"), timeout_s=20).answers
                assert answer.status == 405
                assert json.loads(answer.body)["error"]["code"] == "method_not_allowed"
            slowly = _get("X: y")
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                for i in range(0, len(slowly), 5):
                    connection.sendall(slowly[i : i + 5])
                    time.sleep(0.01)
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        ingress.shutdown()
        thread.join()
        ingress.server_close()


@needs_haproxy
def test_haproxy_that_knows_no_ingress_says_503_to_every_good_request(serves_config: str, tmp_path: Path) -> None:
    with _running(serves_config, tmp_path, None) as port:
        for line in ("GET /health HTTP/1.1", "POST /v1/completions HTTP/1.1", "GET / HTTP/1.1"):
            [answer] = exchange(("127.0.0.1", port), _get("Content-Length: 0", line=line), timeout_s=20).answers
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert json.loads(answer.body)["error"]["code"] == "not_ready"


def test_a_proxy_in_python_needs_nothing(tmp_path: Path) -> None:
    python = ServerConfig(http_proxy="python")
    assert proxy_environment(python, str(tmp_path)) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


def test_haproxy_by_name_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.setattr(haproxy, "haproxy_binary", lambda: None)
    with pytest.raises(ConfigError, match="--http-proxy python"):
        proxy_environment(SERVER, str(tmp_path))
    assert proxy_environment(ServerConfig(), str(tmp_path)) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


async def test_the_request_id_is_not_sent_twice_behind_serve() -> None:
    async with Served(sends_request_id=False).client() as client:
        assert "x-request-id" not in (await client.get("/health")).headers
