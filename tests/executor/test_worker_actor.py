"""The Ray actor round a worker's loop, called as Ray calls it, without Ray."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import fake_config

from rayllm.executor import worker_actor
from rayllm.executor.worker_actor import WorkerActor

VARIABLE = "RAYLLM_TEST_WORKER_ACTOR"


class _Loop:
    """Notes what it is asked to do; `serve` returns what `end` says, or raises it."""

    end: Any = None

    def __init__(self, config: Any, rank: int | None, runner_factory: Any):
        self.rank = rank
        self.made_in = os.environ.get(VARIABLE)
        self.calls: list[Any] = []

    def take(self, rank: int) -> None:
        self.rank = rank
        self.calls.append(("take", rank))

    def show_gpus(self, node_gpus: tuple[str, ...], own_gpu: str) -> None:
        self.calls.append(("show_gpus", node_gpus, own_gpu))

    def serve(self, channel: Any) -> Any:
        assert not channel.closed
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


@pytest.fixture
def log_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(worker_actor, "WorkerLoop", _Loop)
    monkeypatch.setattr(worker_actor, "setup_logging", lambda form, process, file: names.append(process))
    monkeypatch.setenv(VARIABLE, "before")
    return names


def test_its_environment_is_there_before_its_loop(log_names: list[str]) -> None:
    actor: Any = WorkerActor(fake_config(), 1, {VARIABLE: "set"})
    assert actor._loop.made_in == "set"


def test_logs_name_the_rank_once_a_standby_takes_one(log_names: list[str]) -> None:
    actor: Any = WorkerActor(fake_config(), None, {})
    assert log_names == ["worker standby"]
    actor.take(3)
    actor.show_gpus(("1", "4"), "4")
    assert log_names == ["worker standby", "worker 3"]
    assert actor._loop.calls == [("take", 3), ("show_gpus", ("1", "4"), "4")]


@pytest.mark.parametrize("end", [None, "a peer is lost", ValueError("broken")])
def test_a_rank_serves_the_driver_by_its_number_and_hangs_up_after(
    log_names: list[str], monkeypatch: pytest.MonkeyPatch, end: Any
) -> None:
    channel = SimpleNamespace(closed=False)
    channel.close = lambda: setattr(channel, "closed", True)
    asked: list[Any] = []

    def connect(*arguments: Any) -> Any:
        asked.append(arguments)
        return channel

    monkeypatch.setattr(worker_actor, "connect", connect)
    monkeypatch.setattr(_Loop, "end", end)
    actor = WorkerActor(fake_config(), 2, {})
    if isinstance(end, Exception):
        with pytest.raises(ValueError, match="broken"):
            actor.run(("host", 1), "token")
    else:
        assert actor.run(("host", 1), "token") == end
    assert asked == [(("host", 1), "token", "2", "the driver")]
    assert channel.closed
