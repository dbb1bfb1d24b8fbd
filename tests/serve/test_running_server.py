from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray.serve

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import EngineError
from rayllm.serve.running_server import RunningServer, failure_reason, server_url

ENGINE = EngineConfig()
SERVER = ServerConfig()


def test_the_cause_is_found_in_a_remote_traceback() -> None:
    message = (
        "The deployment failed to start 1 times in a row.\nTraceback (most recent call last):\n"
        '  File "replica.py", line 1, in initialize\n    raise Error: not this\n'
        "rayllm.errors.ConfigError: engine 'x' asks for at least 2 GPUs\n\nSee logs."
    )
    assert failure_reason(message) == "engine 'x' asks for at least 2 GPUs"
    assert (
        failure_reason("Traceback:\n  x = 1\nRuntimeError: CUDA out of memory\n") == "RuntimeError: CUDA out of memory"
    )
    assert failure_reason("") == "the engine could not start"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("::", "http://[::1]:8123"),
        ("::1", "http://[::1]:8123"),
        ("10.0.0.5", "http://10.0.0.5:8123"),
    ],
)
def test_a_client_on_this_machine_gets_an_address_that_it_can_reach(host: str, url: str) -> None:
    assert server_url(ServerConfig.parse({"host": host, "port": 8123, "api_key": "k"})) == url


class _Unready(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"error": {"message": "not healthy"}, "stage": "loading weights"}).encode()
        self.send_response(503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_health_names_the_stage_of_a_server_that_is_not_ready() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Unready) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running = RunningServer(ENGINE, SERVER, f"http://127.0.0.1:{server.server_address[1]}", False)
        assert running.health() == (False, "loading weights")
        server.shutdown()
        thread.join()
    ready, stage = running.health()
    assert not ready
    assert stage.startswith("not reachable")


def test_an_engine_that_gave_up_is_told_from_one_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [None, TimeoutError("no replica"), "rank 1 keeps failing"]

    class Handle:
        @property
        def failure(self) -> Handle:
            return self

        def remote(self) -> Handle:
            return self

        def result(self, timeout_s: float) -> str | None:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return None if answer is None else str(answer)

    monkeypatch.setattr(ray.serve, "get_deployment_handle", lambda deployment, app: Handle())
    raise_if_failed = RunningServer(ENGINE, SERVER, "http://nowhere", False).engine_watch()
    raise_if_failed()
    raise_if_failed()
    with pytest.raises(EngineError, match="rank 1 keeps failing"):
        raise_if_failed()
