from __future__ import annotations

import pytest

from rayllm.engine.driver.supervisor import COMPILING_STEPS_S, FIRST_STEPS_S, MIN_LIMIT_S, NEW_SIZE_LIMIT_S, StepTimes


def _times(*steps: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for num_tokens, elapsed_s in steps:
        times.note(num_tokens, elapsed_s)
    return times


def test_the_first_steps_have_long() -> None:
    assert StepTimes().limit_s(1) == FIRST_STEPS_S
    assert StepTimes(COMPILING_STEPS_S).limit_s(1) == COMPILING_STEPS_S
    assert _times(*[(8, 0.01)] * 7).limit_s(8) == FIRST_STEPS_S
    assert _times(*[(8, 0.01)] * 8).limit_s(8) == MIN_LIMIT_S


def test_a_step_may_take_twenty_times_the_slowest_of_its_size_and_no_less_than_a_second() -> None:
    assert _times(*[(8, 0.01)] * 50, (8, 0.2)).limit_s(9) == pytest.approx(4.0)
    assert _times(*[(8, 0.01)] * 50, (8, 0.02)).limit_s(9) == MIN_LIMIT_S


def test_only_the_last_hundred_steps_count() -> None:
    assert _times((8, 3.0), *[(8, 0.01)] * 100).limit_s(8) == MIN_LIMIT_S


def test_a_slow_prefill_does_not_lengthen_the_wait_for_a_decode_step() -> None:
    times = _times(*[(8, 0.01)] * 50, *[(2000, 1.0)] * 5)
    assert times.limit_s(8) == MIN_LIMIT_S
    assert times.limit_s(1500) == pytest.approx(20.0)


def test_a_size_between_two_known_ones_may_take_what_the_larger_may() -> None:
    assert _times(*[(8, 0.01)] * 50, (2000, 1.0)).limit_s(200) == pytest.approx(20.0)


def test_a_larger_plan_than_any_before_has_longer_in_proportion() -> None:
    times = _times(*[(8, 0.01)] * 50)
    assert times.limit_s(64) == NEW_SIZE_LIMIT_S
    assert times.limit_s(2048) == pytest.approx(20 * 0.01 * 256)
