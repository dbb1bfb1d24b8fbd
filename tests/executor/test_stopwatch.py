from __future__ import annotations

from rayllm.executor.stopwatch import Stopwatch, in_words


def test_laps_are_seconds_since_the_one_before_and_add_up_by_stage() -> None:
    times = iter([10.0, 10.5, 12.5, 12.75])
    watch = Stopwatch(lambda: next(times))
    for stage in ("load", "join", "load"):
        watch.lap(stage)
    assert watch.laps == {"load": 0.75, "join": 2.0}
    assert in_words(watch.laps) == "load 0.75, join 2.00"
