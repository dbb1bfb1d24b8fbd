from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import ConfigError
from rayllm.executor.ray_watch import RayWatch
from rayllm.serve import lifecycle
from rayllm.serve.lifecycle import num_logical_cpus, running_server
from rayllm.serve.running_server import RunningServer

ENGINE = EngineConfig()
SERVER = ServerConfig()


def test_own_ray_counts_enough_cpus_for_every_process() -> None:
    engine = EngineConfig.parse({"tensor_parallel_size": 64})
    assert num_logical_cpus(engine, ServerConfig.parse({"num_ingress_replicas": 3})) == 1 + 64 + 3
    assert num_logical_cpus(ENGINE, SERVER) >= 3


@pytest.fixture
def ray_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that starts at once and, as Ray does, takes the program's SIGTERM handler."""

    @contextlib.contextmanager
    def connected_ray(*_: Any, **__: Any) -> Iterator[bool]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield True

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(lifecycle, "ray_is_initialized", lambda: False)
    monkeypatch.setattr(lifecycle, "connected_ray", connected_ray)
    monkeypatch.setattr(lifecycle, "ray_watch", lambda: RayWatch([]))
    monkeypatch.setattr(lifecycle, "ray_token_in_use", lambda: "token")
    monkeypatch.setattr(RunningServer, "ray_address", "127.0.0.1:6379")


def test_the_port_is_handed_over_once_an_ingress_runs(ray_of_our_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    @contextlib.contextmanager
    def deployed(running: RunningServer, on_stage: Any) -> Iterator[None]:
        did.append("deploy")
        yield
        did.append("stop")

    class Early:
        stage = ""

        @classmethod
        def open(cls, host: str, port: int) -> Early:
            did.append("open")
            return cls()

        def hand_over(self) -> None:
            did.append("hand over")

        def close(self) -> None:
            did.append("close")

    monkeypatch.setattr(lifecycle, "deployed", deployed)
    monkeypatch.setattr(lifecycle, "EarlyPort", Early)
    monkeypatch.setattr(RunningServer, "wait_ingress", lambda self: did.append("ingress runs"))
    handler, stages, rays = signal.getsignal(signal.SIGTERM), [], []
    with running_server(
        ENGINE,
        ServerConfig.parse({"port": 0}),
        on_stage=stages.append,
        on_ray=lambda address, token: rays.append((address, token)),
        wait=False,
    ) as running:
        assert signal.getsignal(signal.SIGTERM) is handler, "Ray's is taken back"
        assert running.server.port > 0, "a free one was chosen"
        assert running.owns_ray
    assert did == ["open", "deploy", "ingress runs", "hand over", "stop", "close"]
    assert stages == ["starting Ray"]
    assert rays == [("127.0.0.1:6379", "token")]


def test_nothing_is_started_for_a_port_that_is_taken(ray_of_our_own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "connected_ray", lambda *_, **__: pytest.fail("Ray was started"))
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ServerConfig.parse({"port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match="--port 0"), running_server(ENGINE, server):
            pass
