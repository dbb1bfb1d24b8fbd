from __future__ import annotations

import pytest
from fakes import LaunchingRunner, OneStepAtATime

from rayllm.errors import WorkerDiedError
from rayllm.executor.inproc import InprocExecutor
from rayllm.messages import StepPlan, StepResult


class _Runner(OneStepAtATime):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def num_blocks_available(self) -> int:
        return 33

    def start(self, num_blocks: int) -> None:
        self.calls.append(f"start {num_blocks}")

    def warm_up(self) -> None:
        self.calls.append("warm_up")

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step == 13:
            raise RuntimeError("out of\nmemory")
        self.calls.append(f"execute {plan.step}")
        return StepResult(plan.step, plan.epoch, plan.rows, b"", {}, {}, 0.0)


def _plan(step: int) -> StepPlan:
    return StepPlan(step, 0, b"", [], b"", b"", b"", b"", 0)


def test_the_runner_is_started_with_all_its_blocks_and_plans_run_in_order() -> None:
    runner = _Runner()
    executor = InprocExecutor(runner)
    assert (executor.num_blocks, executor.max_inflight_steps, executor.result_socket()) == (33, 1, None)
    executor.send(_plan(1))
    executor.send(_plan(2))
    assert [executor.receive(None).step, executor.receive(None).step] == [1, 2]
    assert runner.calls == ["start 33", "warm_up", "execute 1", "execute 2"]


def test_a_failing_runner_is_a_dead_worker_from_then_on() -> None:
    executor = InprocExecutor(_Runner())
    executor.check()
    executor.send(_plan(13))
    with pytest.raises(WorkerDiedError, match="worker rank 0 failed: RuntimeError: out of memory"):
        executor.receive(None)
    with pytest.raises(WorkerDiedError):
        executor.check()
    executor.send(_plan(14))
    with pytest.raises(WorkerDiedError):
        executor.receive(None)


def test_waiting_for_a_plan_that_was_never_sent_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        InprocExecutor(_Runner()).receive(0.0)


def test_on_a_gpu_a_sent_plan_is_launched_behind_the_one_before_it() -> None:
    runner = LaunchingRunner(bound=[4])
    executor = InprocExecutor(runner)
    assert executor.max_inflight_steps == 2
    executor.send(_plan(1))
    executor.send(_plan(2))
    assert runner.calls == ["start 33", "warm_up", "launch 1", "launch 2"]
    assert executor.receive(None).step == 1
    executor.send(_plan(3))
    assert [executor.receive(None).step, executor.receive(None).step] == [2, 3]
    assert runner.calls[4:] == ["finish 1", "launch 3", "finish 2", "finish 3"]


def test_a_failed_launch_loses_no_result_before_it_and_recovery_forgets_what_was_launched() -> None:
    runner = LaunchingRunner(fails_at_launch=[2])
    executor = InprocExecutor(runner)
    executor.send(_plan(1))
    executor.send(_plan(2))
    assert executor.receive(None).step == 1
    with pytest.raises(WorkerDiedError, match="no memory to launch 2"):
        executor.receive(None)
    executor.recover([0])
    executor.send(_plan(5))
    assert executor.receive(None).step == 5
    assert runner.calls[-3:] == ["start 33", "launch 5", "finish 5"]
