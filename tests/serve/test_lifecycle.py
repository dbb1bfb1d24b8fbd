import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray.serve

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import ConfigError, EngineError
from rayllm.serve import lifecycle
from rayllm.serve.lifecycle import RunningServer, check_port, failure_reason, joins_serve, num_logical_cpus

ENGINE = EngineConfig()
SERVER = ServerConfig()


def test_a_taken_port_is_refused_with_the_mend() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--port 0"):
        check_port("127.0.0.1", taken.getsockname()[1])


def test_a_port_used_a_moment_ago_is_free_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            accepted.close()  # this side closes first and keeps the port in TIME_WAIT
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        check_port(host, 0)


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


def test_own_ray_counts_enough_cpus_for_every_process() -> None:
    engine = EngineConfig.parse({"tensor_parallel_size": 64})
    assert num_logical_cpus(engine, ServerConfig.parse({"num_ingress_replicas": 3})) == 1 + 64 + 3
    assert num_logical_cpus(ENGINE, SERVER) >= 3


@pytest.fixture
def serves(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The applications of a Serve that runs at 127.0.0.1:8123 in the Ray that was joined."""
    applications: dict[str, Any] = {}
    status = ray.serve.schema.ServeStatus(proxies={"node": "HEALTHY"}, applications=applications)
    monkeypatch.setattr(ray.serve, "status", lambda: status)
    monkeypatch.setattr(lifecycle, "serve_address", lambda: ("127.0.0.1", 8123))
    return applications


def test_a_serve_that_runs_is_joined_at_its_own_address(serves: dict[str, Any]) -> None:
    assert joins_serve(ServerConfig.parse({"port": 8123}))
    with pytest.raises(ConfigError, match=r"at 127\.0\.0\.1:8123, .* --port 8123"):
        joins_serve(ServerConfig.parse({"port": 8000}))


@pytest.mark.parametrize("name", ["default", "another"])
def test_a_second_engine_at_the_address_of_a_first_is_refused(serves: dict[str, Any], name: str) -> None:
    serves[f"rayllm-{name}"] = "RUNNING"
    with pytest.raises(ConfigError, match=rf"engine '{name}' is served .* already.*serve delete rayllm-{name}"):
        joins_serve(ServerConfig.parse({"port": 8123}))


@pytest.mark.parametrize(
    ("owns_ray", "ends_serve", "others", "ended"),
    [(True, True, (), True), (False, True, (), True), (False, True, ("theirs",), False), (False, False, (), False)],
)
def test_only_the_serve_that_was_started_ends_and_only_where_nobody_else_uses_it(
    serves: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    owns_ray: bool,
    ends_serve: bool,
    others: tuple[str, ...],
    ended: bool,
) -> None:
    did: list[str] = []
    serves.update(dict.fromkeys(("rayllm-default", *others), "RUNNING"))

    def delete(name: str, _blocking: bool) -> None:
        did.append(name)
        threading.Timer(0.05, serves.pop, [name]).start()

    monkeypatch.setattr(ray.serve, "delete", delete)
    monkeypatch.setattr(ray.serve, "shutdown", lambda: did.append("shutdown"))
    monkeypatch.setattr(lifecycle, "_drain", lambda running: None)
    lifecycle._stop_serve(RunningServer(ENGINE, SERVER, "http://nowhere", owns_ray), ends_serve=ends_serve)
    assert did == ["rayllm-default"] + ["shutdown"] * ended


def test_a_stop_does_not_wait_for_the_streams_of_a_replica_that_was_replaced(
    serves: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serves["rayllm-default"] = "DELETING"
    monkeypatch.setattr(lifecycle, "_DELETE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(ray.serve, "delete", lambda name, _blocking: None)
    monkeypatch.setattr(ray.serve, "shutdown", lambda: pytest.fail("it waits for the same replica"))
    monkeypatch.setattr(lifecycle, "_drain", lambda running: None)
    lifecycle._stop_serve(RunningServer(ENGINE, SERVER, "http://nowhere", True), ends_serve=True)
    assert "still at its last streams" in caplog.text


class _Unready(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"error": {"message": "not healthy"}, "stage": "loading weights"}).encode()
        self.send_response(503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_health_tells_the_stage_of_a_server_that_is_not_ready() -> None:
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
        def failure(self) -> "Handle":
            return self

        def remote(self) -> "Handle":
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
