from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayllm.config import EngineConfig
from rayllm.errors import EngineError
from rayllm.serve import engine_replica
from rayllm.serve.engine_replica import EngineReplica


class FakeEngine:
    """An owned engine whose driver fails when told to."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.num_starts = 1
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = False

    async def wait_failed(self) -> str:
        reason = await self.failed
        self.failed = asyncio.get_running_loop().create_future()
        return reason

    def replace(self, reason: str) -> None:
        if self.cluster.refusal is not None:
            raise EngineError(f"{reason}: {self.cluster.refusal}")
        self.num_starts += 1

    def close(self) -> None:
        self.closed = True


class Cluster:
    """Stands for Ray: starts a fake engine, or fails to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusal: Exception | None = None
        monkeypatch.setattr(EngineReplica, "_start", self._start)
        monkeypatch.setattr(EngineReplica, "_wait_idle", self._no_wait)
        monkeypatch.setattr(engine_replica, "await_free", lambda name, timeout_s: None)

    async def _start(self) -> FakeEngine:
        self.engine = FakeEngine(self)
        return self.engine

    async def _no_wait(self, timeout_s: float) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


class HeldReplica(EngineReplica):
    """As in Serve, which calls `__del__` itself, once; the garbage collector's call does nothing."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


async def _replica() -> Any:
    replica: Any = object.__new__(HeldReplica)
    await EngineReplica.__init__(replica, EngineConfig(), 1.0)
    return replica


async def _settle() -> None:
    await asyncio.sleep(0.05)


async def test_a_failed_driver_is_replaced_and_the_replica_stays_healthy(cluster: Cluster) -> None:
    replica = await _replica()
    for num_starts in (2, 3):
        cluster.engine.failed.set_result("worker died")
        await _settle()
        assert cluster.engine.num_starts == num_starts
        await replica.check_health()
    await EngineReplica.__del__(replica)
    assert cluster.engine.closed


async def test_an_engine_that_does_not_start_again_says_why_and_then_fails_its_health_check(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await _replica()
    assert await replica.failure() is None
    cluster.refusal = EngineError("no GPU left")
    cluster.engine.failed.set_result("worker died")
    await _settle()
    assert await replica.failure() == "worker died: no GPU left"
    await replica.check_health()  # not before whoever started it could see why
    monkeypatch.setattr(engine_replica, "_SHOW_FAILURE_S", -1.0)
    with pytest.raises(EngineError, match=r"worker died.*no GPU left"):
        await replica.check_health()
