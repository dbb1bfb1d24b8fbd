from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rayllm.engine.address import DriverAddress
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.client.blocking_journaled_client import BlockingJournaledClient
from rayllm.engine.client.engine_thread import EngineThread
from rayllm.engine.driver.link import ClientLink
from rayllm.engine.owner import watched
from rayllm.engine.owner.watched import WatchedEngine
from rayllm.errors import EngineError
from rayllm.executor.ray_watch import RayProcess, RayWatch
from rayllm.machine.processes import process_of
from rayllm.request import Request, SamplingParams, pack_ids


class _Owned:
    """An owned engine with a driver that takes requests and answers none, and whose Ray never answers again."""

    link: ClientLink

    def __init__(self, config: Any):
        pass

    def start(self) -> None:
        pass

    def connect(self) -> BlockingDriverConnection:
        return BlockingDriverConnection(DriverAddress("", self.link.unix_path, self.link.token, None, None))

    def reconnect(self, reason: str) -> BlockingDriverConnection:
        threading.Event().wait()
        raise AssertionError

    def close(self) -> None:
        threading.Event().wait()


def _request(name: str) -> Request:
    return Request(request_id=name, prompt=pack_ids([1, 2, 3]), params=SamplingParams(), seed=0, max_tokens=5)


@pytest.fixture
def raylet() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def engine(raylet: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedEngine]:
    process = process_of(raylet.pid)
    assert process is not None
    watch = RayWatch([RayProcess("raylet", process)])
    _Owned.link = ClientLink()
    monkeypatch.setattr(watched, "ray_watch", lambda: watch)
    monkeypatch.setattr(watched, "OwnedEngine", _Owned)
    made = WatchedEngine(None)  # type: ignore[arg-type]  # the fake reads none
    made.start()
    yield made
    watch.close()
    _Owned.link.close()


def test_callers_of_an_engine_whose_ray_dies_are_told_and_it_closes(
    engine: WatchedEngine, raylet: subprocess.Popen[bytes]
) -> None:
    thread = EngineThread(lambda: BlockingJournaledClient(engine.connect(), engine.reconnect))
    call = thread.open([_request("r")])
    threading.Timer(0.2, raylet.kill).start()
    with pytest.raises(EngineError, match="raylet") as raised:
        call.receive()
    assert raised.value.code == "ray_died"
    with pytest.raises(EngineError, match="raylet"):
        thread.open([_request("s")]).receive()
    thread.close()
    engine.close()
    thread.join()


def test_close_ends_with_a_ray_that_dies_meanwhile(engine: WatchedEngine, raylet: subprocess.Popen[bytes]) -> None:
    threading.Timer(0.2, raylet.kill).start()
    engine.close()
