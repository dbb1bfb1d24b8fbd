from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fakes import FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.config import EngineConfig
from rayllm.engine.driver.admission import Admission
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.local import build_scheduler
from rayllm.errors import OverloadedError
from rayllm.messages import Deltas, DriverMessage, Finish, Submit
from rayllm.request import Request, unpack_ids
from rayllm.scheduler.scheduler import Scheduler


class _Queue:
    """An engine of one row and 64 KV blocks of 4 tokens, whose row is taken; no step runs."""

    def __init__(self, **settings: Any) -> None:
        config = fake_config(max_num_seqs=1, engine=settings)
        self.now = 1000.0
        self.scheduler: Scheduler = build_scheduler(config, 64)
        self.admission = Admission(config, self.scheduler, lambda: self.now, lambda: self.now)
        self.num_requests = 0
        self.submit([1] * 8)
        self.scheduler.plan()

    def submit(self, prompt: list[int], **changes: Any) -> None:
        """Raises what `Admission.check` raises; else it waits."""
        request = self.request(prompt, **changes)
        self.admission.check(request)
        self.scheduler.add(request)

    def pass_time(self, elapsed_s: float, num_started_tokens: int, num_plans: int = 100) -> None:
        """As if in that time sequences had come to run, others to half of their length, and some had always waited."""
        self.admission._throughput.look()
        self.now += elapsed_s
        self.scheduler.totals.num_started_tokens += num_started_tokens
        self.scheduler.totals.num_ended_tokens += 5
        self.scheduler.totals.num_ended_max_tokens += 10
        self.scheduler._in_flight.num_plans += num_plans
        self.admission._throughput.look()

    def request(self, prompt: list[int], n: int = 1, **changes: Any) -> Request:
        self.num_requests += 1
        request = make_request(prompt, request_id=str(self.num_requests), n=n)
        return msgspec.structs.replace(request, **changes)


def test_the_queue_takes_its_bound_of_requests_and_not_one_more() -> None:
    queue = _Queue(max_queued_requests=3)
    for _ in range(3):
        queue.submit([1, 2])
    with pytest.raises(OverloadedError, match=r"4 would wait, max_queued_requests=3; retry in about 1 s"):
        queue.submit([1, 2])
    assert queue.scheduler.num_waiting == 3


def test_each_choice_of_a_request_takes_a_place() -> None:
    queue = _Queue(max_queued_requests=4)
    queue.submit([1], n=3)
    with pytest.raises(OverloadedError):
        queue.submit([1], n=2)
    queue.submit([1])


def test_prompt_tokens_count_beyond_the_kv_that_is_free() -> None:
    queue = _Queue(max_queued_tokens=100)
    free = queue.scheduler.num_free_slots
    assert free == 64 * 4 - 8
    for _ in range(free // 100 + 1):  # the last of them waits beyond what is free
        queue.submit([1] * 100)
    with pytest.raises(OverloadedError, match="max_queued_tokens=100"):
        queue.submit([1] * 100)
    queue.submit([1] * (free % 100))


def test_what_can_run_at_once_is_not_queued() -> None:
    config = fake_config(max_num_seqs=8, engine={"max_queued_requests": 1})
    scheduler = build_scheduler(config, 64)
    admission = Admission(config, scheduler, lambda: 0.0, lambda: 0.0)
    for index in range(9):
        request = make_request([1], request_id=str(index))
        admission.check(request)
        scheduler.add(request)
    with pytest.raises(OverloadedError):
        admission.check(make_request([1], request_id="9"))


def test_a_request_larger_than_the_queue_is_served_when_no_one_waits() -> None:
    queue = _Queue(max_queued_requests=2, max_queued_tokens=4)
    queue.submit([1] * 100, n=10)


def test_no_bound_means_no_bound() -> None:
    queue = _Queue(max_queued_requests=None, max_queued_tokens=None)
    for _ in range(3000):
        queue.submit([1] * 10)
    assert queue.scheduler.num_waiting == 3000


def test_one_client_that_fills_the_queue_does_not_shut_out_another() -> None:
    queue = _Queue(max_queued_requests=10)
    for _ in range(10):
        queue.submit([1], client_key="greedy")
    with pytest.raises(OverloadedError):
        queue.submit([1], client_key="greedy")
    for _ in range(5):
        queue.submit([1], client_key="modest")
    with pytest.raises(OverloadedError):
        queue.submit([1], client_key="modest")


def test_many_clients_take_at_most_twice_the_bound() -> None:
    queue = _Queue(max_queued_requests=10)
    for index in range(100):
        try:
            queue.submit([1], client_key=str(index % 50))
        except OverloadedError:
            continue
    assert 10 <= queue.scheduler.num_waiting <= 20


def test_a_continued_request_is_let_in_whatever_the_queue() -> None:
    queue = _Queue(max_queued_requests=1)
    queue.submit([1])
    with pytest.raises(OverloadedError):
        queue.submit([1])
    queue.submit([1], emitted=(b"\5\0\0\0",))


def test_the_wait_is_the_prompt_tokens_ahead_by_the_rate_at_which_they_came_to_run() -> None:
    queue = _Queue(max_queued_requests=2)
    queue.submit([1] * 30)
    queue.submit([1] * 20)
    queue.pass_time(2.0, num_started_tokens=10)  # 5 a second
    with pytest.raises(OverloadedError, match="retry in about 10 s") as caught:
        queue.submit([1])
    assert caught.value.retry_after_s == 10.0


def test_the_pace_of_long_ago_counts_no_more() -> None:
    queue = _Queue(max_queued_requests=1)
    queue.submit([1] * 100)
    for _ in range(100):
        queue.pass_time(0.5, num_started_tokens=1000)
    for _ in range(100):
        queue.pass_time(0.5, num_started_tokens=50)
    with pytest.raises(OverloadedError) as caught:
        queue.submit([1])
    assert caught.value.retry_after_s == pytest.approx(1.0, rel=0.2)


def test_time_in_which_nothing_waited_says_nothing_of_the_pace() -> None:
    queue = _Queue(max_queued_requests=1)
    queue.submit([1] * 100)
    queue.pass_time(2.0, num_started_tokens=200)
    queue.now += 1000.0
    queue.scheduler.totals.num_slack_plans += 1  # at some moment in it nothing waited
    with pytest.raises(OverloadedError) as caught:
        queue.submit([1])
    assert caught.value.retry_after_s == pytest.approx(1.0)


def test_a_deadline_that_the_queue_ahead_cannot_meet_is_refused_at_once() -> None:
    queue = _Queue()
    queue.submit([1] * 50)
    queue.submit([1], deadline_s=queue.now + 0.1)  # nothing is measured yet: it may be met
    queue.pass_time(2.0, num_started_tokens=10)
    with pytest.raises(OverloadedError, match=r"in the 12\.0 s .* about 10\.2 s of other work") as caught:
        queue.submit([1], deadline_s=queue.now + 12)  # four fifths of it may be spent on waiting
    assert caught.value.retry_after_s == pytest.approx(10.2)
    queue.submit([1], deadline_s=queue.now + 13)


def test_the_time_that_a_request_itself_takes_counts_against_its_deadline() -> None:
    queue = _Queue()
    queue.submit([1] * 5)
    queue.pass_time(10.0, num_started_tokens=50, num_plans=10)  # a step of 1 s, and two of its four tokens
    with pytest.raises(OverloadedError, match=r"would run for 2\.0 s"):
        queue.submit([1], deadline_s=queue.now + 2.9)
    queue.submit([1], deadline_s=queue.now + 3.1)


def test_less_waits_before_a_request_of_higher_priority_or_of_a_client_with_less() -> None:
    queue = _Queue()
    queue.submit([1] * 50, client_key="a")
    queue.pass_time(2.0, num_started_tokens=10)
    for changes in ({"priority": -1, "client_key": "a"}, {"client_key": "b"}):
        queue.submit([1], deadline_s=queue.now + 1, **changes)
    with pytest.raises(OverloadedError):
        queue.submit([1], deadline_s=queue.now + 1, client_key="a")


def test_a_loop_tells_a_refused_client_how_long_to_wait_and_serves_the_others() -> None:
    sent: list[tuple[object, DriverMessage]] = []
    config = fake_config(max_num_seqs=2, engine=EngineConfig(max_queued_requests=2).model_dump())
    executor = FakeExecutor()
    loop = EngineLoop(config, build_scheduler(config, 64), executor, lambda *message: sent.append(message))
    requests = [make_request([1, 2, 3 + index]) for index in range(6)]
    for stream, request in enumerate(requests):
        loop.submit("a", Submit(stream, request))
    refused = [delta for _, message in sent if isinstance(message, Deltas) for delta in message.deltas]
    assert [delta.stream for delta in refused] == [4, 5]
    assert all((delta.finish or Finish("")).code == "overloaded" for delta in refused)
    assert all((delta.finish or Finish("")).retry_after_s == 1.0 for delta in refused)
    while loop.step():
        pass
    tokens: dict[int, list[int]] = {}
    for _, message in sent:
        assert isinstance(message, Deltas)
        for delta in message.deltas:
            tokens.setdefault(delta.stream, []).extend(unpack_ids(delta.token_ids))
    assert [tokens[stream] for stream in range(4)] == [expected_tokens(request) for request in requests[:4]]
