import contextlib
import http.server
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from rayllm.executor.ray_cluster import free_port
from rayllm.serve.proxy.early_port import EarlyPort


class _Late(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"late")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def early(port: int) -> Iterator[EarlyPort]:
    opened = EarlyPort.open("127.0.0.1", port)
    assert opened is not None
    yield opened
    opened.close()


@contextlib.contextmanager
def second_listener(port: int) -> Iterator[None]:
    """Another listener on the same port, as Serve's proxy is one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Late, bind_and_activate=False)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.server_bind()
    server.server_activate()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def late(early: EarlyPort, port: int) -> Iterator[None]:
    with second_listener(port):
        yield


def ask(port: int, path: str = "/health", body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("body", [None, b"{}"])
def test_every_path_says_503_and_the_stage(early: EarlyPort, port: int, body: bytes | None) -> None:
    early.stage = "starting Ray"
    status, content = ask(port, "/v1/chat/completions", body)
    answer = json.loads(content)
    assert (status, answer["stage"], answer["error"]["code"]) == (503, "starting Ray", "not_ready")


def test_a_browser_gets_a_page_that_asks_again(early: EarlyPort, port: int) -> None:
    early.stage = "loading <weights>"
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/", headers=browser), timeout=5)
    with refused.value as answer:
        page = answer.read().decode()
    assert (answer.code, answer.headers["content-type"]) == (503, "text/html; charset=utf-8")
    assert answer.headers["refresh"] == "1"
    assert "loading &lt;weights&gt; ..." in page


def test_nobody_reaches_the_second_listener_before_the_handover(early: EarlyPort, late: None, port: int) -> None:
    assert {ask(port)[0] for _ in range(20)} == {503}


def test_the_handover_refuses_no_connection(early: EarlyPort, late: None, port: int) -> None:
    answers: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(ask(port)[0])

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    early.hand_over()
    deadline = time.monotonic() + 20
    while 200 not in answers and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {200, 503}
    assert {ask(port)[0] for _ in range(20)} == {200}


def test_while_the_second_listener_is_gone_every_request_is_a_503(early: EarlyPort, port: int) -> None:
    for _ in range(3):
        with second_listener(port):
            early.hand_over()
            assert {ask(port)[0] for _ in range(10)} == {200}
        status, content = ask(port, "/v1/completions", b"{}" * 10_000)
        assert (status, json.loads(content)["stage"]) == (503, "restarting the proxy")
        assert {ask(port)[0] for _ in range(10)} == {503}


def test_a_port_that_another_has_taken_stays_theirs(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        assert EarlyPort.open("127.0.0.1", port) is None
