"""Bad requests, by the catalogue, against one running server: each is answered as its case says, and nothing else of
the server notices: the same processes, no KV block kept, the same answer to a good request.

`pytest -m slow tests/badinput` adds the cases that take a minute or 200 MB, and a second round against a server that
runs with PYTHONOPTIMIZE=1, where an `assert` checks nothing, and behind Serve's own proxy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from badinput.catalogue import ABSENT, CASES, Variables, request_bytes
from badinput.field_types import BASES, some_bodies
from badinput.folders import touching_pickle
from badinput.large_bodies import LARGE_BODIES, naming
from badinput.waiting import NOT_BEHIND, WAITING
from badinput.wire import Answer, Exchange, exchange, parse
from served_process import ServedProcess, running_serve

import rayllm
from rayllm.serve.proxy.haproxy import haproxy_binary

pytestmark = [
    pytest.mark.skipif(not CASES, reason=ABSENT),
    pytest.mark.cluster,
    pytest.mark.timeout(300),
]

REQUEST_CASES = [case for case in CASES if case["kind"] != "file" and case["id"] not in WAITING]
_KEY = "the-right-key"
_MAX_MODEL_LEN, _NUM_KV_BLOCKS = 512, 256
_READY_TIMEOUT_S = 150
_ALLOWANCE_S = 10
"""Added to every time limit: machines that run tests are busy. A hang is still one."""
_MAX_ERROR_BYTES = 64 * 1024
_MAX_GROWTH_MB = 512
"""Of all processes, by one large body: its bytes at HAProxy and at the ingress, and what they are parsed to."""
_INSIDES = re.compile(
    r"Traceback \(most recent|  File \"| at 0x[0-9a-f]{6}|site-packages|/rl-|"
    + "|".join(re.escape(str(path)) for path in (sys.prefix, Path(rayllm.__file__).parent, Path.home() / "."))
)
_NOT_OURS = re.compile(r"Invalid HTTP request received\.|<html><body><h1>4\d\d [^/]*</h1>\n[^/]*\n</body></html>\n|")
"""What Serve's proxy and HAProxy say to bytes that are no HTTP, and the former to a WebSocket: nobody else may write
it."""


@dataclass
class Served:
    """The server of this module and what it looked like before the first bad request."""

    server: ServedProcess
    proxy: str
    variables: Variables
    listener: socket.socket
    good_answer: str = ""

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"model": self.variables.model, "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
        return self.server.client.post("/v1/completions", json={**body, **fields})

    def text(self, **fields: Any) -> str:
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def kv_usage(self) -> float:
        return self.server.metric("vllm:kv_cache_usage_perc")

    def rss_mb(self) -> float:
        pages = 0
        for process in self.server.processes:
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def was_contacted(self) -> bool:
        """Whether anything connected to the address that no request may make the server fetch."""
        with contextlib.suppress(BlockingIOError):
            self.listener.accept()[0].close()
            return True
        return False

    def logs(self) -> str:
        """All that was logged: by the command, and by the engine's processes into Ray's folder."""
        found = [self.server.output, self.server.errors, *self.server.output.parent.glob("*.log")]
        for process in self.server.processes:
            with contextlib.suppress(OSError):
                links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
                found += [Path(link) for link in links if link.startswith("/tmp/rl-") and Path(link).is_file()]
        return "\n".join(path.read_text(errors="replace") for path in set(found))

    def check_unharmed(self) -> None:
        """The same processes, all KV blocks back, the same answer to a good request."""
        assert self.server.is_unharmed(), "a process of the server has died"
        assert self.text() == self.good_answer
        deadline = time.monotonic() + 1 + _ALLOWANCE_S
        while (used := self.kv_usage()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert used == 0
        assert not Path(self.variables.marker).exists(), "code of a request has run"


@pytest.fixture(scope="module", params=["plain", pytest.param("optimized", marks=pytest.mark.slow)])
def served(
    request: pytest.FixtureRequest, llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    optimized = {"PYTHONOPTIMIZE": "1"} if request.param == "optimized" else {}
    proxy = "python" if optimized or haproxy_binary() is None else "haproxy"
    flags = ["--http-proxy", proxy, "--max-model-len", str(_MAX_MODEL_LEN), "--num-kv-blocks", str(_NUM_KV_BLOCKS)]
    config = json.loads((llama_path / "config.json").read_text())
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running_serve(str(llama_path), *flags, env=optimized, api_key=_KEY) as server,
    ):
        listener.setblocking(False)
        variables = Variables(
            host=f"127.0.0.1:{server.port}",
            key=_KEY,
            model=llama_path.name,
            vocab_size=config["vocab_size"],
            max_model_len=_MAX_MODEL_LEN,
            canary_url=f"http://127.0.0.1:{listener.getsockname()[1]}/",
            marker=str(tmp_path_factory.mktemp("served") / "marker"),
        )
        assert len(server.processes) >= 4  # controller, proxy, two replicas, driver, worker
        found = Served(server, proxy, variables, listener)
        found.good_answer = found.text()
        yield found


# ------------------------------------------------------------------------------------------------- one request each


def _marked(case: dict[str, Any]) -> Any:
    slow = {"slow", "heavy"}.intersection(case.get("tags", ()))
    return pytest.param(case, id=case["id"], marks=[pytest.mark.slow if slow else pytest.mark.catalogue])


@pytest.mark.parametrize("case", [_marked(case) for case in REQUEST_CASES])
def test_a_bad_request_is_answered_as_the_catalogue_says_and_harms_nothing(
    case: dict[str, Any], served: Served
) -> None:
    if case["id"] in NOT_BEHIND[served.proxy]:
        pytest.skip(f"{served.proxy}: {NOT_BEHIND[served.proxy][case['id']]}")
    expected, request = case["expected"], case["request"]
    rss_mb = served.rss_mb()
    if "special" in request:
        SEQUENCES[request["special"]](served, request)
    else:
        _check_answers(_send(served, request, expected), request, expected)
    for check in (check for check in expected.get("checks", ()) if check.startswith("rss_delta_mb<=")):
        assert served.rss_mb() - rss_mb <= int(check.partition("=")[2])
    if "forbid_log_line" in expected:
        assert not re.search(expected["forbid_log_line"], served.logs(), re.MULTILINE)
    assert not served.was_contacted()
    served.check_unharmed()


@pytest.mark.catalogue
@pytest.mark.parametrize("name", LARGE_BODIES)
def test_a_large_body_is_refused_and_harms_nothing(name: str, served: Served) -> None:
    """In process, tests/serve/test_large_bodies.py also watches the event loop."""
    route, body, status = LARGE_BODIES[name]
    rss_mb = served.rss_mb()
    headers = {"content-type": "application/json"}
    answer = served.server.client.post(route, content=naming(body, served.variables.model), headers=headers)
    _check_error(answer, {status})
    assert served.rss_mb() - rss_mb < _MAX_GROWTH_MB
    served.check_unharmed()


@pytest.mark.catalogue
@pytest.mark.parametrize("route", BASES)
def test_a_value_of_another_type_is_never_the_servers_fault(route: str, served: Served) -> None:
    """Some values at each place; in process, test_field_types.py tries them all."""
    spec = served.server.client.get("/openapi.json").json()
    for body in some_bodies(spec, route, served.variables.model, num_values=2):
        answer = served.server.client.post(route, json=body)
        _check_error(answer, {200, 400, 404, 413, 422}, body)
    served.check_unharmed()


def _check_error(answer: httpx.Response, statuses: set[int], sent: Any = None) -> None:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500], sent)
    assert not _INSIDES.search(answer.text), answer.text[:2000]
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"], sent


def _send(served: Served, request: dict[str, Any], expected: dict[str, Any]) -> Exchange:
    data = request_bytes(request, served.variables)
    options = request.get("wire_opts", {})
    with contextlib.ExitStack() as idle:
        for _ in range(request.get("idle_connections", 0)):
            idle.enter_context(socket.create_connection(served.address, timeout=5))
        return exchange(
            served.address,
            data,
            timeout_s=expected["max_s"] + _ALLOWANCE_S,
            num_answers=options.get("count_responses", 1),
            close=options.get("close"),
        )


def _check_answers(found: Exchange, request: dict[str, Any], expected: dict[str, Any]) -> None:
    if not found.answers:
        assert found.closed, "neither an answer nor the connection's end"
        assert "CLOSE" in expected["status"], "the connection was closed without an answer"
    assert {answer.status for answer in found.answers} <= set(expected["status"]), found.answers[-1].body[:500]
    assert found.num_bytes <= expected.get("max_response_bytes", found.num_bytes)
    # To HTTP/1, HTTP/2's preface is two requests, a wrong one and rubbish: the second may be refused too, or unread.
    is_preface = request.get("wire", [{}])[0].get("text", "").startswith("PRI * HTTP/2.0")
    assert len(found.answers) in (0, request.get("wire_opts", {}).get("count_responses", 1), 1 + is_preface)
    for answer in found.answers:
        _check_answer(answer, expected)


def _check_answer(answer: Answer, expected: dict[str, Any]) -> None:
    body = answer.body.decode("utf-8")
    assert not _INSIDES.search(body), body[:2000]
    if answer.status < 400:
        if "no_nan" in expected.get("checks", ()):
            assert "NaN" not in body
        return
    assert answer.status < 500 or answer.status == 503
    assert len(answer.body) <= _MAX_ERROR_BYTES
    assert expected.get("forbid_body", "\0") not in body
    if answer.status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    if _NOT_OURS.fullmatch(body):
        return
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    if "param" in expected and answer.status in (400, 422):
        assert error["param"] == expected["param"]


# -------------------------------------------------------------------------------------------------------- sequences


def _streaming(served: Served, max_tokens: int) -> bytes:
    body = {
        "model": served.variables.model,
        "prompt": "a",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    return _post(served, body)


def _post(served: Served, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {served.variables.host}\r\nAuthorization: Bearer {_KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data


@contextlib.contextmanager
def _open(served: Served, requests: list[bytes]) -> Iterator[list[socket.socket]]:
    """All requests sent, each on a connection of its own."""
    with contextlib.ExitStack() as connections:
        found = []
        for data in requests:
            found.append(connections.enter_context(socket.create_connection(served.address, timeout=60)))
            found[-1].sendall(data)
        yield found


def _read_all(connection: socket.socket) -> Answer:
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    [answer] = parse(received, ended=True)
    return answer


def _disconnect_storm(served: Served, request: dict[str, Any]) -> None:
    with _open(served, [_streaming(served, 400)] * request["count"]) as connections:
        waiting = set(connections if request["after_tokens"] else ())
        while waiting:  # each is closed as soon as its first token is there
            readable, _, _ = select.select(waiting, [], [], _ALLOWANCE_S)
            assert readable, f"{len(waiting)} streams without a token"
            for connection in readable:
                piece = connection.recv(1 << 16)
                assert piece, "a stream ended without a token"
                if b"data: {" in piece:
                    waiting.discard(connection)
                    connection.close()


def _burst(served: Served, request: dict[str, Any]) -> None:
    body = {"model": served.variables.model, "prompt": "hi", "max_tokens": 4, "temperature": 0}
    with _open(served, [_post(served, body)] * request["count"]) as connections:
        answers = [_read_all(connection) for connection in connections]
    assert {answer.status for answer in answers} <= {200, 429, 503}
    for answer in answers:
        _check_answer(answer, {})
    assert any(answer.status == 200 for answer in answers)


def _kv_pressure(served: Served, request: dict[str, Any]) -> None:
    """Long prompts that together ask for several times the KV pool; some of them are asked alone before."""
    num_requests = 64
    num_tokens = request["factor"] * _NUM_KV_BLOCKS * 16 // num_requests
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompts = [[5 + (i * 7 + j * 3) % 90 for j in range(num_tokens)] for i in range(num_requests)]
    alone = [served.text(prompt=prompt, **fields) for prompt in prompts[:8]]
    bodies = [{"model": served.variables.model, "prompt": prompt, **fields} for prompt in prompts]
    with _open(served, [_post(served, body) for body in bodies]) as connections:
        answers = [_read_all(connection) for connection in connections]
    assert {answer.status for answer in answers} <= {200, 429, 503}
    for answer, text in zip(answers, alone, strict=False):
        assert answer.status != 200 or json.loads(answer.body)["choices"][0]["text"] == text
    assert sum(answer.status == 200 for answer in answers) > num_requests // 2


def _listeners(served: Served, request: dict[str, Any]) -> None:
    assert {address for address, _, _ in served.server.listeners()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def _pickle_spray(served: Served, request: dict[str, Any]) -> None:
    data = touching_pickle(Path(served.variables.marker))
    ports = {port for _, port, _ in served.server.listeners()}
    assert served.address[1] in ports
    for port in ports:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(len(data).to_bytes(4, "little") + data)
            connection.sendall(data)
            connection.settimeout(0.2)
            connection.recv(1 << 16)


def _ray_api(served: Served, request: dict[str, Any]) -> None:
    """Ray's dashboard does not run, and no other port of its processes answers what a dashboard would."""
    for port in {port for _, port, _ in served.server.listeners()} - {served.address[1]}:
        for path in request["paths"]:
            data = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
            with contextlib.suppress(OSError, ValueError, IndexError):
                answers = exchange(("127.0.0.1", port), data, timeout_s=1).answers
                is_metrics = bool(answers) and answers[0].body.startswith(b"# HELP")  # whatever the path
                assert not answers or is_metrics or answers[0].status in (401, 403, 404), (port, path, answers)


SEQUENCES: dict[str, Callable[[Served, dict[str, Any]], None]] = {
    "disconnect_storm": _disconnect_storm,
    "burst": _burst,
    "kv_pressure": _kv_pressure,
    "listeners": _listeners,
    "pickle_spray": _pickle_spray,
    "ray_api": _ray_api,
}
