"""Real workers and drivers, really killed and stopped, under a mixed load. For longer: `python tests/chaos`."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from chaos.mixed_load import BOUND, LOAD, Answer, Engine, kill, moment_of, stop_for_a_while

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def engine(ray_cluster: None, llama_path: Path) -> Iterator[Engine]:
    engine = Engine(llama_path)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> list[Answer]:
    answers = engine.run()
    assert [len(answer.tokens) for answer in answers[:4]] == [60] * 4
    num_bound, num_last = sum(request.params.n for request in BOUND), LOAD[-1].params.n
    for answer in answers[-num_bound - num_last : -num_last]:
        assert answer.finishes[0].is_complete, "it did not come to its grammar's end"
    for answer in answers[-num_last:]:
        assert (answer.tokens, answer.finishes[0].code) == ([], "invalid_logits")
    return answers


@pytest.mark.parametrize(
    ("rank", "sign"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)]
)
def test_a_worker_killed_or_stopped_changes_no_answer(
    engine: Engine, undisturbed: list[Answer], rank: int, sign: signal.Signals
) -> None:
    _, before = engine.pids()
    earlier = engine.client.stats()
    moment = moment_of(undisturbed, random.Random(10 * rank + sign))
    stats = engine.check(undisturbed, moment, partial(kill, before[rank], sign))
    _, after = engine.pids()
    assert after[1 - rank] == before[1 - rank], "the survivor was not kept"
    assert not os.path.exists(f"/proc/{before[rank]}")  # also one that was stopped: nobody can wake it
    assert stats.num_faults == earlier.num_faults + 1
    assert stats.num_replays > earlier.num_replays
    assert "join" in stats.recovery_s


def test_a_worker_that_is_stopped_and_goes_on_changes_no_answer(engine: Engine, undisturbed: list[Answer]) -> None:
    _, ranks = engine.pids()
    timers: list[threading.Timer] = []
    for rank, seconds in ((0, 0.4), (1, 1.1)):  # before it is missed, and about when it is
        fault = lambda pid=ranks[rank], s=seconds: timers.append(stop_for_a_while(pid, s))  # noqa: E731
        engine.check(undisturbed, moment_of(undisturbed, random.Random(rank)), fault)
        timers[-1].join()


def test_a_second_fault_while_the_first_is_mended_changes_no_answer(engine: Engine, undisturbed: list[Answer]) -> None:
    driver, (first, second) = engine.pids()
    threads: list[threading.Thread] = []

    def fault() -> None:
        threads.append(engine.when_recovering(partial(kill, second), 0.5))
        kill(first)

    stats = engine.check(undisturbed, moment_of(undisturbed, random.Random(99)), fault)
    threads[0].join()
    after = engine.pids()
    assert after[0] == driver
    assert not {first, second} & {*after[1]}
    assert stats.num_faults > 0


def test_a_driver_killed_while_it_serves_and_while_it_mends_changes_no_answer(
    engine: Engine, undisturbed: list[Answer]
) -> None:
    first, ranks = engine.pids()
    engine.check(undisturbed, moment_of(undisturbed, random.Random(7)), partial(kill, first))
    second, (rank, _) = engine.pids()
    assert second != first
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks), "a worker outlived its driver"
    threads: list[threading.Thread] = []

    def fault() -> None:
        threads.append(engine.when_recovering(partial(kill, second), 0.3))
        kill(rank)

    engine.check(undisturbed, moment_of(undisturbed, random.Random(8)), fault)
    threads[0].join()
    assert engine.pids()[0] not in (first, second)
