from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
from call_in_thread import call_in_thread
from fake_nccl import FakeNccl
from fakes import OneStepAtATime, fake_config

from rayllm.executor.channel import Channel
from rayllm.executor.worker import WorkerLoop
from rayllm.messages import StepPlan, StepResult, WorkerFailure


class _Runner(OneStepAtATime):
    def __init__(self, *_: Any) -> None:
        self.warm = False

    def num_blocks_available(self) -> int:
        return 20

    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def warm_up(self) -> None:
        self.warm = True

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step == 13:
            raise ValueError("row 9 is\nunknown")
        assert self.warm
        return StepResult(plan.step, plan.epoch, b"", b"", {}, {}, 0.5)


def _plan(step: int, epoch: int = 0) -> StepPlan:
    return StepPlan(step, epoch, b"", [], b"", b"", b"", b"", 0)


@pytest.fixture(params=[0, 1])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[int, Channel, Future[Any]]]:
    """A rank that serves: its number, the driver's end, and what `serve` returns."""
    rank = request.param
    loop = WorkerLoop(fake_config(), rank, _Runner)
    loop.load()
    assert loop.count_blocks() == 20
    loop.start(7)
    ours, theirs = socket.socketpair()
    driver, worker = Channel(ours, "worker"), Channel(theirs, "the driver")
    yield rank, driver, call_in_thread(lambda: loop.serve(worker))
    driver.close()
    worker.close()


def test_only_rank_0_answers_and_says_how_long_it_waited(served: tuple[int, Channel, Future[Any]]) -> None:
    rank, driver, _ = served
    driver.send(_plan(1, epoch=4))
    if rank == 0:
        result = msgspec.msgpack.decode(driver.receive(5.0), type=StepResult)
        assert (result.step, result.epoch, result.elapsed_s) == (1, 4, 0.5)
        assert result.waited_s > 0
    else:
        with pytest.raises(TimeoutError):
            driver.receive(0.1)


def test_a_failing_step_is_told_in_one_line_by_any_rank_and_ends_it(
    served: tuple[int, Channel, Future[Any]],
) -> None:
    rank, driver, ended = served
    driver.send(_plan(13, epoch=4))
    failure = msgspec.msgpack.decode(driver.receive(5.0), type=WorkerFailure)
    assert failure == WorkerFailure(rank, 4, "ValueError: row 9 is unknown")
    assert ended.result(5.0) == "ValueError: row 9 is unknown"


def test_a_driver_that_hangs_up_ends_the_worker_quietly(served: tuple[int, Channel, Future[Any]]) -> None:
    _, driver, ended = served
    driver.close()
    assert ended.result(5.0) is None


def test_rubbish_in_place_of_a_plan_is_a_failure(served: tuple[int, Channel, Future[Any]]) -> None:
    rank, driver, _ = served
    driver.send(WorkerFailure(0, 0, "not a plan"))
    failure = msgspec.msgpack.decode(driver.receive(5.0), type=WorkerFailure)
    assert failure.rank == rank
    assert "ValidationError" in failure.reason


def test_a_worker_computes_on_its_own_gpu_among_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    loop = WorkerLoop(fake_config(device="cuda"), None, _Runner)
    loop.take(1)
    loop.show_gpus(("5", "2"), "2")
    loop.load()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], chosen) == ("5,2", [1])


class _AllReduce:
    """Notes what happens to it."""

    events: list[Any]

    def __init__(self, rank: int, size: int, device: Any, limits: Any, disabled: bool):
        type(self).events = [(rank, size, str(device), limits, disabled)]

    def connect(self, exchange: Any, one_node: bool) -> None:
        self.events.append(("connect", exchange.rank, exchange.size, one_node))

    def abort(self) -> None:
        self.events.append("abort")

    def close(self) -> None:
        self.events.append("close")


@pytest.mark.parametrize("disabled", [False, True])
def test_ranks_on_gpus_share_memory_once_they_have_joined_and_let_it_go_before_they_leave(
    monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr("rayllm.distributed.all_reduce.CustomAllReduce", _AllReduce)
    monkeypatch.setattr("rayllm.distributed.all_reduce.size_limits", lambda device, size: "limits")
    engine = {"tensor_parallel_size": 2, "disable_custom_all_reduce": disabled}
    loop = WorkerLoop(fake_config(device="cuda", engine=engine), 1, _Runner)
    monkeypatch.setattr(loop._group, "join", lambda rank, store: None)
    monkeypatch.setattr(type(loop._group), "store", "the store")
    loop.show_gpus(("5", "2"), "2")
    loop.load()
    loop.join(("host", 1), True)
    loop.abort()
    assert _AllReduce.events == [(1, 2, "cuda:1", "limits", disabled), ("connect", 1, 2, True), "abort"]
    assert [release.__name__ for release in loop._before_abort] == ["close"]


def test_a_survivor_on_a_gpu_leaves_its_step_lets_all_go_and_computes_with_its_weights_in_the_next_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nccl = FakeNccl(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr("rayllm.distributed.all_reduce.CustomAllReduce", _AllReduce)
    monkeypatch.setattr("rayllm.distributed.all_reduce.size_limits", lambda device, size: "limits")
    runners: list[Any] = []

    class Runner(_Runner):
        """One that records graphs, whose steps wait for a peer that has died."""

        def __init__(self, config: Any, tp: Any):
            super().__init__()
            tp.before_abort.append(nccl.drop_graphs)
            runners.append(self)

        def execute(self, plan: StepPlan) -> StepResult:
            if plan.epoch == 0:
                nccl.compute()
            return StepResult(plan.step, plan.epoch, b"", b"", {}, {}, 0.5)

    loop = WorkerLoop(fake_config(device="cuda", engine={"tensor_parallel_size": 2}), 0, Runner)
    loop.show_gpus(("5", "2"), "2")
    loop.load()
    _AllReduce.events = nccl.events
    for epoch in (0, 1):
        loop.join(loop.open_store("127.0.0.1"), one_node=True)
        loop.start(7)
        ours, theirs = socket.socketpair()
        driver, worker = Channel(ours, "worker"), Channel(theirs, "the driver")
        serving = call_in_thread(lambda: loop.serve(worker))  # noqa: B023
        driver.send(_plan(1, epoch))
        if epoch == 0:
            driver.close()
            loop.abort()
            assert serving.result(10.0) is None
        else:
            assert msgspec.msgpack.decode(driver.receive(5.0), type=StepResult).epoch == 1
            driver.close()
            serving.result(10.0)
        worker.close()
    joined = ["formed", ("connect", 0, 2, True)]
    left = ["abort", "abort begins", "close", "graphs dropped", "abort ends"]
    events = [event for event in nccl.events if event != "step returns"]
    assert events[: 2 * len(joined) + len(left)] == [*joined, *left, *joined]
    assert sorted(events[2 * len(joined) + len(left) :]) == sorted(left[1:])
    assert nccl.events.index("step returns") < nccl.events.index("close")
    assert len(runners) == 1


def test_neither_driver_nor_worker_imports_what_it_does_not_need() -> None:
    code = (
        "import sys, rayllm.executor.worker, rayllm.executor.group;"
        "import rayllm.engine.driver.actor, rayllm.engine.client.driver_connection;"
        "print([name for name in ('torch', 'transformers', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
