import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from api.fake_engine import config

from rayllm.api.service import READY, ModelService
from rayllm.engine.client import journaled_client
from rayllm.errors import EngineUnreachableError
from rayllm.serve import ingress
from rayllm.serve.ingress import keep_connected


class FakeConnection:
    def __init__(self) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = False

    async def wait_lost(self) -> str:
        return await self.lost

    def close(self) -> None:
        self.closed = True


class RecordingService:
    """The part of `ModelService` that `keep_connected` uses."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.engine: Any = None
        self.num_drivers_lost = 0

    def set_stage(self, stage: str, reason: str = "") -> None:
        self.engine = None
        if (stage, reason) not in self.stages[-1:]:
            self.stages.append((stage, reason))

    def set_ready(self, config: Any, tokenizer: Any, engine: Any) -> None:
        self.engine = engine

    def note_driver_lost(self) -> None:
        self.num_drivers_lost += 1

    def note_replay(self, gap_s: float, num_tokens: int) -> None:
        raise AssertionError("no request is open in these tests")


class Driver:
    """Whether there is a driver to connect to, and what it says it is doing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage: str | None = None
        self.error: Exception | None = EngineUnreachableError("no engine")
        self.connections: list[FakeConnection] = []
        self.config = config()
        monkeypatch.setattr(ingress, "_connect", self._connect)
        monkeypatch.setattr(ingress, "_stage", self._say)
        monkeypatch.setattr(journaled_client, "RETRY_S", 0.001)

    async def _connect(self, engine_name: str) -> tuple[Any, FakeConnection]:
        if self.error is not None:
            raise self.error
        self.connections.append(FakeConnection())
        return self.config, self.connections[-1]

    async def _say(self, engine_name: str) -> str | None:
        return self.stage


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def _connecting() -> Any:
    service: Any = RecordingService()
    task = asyncio.create_task(keep_connected(service, None, "default", config()))  # type: ignore[arg-type]
    try:
        yield service
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_stages_are_told_until_the_engine_is_ready(driver: Driver) -> None:
    async with _connecting() as service:
        await _until(lambda: bool(service.stages))
        driver.stage = "loading weights"
        await _until(lambda: service.stages[-1][0] == "loading weights")
        driver.error = None
        await _until(lambda: service.engine is not None)
        assert service.stages[0][0] == "starting the engine"
    assert driver.connections[0].closed


async def test_the_next_driver_is_found_when_one_is_lost(driver: Driver) -> None:
    driver.error = None
    async with _connecting() as service:
        await _until(lambda: len(driver.connections) == 1)
        driver.connections[0].lost.set_result("it died")
        await _until(lambda: service.engine is not None and len(driver.connections) == 2)
        assert service.stages == [("restarting the engine", "it died")]
        assert service.engine.driver is driver.connections[1]
        assert service.num_drivers_lost == 1
        assert driver.connections[0].closed


async def test_a_driver_that_is_ready_but_does_not_take_us_is_not_called_ready(driver: Driver) -> None:
    driver.stage = READY
    driver.error = RuntimeError("something odd")
    async with _connecting() as service:
        await _until(lambda: bool(service.stages))
        assert service.stages[-1] == ("connecting to the engine", "something odd")
        driver.error = None
        await _until(lambda: service.engine is not None)


async def test_a_driver_of_another_model_is_waited_out(driver: Driver) -> None:
    driver.stage, driver.error = READY, None
    driver.config = config(model_path="/former")
    async with _connecting() as service:
        await _until(lambda: bool(service.stages))
        assert "serves a different model" in service.stages[-1][1]
        assert all(connection.closed for connection in driver.connections)
        assert service.engine is None
        driver.config = config()
        await _until(lambda: service.engine is not None)


def test_service_has_what_keep_connected_calls() -> None:
    for name in ("set_stage", "set_ready", "note_driver_lost", "note_replay"):
        assert callable(getattr(ModelService, name))
