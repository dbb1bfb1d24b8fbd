from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayllm.executor import standby as standby_module
from rayllm.executor.standby import Standby
from rayllm.executor.worker_process import WorkerPlace

HERE = WorkerPlace(100, "node-1", "host", ("cuda:3",))


class _Actor:
    """A spare worker on `node`; `place` and `prepare` are called as Ray's actors are."""

    def __init__(self, node: str):
        self.prepared: Future[None] = Future()
        self.place = SimpleNamespace(remote=lambda: WorkerPlace(7, node, "host", ("cpu",)))
        self.prepare = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: self.prepared))


class _Actors:
    """What a standby needs of `RankActors`: rank 0 lives in `HERE`."""

    def __init__(self, node: str = "node-1"):
        self.lock = threading.Lock()
        self.closed = False
        self.places = {0: HERE}
        self.adopted: dict[int, WorkerPlace] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.made: list[_Actor] = []
        self._node = node

    def create(self, rank: int | None) -> _Actor:
        assert rank is None
        self.made.append(_Actor(self._node))
        return self.made[-1]

    def adopt(self, rank: int, actor: _Actor, place: WorkerPlace) -> None:
        self.adopted[rank] = place

    def begin(self, ranks: list[int], *call: Any) -> None:
        self.calls.append((ranks, *call))


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[_Actor]:
    killed: list[_Actor] = []
    monkeypatch.setattr(ray, "get", lambda place, timeout: place)
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.append(actor))
    return killed


@pytest.fixture
def make() -> Callable[..., tuple[Standby, _Actors]]:
    def make(enabled: bool = True, node: str = "node-1") -> tuple[Standby, _Actors]:
        actors = _Actors(node)
        return Standby(actors, enabled), actors  # type: ignore[arg-type]

    return make


def test_one_spare_worker_is_made_and_is_ready_once_it_has_prepared(make: Callable[..., Any]) -> None:
    standby, actors = make()
    standby.prepare()
    standby.prepare()
    assert len(actors.made) == 1
    assert not standby.is_ready
    actors.made[0].prepared.set_result(None)
    assert standby.is_ready


def test_one_that_failed_to_prepare_is_not_ready(make: Callable[..., Any]) -> None:
    standby, actors = make()
    standby.prepare()
    actors.made[0].prepared.set_exception(MemoryError())
    assert not standby.is_ready


@pytest.mark.parametrize("why", ["off", "closed"])
def test_none_is_made_where_it_is_off_or_the_engine_is_being_closed(make: Callable[..., Any], why: str) -> None:
    standby, actors = make(enabled=why != "off")
    actors.closed = why == "closed"
    standby.prepare()
    assert (actors.made, standby.place(0)) == ([], None)


def test_it_takes_a_rank_with_the_devices_of_the_lost_one_and_only_once(make: Callable[..., Any]) -> None:
    standby, actors = make()
    standby.prepare()
    assert standby.promote(0)
    assert actors.adopted == {0: WorkerPlace(7, "node-1", "host", ("cuda:3",))}
    assert actors.calls == [([0], "take", 0)]
    assert not standby.promote(0)


def test_it_takes_no_rank_of_another_node_and_none_that_was_never_placed(make: Callable[..., Any]) -> None:
    standby, actors = make(node="node-2")
    standby.prepare()
    assert not standby.promote(0)
    assert not standby.promote(1)
    assert actors.adopted == {}


def test_after_a_recovery_the_next_one_is_made_a_little_later(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby_module, "DELAY_S", 0.0)
    standby, actors = make()
    standby.prepare_later()
    standby._timer.join(5.0)
    assert len(actors.made) == 1


def test_closing_ends_the_spare_worker_and_says_where_it_lived(make: Callable[..., Any], killed: list[_Actor]) -> None:
    standby, actors = make()
    standby.prepare()
    assert [place.pid for place in standby.close()] == [7]
    assert killed == actors.made
    assert standby.close() == []
