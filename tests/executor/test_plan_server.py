from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fakes import LaunchingRunner, OneStepAtATime, empty_plan

from rayllm.executor.channel import Channel
from rayllm.executor.plan_server import serve_plans
from rayllm.messages import StepPlan, StepResult, WorkerFailure


class _Runner(OneStepAtATime):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step == 13:
            raise ValueError("row 9 is\nunknown")
        self.steps.append(plan.step)
        return StepResult(plan.step, plan.epoch, b"", b"", {}, {}, 0.5)


class _Server:
    """`serve_plans` on a thread; `driver` is the other end of its channel."""

    def __init__(self, rank: int, answers: bool, runner: Any = None):
        ours, theirs = socket.socketpair()
        self.driver, self._worker = Channel(ours, "worker"), Channel(theirs, "the driver")
        self.runner: Any = runner or _Runner()
        self.returned: list[str | None] = []
        self._thread = threading.Thread(target=self._run, args=(rank, answers), daemon=True)
        self._thread.start()

    def _run(self, rank: int, answers: bool) -> None:
        self.returned.append(serve_plans(self.runner, rank, self._worker, answers=answers))

    def plan(self, step: int, epoch: int = 0) -> None:
        self.driver.send(empty_plan(step, epoch))

    def result(self) -> StepResult:
        return msgspec.msgpack.decode(self.driver.receive(5.0), type=StepResult)

    def wait_for(self, *calls: str) -> None:
        """Until these are the runner's last calls."""
        deadline = time.monotonic() + 5.0
        while self.runner.calls[-len(calls) :] != list(calls):
            assert time.monotonic() < deadline, self.runner.calls
            time.sleep(0.001)

    def close(self) -> list[str | None]:
        self.driver.close()
        self._thread.join(5.0)
        self._worker.close()
        return self.returned


@pytest.fixture
def answering() -> Iterator[_Server]:
    server = _Server(rank=2, answers=True)
    yield server
    server.close()


def test_a_rank_that_answers_sends_each_result_with_how_long_it_waited(answering: _Server) -> None:
    answering.plan(1, epoch=4)
    result = answering.result()
    assert (result.step, result.epoch, result.elapsed_s) == (1, 4, 0.5)
    assert result.waited_s > 0


def test_a_rank_that_does_not_answer_computes_the_same_plans_in_silence() -> None:
    server = _Server(rank=0, answers=False)
    for step in (1, 2):
        server.plan(step)
    with pytest.raises(TimeoutError):
        server.driver.receive(0.2)
    assert server.close() == [None]
    assert server.runner.steps == [1, 2]


def test_a_failed_step_ends_the_loop_and_is_reported_by_any_rank() -> None:
    for answers in (True, False):
        server = _Server(rank=3, answers=answers)
        server.plan(13, epoch=7)
        failure = msgspec.msgpack.decode(server.driver.receive(5.0), type=WorkerFailure)
        assert failure == WorkerFailure(3, 7, "ValueError: row 9 is unknown")
        assert server.close() == [failure.reason]


def test_a_driver_that_closes_the_channel_ends_the_loop_without_a_failure(answering: _Server) -> None:
    assert answering.close() == [None]


@pytest.fixture
def launching() -> Iterator[_Server]:
    server = _Server(rank=0, answers=True, runner=LaunchingRunner(bound=[5], fails_at_launch=[8], fails_at_finish=[9]))
    yield server
    server.runner.done |= set(range(20))
    server.close()


def test_a_plan_that_comes_while_the_device_computes_is_launched_before_the_step_is_finished(
    launching: _Server,
) -> None:
    launching.plan(1)
    launching.wait_for("launch 1")
    launching.plan(2)
    launching.wait_for("launch 1", "launch 2", "finish 1")
    launching.plan(3)
    launching.wait_for("finish 1", "launch 3", "finish 2")
    launching.runner.done.add(3)
    results = [launching.result() for _ in range(3)]
    assert [result.step for result in results] == [1, 2, 3]
    assert [result.waited_s for result in results[1:]] == [0.0, 0.0]


def test_a_plan_with_rows_that_a_grammar_binds_waits_for_the_step_before_it(launching: _Server) -> None:
    launching.plan(4)
    launching.wait_for("launch 4")
    launching.plan(5)
    launching.wait_for("launch 4", "finish 4", "launch 5")
    launching.runner.done.add(5)
    assert [launching.result().step, launching.result().step] == [4, 5]
    assert launching.runner.calls == ["launch 4", "finish 4", "launch 5", "finish 5"]


@pytest.mark.parametrize(("step", "reason"), [(8, "no memory to launch 8"), (9, "step 9 was not computed")])
def test_a_failing_step_loses_no_result_before_it_and_is_reported_with_its_epoch(
    launching: _Server, step: int, reason: str
) -> None:
    launching.plan(1, epoch=3)
    launching.wait_for("launch 1")
    launching.plan(step, epoch=3)
    launching.wait_for("launch 1", f"launch {step}", "finish 1")
    launching.runner.done.add(step)
    assert launching.result().step == 1
    failure = msgspec.msgpack.decode(launching.driver.receive(5.0), type=WorkerFailure)
    assert failure == WorkerFailure(0, 3, f"RuntimeError: {reason}")
    assert launching.close() == [failure.reason]


def test_a_driver_that_leaves_is_noticed_while_the_device_computes(launching: _Server) -> None:
    launching.plan(1)
    launching.wait_for("launch 1")
    assert launching.close() == [None]
    assert "finish 1" not in launching.runner.calls
