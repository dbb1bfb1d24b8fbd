from __future__ import annotations

import pytest

from rayllm.engine.driver.step_times import (
    COMPILING_STEPS_S,
    FIRST_STEPS_S,
    MIN_LIMIT_S,
    NEW_SIZE_LIMIT_S,
    SentStep,
    StepTimes,
    padded_size,
)
from rayllm.messages import RowParams, RowStart, StepPlan
from rayllm.request import pack_ids
from rayllm.runner.graphs import MAX_MIXED_TOKENS, mixed_sizes


def _times(*steps: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for num_tokens, elapsed_s in steps:
        times.note(SentStep(num_tokens), elapsed_s)
    return times


def _limit_s(times: StepTimes, num_tokens: int) -> float:
    return times.limit_s(SentStep(num_tokens))


def test_the_first_steps_have_long() -> None:
    assert _limit_s(StepTimes(), 1) == FIRST_STEPS_S
    assert _limit_s(StepTimes(compiles=True), 1) == COMPILING_STEPS_S
    assert _limit_s(_times(*[(8, 0.01)] * 7), 8) == FIRST_STEPS_S
    assert _limit_s(_times(*[(8, 0.01)] * 8), 8) == MIN_LIMIT_S


def test_a_step_may_take_twenty_times_the_slowest_of_its_size_and_no_less_than_a_second() -> None:
    assert _limit_s(_times(*[(8, 0.01)] * 50, (8, 0.2)), 9) == pytest.approx(4.0)
    assert _limit_s(_times(*[(8, 0.01)] * 50, (8, 0.02)), 9) == MIN_LIMIT_S


def test_only_the_last_hundred_steps_count() -> None:
    assert _limit_s(_times((8, 3.0), *[(8, 0.01)] * 100), 8) == MIN_LIMIT_S


def test_a_slow_prefill_does_not_lengthen_the_wait_for_a_decode_step() -> None:
    times = _times(*[(8, 0.01)] * 50, *[(2000, 1.0)] * 5)
    assert _limit_s(times, 8) == MIN_LIMIT_S
    assert _limit_s(times, 1500) == pytest.approx(20.0)


def test_a_size_between_two_known_ones_may_take_what_the_larger_may() -> None:
    assert _limit_s(_times(*[(8, 0.01)] * 50, (2000, 1.0)), 200) == pytest.approx(20.0)


def test_a_larger_plan_than_any_before_has_longer_in_proportion() -> None:
    times = _times(*[(8, 0.01)] * 50)
    assert _limit_s(times, 64) == NEW_SIZE_LIMIT_S
    assert _limit_s(times, 2048) == pytest.approx(20 * 0.01 * 256)


def _decode(num_rows: int, *new: RowParams) -> StepPlan:
    starts = [RowStart(row, pack_ids([1]), 1, 0, [], params, 0, 0) for row, params in enumerate(new)]
    rows = pack_ids(range(num_rows))
    return StepPlan(0, 0, b"", starts, b"", b"", rows, pack_ids([1] * num_rows), num_rows)


def _compiling(*plans: StepPlan) -> StepTimes:
    """After twenty steps of 10 ms of each plan, on a GPU."""
    times = StepTimes(compiles=True)
    for plan in plans:
        for _ in range(20):
            times.note(times.sent(plan), 0.01)
    return times


def _limits(times: StepTimes, *plans: StepPlan) -> list[float]:
    return [times.limit_s(times.sent(plan)) for plan in plans]


def test_on_a_gpu_the_first_steps_of_a_size_may_compile_and_capture() -> None:
    times = _compiling(_decode(17), _decode(5))
    assert _limits(times, _decode(17), _decode(20), _decode(5)) == [MIN_LIMIT_S] * 3
    assert _limits(times, _decode(25), _decode(4)) == [COMPILING_STEPS_S] * 2
    for elapsed_s in (9.0, 3.0):  # the first compiles, the second is captured: neither says how long others take
        times.note(times.sent(_decode(25)), elapsed_s)
    assert _limits(times, _decode(25)) == [MIN_LIMIT_S]


def test_on_a_gpu_a_rule_of_sampling_that_is_new_may_compile() -> None:
    times = _compiling(_decode(4), _decode(4, RowParams(top_p=0.5)))
    known, new = RowParams(top_p=0.9), RowParams(top_p=0.9, presence_penalty=1)
    assert _limits(times, _decode(4, known), _decode(4, known, new)) == [MIN_LIMIT_S, COMPILING_STEPS_S]


def test_after_a_recovery_kernels_are_compiled_and_graphs_captured_anew() -> None:
    times = _compiling(_decode(4))
    times.forget_kinds()
    assert _limits(times, _decode(4)) == [COMPILING_STEPS_S]


def test_a_cpu_has_no_kinds_of_steps() -> None:
    assert StepTimes().sent(_decode(4, RowParams(top_p=0.5))) == SentStep(4)


def test_a_step_is_of_the_size_that_workers_pad_it_to() -> None:
    sizes = mixed_sizes(MAX_MIXED_TOKENS)
    assert {padded_size(num_tokens) for num_tokens in range(1, MAX_MIXED_TOKENS + 1)} == {*sizes}
    assert all(padded_size(size) == size for size in sizes)
    assert padded_size(MAX_MIXED_TOKENS + 1) == MAX_MIXED_TOKENS + 256
