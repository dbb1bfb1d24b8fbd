import asyncio
from typing import Any

import pytest

from rayllm.config import EngineConfig
from rayllm.errors import EngineError
from rayllm.serve import engine_replica
from rayllm.serve.engine_replica import EngineReplica, RestartBudget


class FakeEngine:
    """A driver that fails when told to."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Cluster:
    """Stands for Ray: starts fake engines, or fails to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[FakeEngine] = []
        self.refusal: Exception | None = None
        monkeypatch.setattr(EngineReplica, "_start", self._start)
        monkeypatch.setattr(EngineReplica, "_wait_idle", self._no_wait)
        monkeypatch.setattr(engine_replica, "known_engines", list)
        monkeypatch.setattr(engine_replica, "_failure_of", self._failure_of)

        def driver_of(engine: FakeEngine) -> FakeEngine:
            return engine

        monkeypatch.setattr(FakeEngine, "driver", property(driver_of), raising=False)

    async def _start(self) -> FakeEngine:
        if self.refusal is not None:
            raise self.refusal
        self.engines.append(FakeEngine())
        return self.engines[-1]

    async def _no_wait(self, timeout_s: float) -> None:
        pass

    @staticmethod
    async def _failure_of(engine: Any) -> str:
        return str(await engine.failed)


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
    cluster.engines[0].failed.set_result("worker died")
    await _settle()
    assert len(cluster.engines) == 2
    assert cluster.engines[0].closed
    await replica.check_health()
    await EngineReplica.__del__(replica)
    assert cluster.engines[1].closed


async def test_health_fails_when_the_driver_does_not_start_again(cluster: Cluster) -> None:
    replica = await _replica()
    cluster.refusal = EngineError("no GPU left")
    cluster.engines[0].failed.set_result("worker died")
    await _settle()
    with pytest.raises(EngineError, match=r"worker died.*no GPU left"):
        await replica.check_health()


async def test_health_fails_when_drivers_keep_failing(cluster: Cluster) -> None:
    replica = await _replica()
    for attempt in range(4):
        assert len(cluster.engines) == attempt + 1
        cluster.engines[-1].failed.set_result("worker died")
        await _settle()
    with pytest.raises(EngineError, match="keeps failing; last: worker died"):
        await replica.check_health()


def test_failures_long_ago_do_not_count() -> None:
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 1, 2)] == [True, True, False]
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 20, 40, 60)] == [True] * 4
