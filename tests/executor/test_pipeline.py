"""Plans are launched ahead where the device computes beside the host, and finished in order, whatever fails."""

from __future__ import annotations

import pytest
from fakes import LaunchingRunner, OneStepAtATime, empty_plan

from rayllm.executor.pipeline import StepPipeline
from rayllm.messages import StepPlan, StepResult


class _Computing(OneStepAtATime):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps.append(plan.step)
        return StepResult(plan.step, plan.epoch, b"", b"", {}, {}, 0.5)


def _add(pipeline: StepPipeline, *steps: int) -> None:
    for step in steps:
        pipeline.add(empty_plan(step))


def _finish(pipeline: StepPipeline) -> int:
    finished = pipeline.finish()
    assert finished.plan.step == finished.result.step
    pipeline.launch_ahead()
    return finished.result.step


def test_step_2_is_launched_before_1_is_finished_and_3_as_soon_as_it_is() -> None:
    runner = LaunchingRunner()
    pipeline = StepPipeline(runner)
    _add(pipeline, 1)
    assert pipeline.may_launch_more
    _add(pipeline, 2, 3)
    assert not pipeline.may_launch_more
    assert runner.calls == ["launch 1", "launch 2"]
    assert [_finish(pipeline) for _ in range(3)] == [1, 2, 3]
    assert runner.calls == ["launch 1", "launch 2", "finish 1", "launch 3", "finish 2", "finish 3"]
    assert not pipeline


def test_a_plan_that_waits_for_the_one_before_it_is_launched_when_that_is_finished() -> None:
    runner = LaunchingRunner(bound=[2])
    pipeline = StepPipeline(runner)
    _add(pipeline, 1, 2)
    assert not pipeline.may_launch_more
    assert [_finish(pipeline), _finish(pipeline)] == [1, 2]
    assert runner.calls == ["launch 1", "finish 1", "launch 2", "finish 2"]


def test_a_runner_that_computes_in_finish_gets_a_plan_when_its_result_is_asked_for() -> None:
    runner = _Computing()
    pipeline = StepPipeline(runner)
    _add(pipeline, 1, 2)
    assert runner.steps == []
    assert not pipeline.may_launch_more
    assert _finish(pipeline) == 1
    assert runner.steps == [1]
    assert len(pipeline) == 1


def test_a_failed_launch_is_told_in_its_turn_and_nothing_is_launched_behind_it() -> None:
    runner = LaunchingRunner(fails_at_launch=[2])
    pipeline = StepPipeline(runner)
    _add(pipeline, 1, 2, 3)
    assert _finish(pipeline) == 1
    assert pipeline.is_done
    with pytest.raises(RuntimeError, match="no memory to launch 2"):
        pipeline.finish()
    assert "launch 3" not in runner.calls


def test_a_cleared_pipeline_has_no_plans_and_takes_new_ones() -> None:
    runner = LaunchingRunner()
    pipeline = StepPipeline(runner)
    _add(pipeline, 1, 2, 3)
    pipeline.clear()
    assert not pipeline
    _add(pipeline, 7)
    assert not pipeline.is_done
    runner.done.add(7)
    assert pipeline.is_done
    assert _finish(pipeline) == 7
