from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from rayllm.executor.channel import Channel
from rayllm.executor.plan_server import serve_plans
from rayllm.messages import StepPlan, StepResult, WorkerFailure


class _Runner:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step == 13:
            raise ValueError("row 9 is\nunknown")
        self.steps.append(plan.step)
        return StepResult(plan.step, plan.epoch, b"", b"", {}, {}, 0.5)


class _Server:
    """`serve_plans` on a thread; `driver` is the other end of its channel."""

    def __init__(self, rank: int, answers: bool):
        ours, theirs = socket.socketpair()
        self.driver, self._worker = Channel(ours, "worker"), Channel(theirs, "the driver")
        self.runner, self.returned = _Runner(), []  # type: tuple[_Runner, list[str | None]]
        self._thread = threading.Thread(target=self._run, args=(rank, answers), daemon=True)
        self._thread.start()

    def _run(self, rank: int, answers: bool) -> None:
        self.returned.append(serve_plans(self.runner, rank, self._worker, answers=answers))  # type: ignore[arg-type]

    def plan(self, step: int, epoch: int = 0) -> None:
        self.driver.send(StepPlan(step, epoch, b"", [], b"", b"", b"", b"", 0))

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
    result = msgspec.msgpack.decode(answering.driver.receive(5.0), type=StepResult)
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
