from __future__ import annotations

import threading
from typing import Any

import pytest
import ray.serve

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import ConfigError, EngineError
from rayllm.serve import deployment
from rayllm.serve.deployment import joins_serve
from rayllm.serve.running_server import RunningServer

ENGINE = EngineConfig()
SERVER = ServerConfig()


@pytest.fixture
def serves(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The applications of a Serve that runs at 127.0.0.1:8123 in the Ray that was joined."""
    applications: dict[str, Any] = {}
    status = ray.serve.schema.ServeStatus(proxies={"node": "HEALTHY"}, applications=applications)
    monkeypatch.setattr(ray.serve, "status", lambda: status)
    monkeypatch.setattr(deployment, "serve_address", lambda: ("127.0.0.1", 8123))
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
    monkeypatch.setattr(deployment, "_drain", lambda running: None)
    deployment._stop_serve(RunningServer(ENGINE, SERVER, "http://nowhere", owns_ray), ends_serve=ends_serve)
    assert did == ["rayllm-default"] + ["shutdown"] * ended


def test_a_stop_does_not_wait_for_the_streams_of_a_replica_that_was_replaced(
    serves: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serves["rayllm-default"] = "DELETING"
    monkeypatch.setattr(deployment, "_DELETE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(ray.serve, "delete", lambda name, _blocking: None)
    monkeypatch.setattr(ray.serve, "shutdown", lambda: pytest.fail("it waits for the same replica"))
    monkeypatch.setattr(deployment, "_drain", lambda running: None)
    deployment._stop_serve(RunningServer(ENGINE, SERVER, "http://nowhere", True), ends_serve=True)
    assert "still has open streams" in caplog.text


def test_a_serve_that_does_not_stop_is_given_up_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = RunningServer(ENGINE, SERVER, "http://nowhere", True)

    def call(work: object, timeout_s: float) -> None:
        raise EngineError("Ray's raylet (pid 7) died")

    monkeypatch.setattr(running.ray, "call", call)
    deployment._stop_serve_in_time(running, ends_serve=True)
    assert "Serve did not shut down cleanly: Ray's raylet (pid 7) died" in caplog.text
