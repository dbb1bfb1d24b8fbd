from __future__ import annotations

from dataclasses import replace

from rayllm.observability.statistics import StatisticsLine, StatisticsSample

IDLE = StatisticsSample(0, 0, 0, 0, num_blocks=200, num_blocks_used=0, prefix_queries=0, prefix_hits=0)


def test_the_line_has_vllms_form() -> None:
    line = StatisticsLine(0.0, IDLE, is_gpu=False)
    busy = StatisticsSample(500, 1234, 3, 2, num_blocks=200, num_blocks_used=50, prefix_queries=400, prefix_hits=100)

    assert line.look(10.0, busy) == (
        "Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 123.4 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )


def test_only_a_gpu_has_a_gpu_cache() -> None:
    text = StatisticsLine(0.0, IDLE, is_gpu=True).look(10.0, replace(IDLE, num_running=1))
    assert text is not None
    assert ", GPU KV cache usage: 0.0%," in text


def test_an_idle_engine_says_nothing_and_one_that_was_busy_says_so_once() -> None:
    line = StatisticsLine(0.0, IDLE, is_gpu=False)
    assert line.look(10.0, IDLE) is None
    burst = replace(IDLE, num_prompt_tokens=20, num_generation_tokens=40)
    assert line.look(20.0, burst) is not None
    assert line.look(30.0, burst) is None
    assert line.look(40.0, replace(burst, num_waiting=1)) is not None


def test_the_hit_rate_is_of_the_period_where_it_had_queries() -> None:
    line = StatisticsLine(0.0, replace(IDLE, prefix_queries=100, prefix_hits=0), is_gpu=False)
    later = replace(IDLE, num_running=1, prefix_queries=200, prefix_hits=80)
    assert "hit rate: 80.0%" in str(line.look(10.0, later))
    assert "hit rate: 40.0%" in str(line.look(20.0, later))
