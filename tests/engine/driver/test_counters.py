"""What the loop tells of itself, for `/metrics`: with faults, refusals and times as they really come about."""

from __future__ import annotations

import msgspec
import pytest
from fakes import FakeExecutor, fake_config, make_request

from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.local import build_scheduler
from rayllm.messages import Deltas, DriverMessage, EngineStats, IngressReport, StatsQuery, Submit, Times
from rayllm.observability.metrics import Metrics


class _Timed:
    """A loop whose steps take a second each."""

    def __init__(self, executor: FakeExecutor, **changes: object):
        self.now = 0.0
        self.said: list[tuple[object, DriverMessage]] = []
        config = fake_config(**changes)
        self.loop = EngineLoop(
            config,
            build_scheduler(config, executor.num_blocks),
            executor,
            lambda client, message: self.said.append((client, message)),
            clock=lambda: self.now,
        )

    def run(self, limit: int = 1000) -> EngineStats:
        for _ in range(limit):
            self.now += 1
            if not self.loop.step():
                return self.loop.stats()
        raise AssertionError("the loop never became idle")

    def times(self) -> dict[int, list[Times]]:
        found: dict[int, list[Times]] = {}
        for _, message in self.said:
            for delta in message.deltas if isinstance(message, Deltas) else ():
                found.setdefault(delta.stream, []).extend([delta.times] if delta.times is not None else [])
        return found


def test_a_choices_first_delta_says_how_long_it_waited_and_was_computed() -> None:
    timed = _Timed(FakeExecutor(max_inflight_steps=1), max_num_seqs=1)
    timed.loop.submit("a", Submit(0, make_request([1, 2], max_tokens=3)))
    timed.loop.submit("a", Submit(1, make_request([1, 2], max_tokens=3)))
    timed.run()

    # A turn is a second and a step: plan and result in the same turn. The second waits for the first's three.
    assert timed.times() == {0: [Times(1.0, 0.0)], 1: [Times(4.0, 0.0)]}


def test_a_fault_does_not_say_the_times_again() -> None:
    timed = _Timed(FakeExecutor(dies=[3]))
    timed.loop.submit("a", Submit(0, make_request([1, 2], max_tokens=5, n=2)))
    timed.run()

    assert {stream: len(times) for stream, times in timed.times().items()} == {0: 1, 1: 1}


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_faults_are_told_by_kind_with_their_detection_and_gap(kind: str) -> None:
    timed = _Timed(FakeExecutor(dies=[3] if kind == "crash" else [], hangs=[3] if kind == "hang" else []))
    timed.loop.submit("a", Submit(0, make_request([1, 2, 3], max_tokens=6)))
    stats = timed.run()

    assert stats.faults == {"crash": 0, "hang": 0, kind: 1}
    assert stats.fault_detections is not None
    assert stats.fault_gaps is not None
    assert (sum(stats.fault_detections.counts), sum(stats.fault_gaps.counts)) == (1, 1)
    assert stats.fault_gaps.total == stats.gap_s > 0
    assert stats.num_replays == 1
    assert stats.num_recomputed_tokens > 0
    text = Metrics("m").render(stats).decode()
    assert f'rayllm:worker_faults_total{{engine="0",kind="{kind}",model_name="m"}} 1.0' in text
    assert 'rayllm:fault_gap_seconds_count{engine="0",model_name="m"} 1.0' in text


def test_refusals_are_told_by_the_limit_that_they_met() -> None:
    timed = _Timed(FakeExecutor(), max_num_seqs=1, engine={"max_queued_requests": 1})
    for stream in range(4):
        timed.loop.submit("a", Submit(stream, make_request([1, 2], max_tokens=2)))
    assert timed.run().refusals == {"max_queued_requests": 2}


def test_steps_tell_their_tokens_and_the_workers_idle_time_but_not_that_without_work() -> None:
    class _Idle(FakeExecutor):
        def receive(self, timeout_s: float | None):  # type: ignore[no-untyped-def]
            return msgspec.structs.replace(super().receive(timeout_s), waited_s=0.25)

    timed = _Timed(_Idle())
    for stream in range(2):  # one after the other: idle between them
        timed.loop.submit("a", Submit(stream, make_request([1, 2, 3, 4], max_tokens=3)))
        timed.run()
    stats = timed.loop.stats()

    assert stats.step_tokens is not None
    assert stats.step_gaps is not None
    assert (sum(stats.step_tokens.counts), stats.step_tokens.total) == (stats.num_steps, 2 * (4 + 2))
    assert stats.num_steps == 6
    assert (sum(stats.step_gaps.counts), stats.step_gaps.total) == (4, 1.0)
    assert stats.step_wait_s == 1.0


def test_what_one_client_reports_the_others_are_told() -> None:
    timed = _Timed(FakeExecutor())
    report = IngressReport("a", {}, {})
    timed.loop.submit("a", report)

    timed.loop.submit("a", StatsQuery(1))
    timed.loop.submit("b", StatsQuery(2))
    timed.loop.client_gone("a")
    timed.loop.submit("b", StatsQuery(3))

    stats = [message for _, message in timed.said if isinstance(message, EngineStats)]
    assert [found.reports for found in stats] == [[], [report], []]


def _ids_of(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [vars(record)["request_id"] for record in caplog.records if words in record.getMessage()]


def _named(stream: int, **fields: object) -> Submit:
    request = make_request([1, 2, 3], max_tokens=6)
    return Submit(stream, msgspec.structs.replace(request, log_id=f"job-{stream}", **fields))


def test_what_befalls_a_request_is_logged_under_the_clients_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    timed = _Timed(FakeExecutor(dies=[2]), max_num_seqs=1, engine={"max_queued_requests": 1})
    for stream in range(3):
        timed.loop.submit("a", _named(stream))
    timed.run(limit=1000)
    timed.loop.submit("b", _named(7))
    timed.loop.client_gone("b")
    timed.loop.submit("a", _named(8, deadline_s=1.0))
    timed.loop.step()

    assert _ids_of(caplog, "refused (overloaded)") == ["job-2"]
    assert _ids_of(caplog, "running when a worker failed") == ["job-0"]
    assert _ids_of(caplog, "client disconnected") == ["job-7"]
    assert _ids_of(caplog, "ended (deadline_exceeded)") == ["job-8"]


def test_the_request_that_is_given_up_is_named(caplog: pytest.LogCaptureFixture) -> None:
    timed = _Timed(FakeExecutor(dies=[1, 3, 5]))
    timed.loop.submit("a", _named(5))
    timed.run()

    assert _ids_of(caplog, "ended (poison_request)") == ["job-5"]
