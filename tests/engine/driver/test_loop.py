from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

import msgspec
import pytest
from fakes import EOS_ID, FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.engine.driver.loop import MAX_FAULTS_OF_REQUEST, MAX_QUARANTINE_RELEASES, QUARANTINE_TOKENS, EngineLoop
from rayllm.engine.driver.step_times import MIN_LIMIT_S
from rayllm.engine.driver.supervisor import EXTENDED_LIMIT_S
from rayllm.engine.owner.local import build_scheduler
from rayllm.errors import WorkerDiedError
from rayllm.messages import Abort, Deltas, DriverMessage, EngineStats, Finish, StatsQuery, StepPlan, StepResult, Submit
from rayllm.request import Request, pack_ids, unpack_ids


class _Clients:
    """Collects what the loop sends: tokens, finishes and the size of each message."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[object, int], list[int]] = defaultdict(list)
        self.finishes: dict[tuple[object, int], Finish] = {}
        self.messages: list[tuple[object, DriverMessage]] = []

    def __call__(self, client: object, message: DriverMessage) -> None:
        self.messages.append((client, message))
        if isinstance(message, Deltas):
            for delta in message.deltas:
                assert (client, delta.stream) not in self.finishes, "a delta after the finish"
                self.tokens[client, delta.stream] += unpack_ids(delta.token_ids)
                if delta.finish is not None:
                    self.finishes[client, delta.stream] = delta.finish


def _loop(executor: FakeExecutor, **changes: object) -> tuple[EngineLoop, _Clients]:
    config = fake_config(**changes)
    clients = _Clients()
    now = [0.0]
    loop = EngineLoop(config, build_scheduler(config, executor.num_blocks), executor, clients, lambda: now[0])
    loop.now = now  # type: ignore[attr-defined]
    return loop, clients


def _run(loop: EngineLoop, limit: int = 1000) -> None:
    for _ in range(limit):
        if not loop.step():
            return
    raise AssertionError("the loop never became idle")


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_of_several_clients_each_get_their_own_tokens(depth: int) -> None:
    loop, clients = _loop(FakeExecutor(max_inflight_steps=depth))
    requests: dict[tuple[object, int], Request] = {}
    for client in ("a", "b"):
        for stream in range(4):
            request = make_request(
                [1, 2, 3 + stream], request_id="same id everywhere", max_tokens=3 + stream, seed=stream
            )
            requests[client, stream] = request
            loop.submit(client, Submit(stream, request))
    _run(loop)
    for key, request in requests.items():
        assert clients.tokens[key] == expected_tokens(request)
        assert clients.finishes[key].reason == "length"


def test_choices_of_a_request_are_streams_in_order() -> None:
    loop, clients = _loop(FakeExecutor())
    request = make_request([5, 6, 7], n=3)
    loop.submit("a", Submit(10, request))
    _run(loop)
    assert [clients.tokens["a", 10 + choice] for choice in range(3)] == [expected_tokens(request, c) for c in range(3)]


def test_one_message_a_step_carries_all_deltas_of_a_client() -> None:
    loop, clients = _loop(FakeExecutor())
    for stream in range(6):
        loop.submit("a", Submit(stream, make_request([stream + 1], max_tokens=5)))
    _run(loop)
    assert len(clients.messages) <= 5
    assert max(len(message.deltas) for _, message in clients.messages if isinstance(message, Deltas)) == 6


def test_the_next_step_is_sent_before_the_result_of_this_one_is_taken() -> None:
    executor = FakeExecutor(max_inflight_steps=2)
    loop, clients = _loop(executor)
    loop.submit("a", Submit(0, make_request([1, 2], max_tokens=4)))
    assert loop.step()
    assert len(executor.sent) == 1
    assert not clients.messages
    assert loop.step()
    assert len(executor.sent) == 2
    assert len(clients.messages) == 1


def test_a_known_length_never_costs_a_step_too_many() -> None:
    executor = FakeExecutor(max_inflight_steps=2)
    loop, _ = _loop(executor)
    loop.submit("a", Submit(0, make_request([1, 2], max_tokens=4)))
    _run(loop)
    assert len([plan for plan in executor.sent if plan.rows]) == 4


def test_an_aborted_stream_gets_nothing_more_and_frees_its_blocks() -> None:
    loop, clients = _loop(FakeExecutor(), engine={"enable_prefix_caching": False})
    loop.submit("a", Submit(0, make_request([1] * 20, max_tokens=50)))
    for _ in range(5):
        loop.step()
    num_tokens = len(clients.tokens["a", 0])
    loop.submit("a", Abort(0))
    _run(loop)
    assert len(clients.tokens["a", 0]) == num_tokens
    assert loop.stats().num_blocks_used == 0


@pytest.mark.parametrize("is_continued", [True, False])
def test_a_continued_request_is_said_to_run_before_the_step_that_it_begins_with(is_continued: bool) -> None:
    executor = FakeExecutor()
    loop, clients = _loop(executor, max_num_seqs=1)
    loop.submit("a", Submit(0, make_request([1], max_tokens=2)))
    request = make_request([2], max_tokens=2)
    loop.submit("a", Submit(1, msgspec.structs.replace(request, emitted=(b"",) if is_continued else ())))
    said_before: list[int] = []
    send = executor.send

    def note_and_send(plan: StepPlan) -> None:
        said_before.append(sum(delta.is_start for _, m in clients.messages for delta in m.deltas))  # type: ignore
        send(plan)

    executor.send = note_and_send  # type: ignore[method-assign]
    _run(loop)
    assert said_before == ([0, 0, 1, 1] if is_continued else [0, 0, 0, 0])
    assert clients.tokens["a", 1] == expected_tokens(request)


def test_aborting_one_choice_leaves_the_others() -> None:
    loop, clients = _loop(FakeExecutor())
    request = make_request([1, 2, 3], n=2, max_tokens=6)
    loop.submit("a", Submit(0, request))
    loop.submit("a", Abort(0))
    _run(loop)
    assert clients.tokens["a", 0] == []
    assert clients.tokens["a", 1] == expected_tokens(request, 1)


def test_a_client_that_left_takes_its_requests_with_it() -> None:
    loop, clients = _loop(FakeExecutor())
    for client in ("a", "b"):
        loop.submit(client, Submit(0, make_request([1, 2], max_tokens=20)))
    loop.step()
    loop.step()
    loop.client_gone("a")
    _run(loop)
    assert ("a", 0) not in clients.finishes
    assert clients.finishes["b", 0].reason == "length"


@pytest.mark.parametrize(
    ("request_", "code", "word"),
    [
        (make_request([1, 1000]), None, "1000"),
        (make_request([1, -1]), None, "-1"),
        (make_request([]), None, "empty"),
        (make_request([1] * 100, max_tokens=29), "context_length_exceeded", "128"),
        (make_request([1], stop_token_ids=(1000,)), None, "stop_token_ids"),
        (make_request([1], logit_bias={2000: 1}), None, "logit_bias"),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_refused_at_once(
    request_: Request, code: str | None, word: str
) -> None:
    loop, clients = _loop(FakeExecutor())
    loop.submit("a", Submit(0, request_))
    finish = clients.finishes["a", 0]
    assert (finish.reason, finish.code) == ("error", code)
    assert finish.message is not None
    assert word in finish.message
    assert not loop.step()


def test_a_worker_lost_for_good_ends_every_open_request_with_rank_and_reason() -> None:
    loop, clients = _loop(FakeExecutor(dies=[3], recovers=False))
    for stream in range(3):
        loop.submit("a", Submit(stream, make_request([1, 2, stream], max_tokens=20)))
    with pytest.raises(WorkerDiedError, match="rank 1"):
        _run(loop)
    for stream in range(3):
        finish = clients.finishes["a", stream]
        assert (finish.reason, finish.code) == ("error", "worker_died")
        assert "rank 1" in str(finish.message)
        assert "killed by the test" in str(finish.message)
    loop.submit("a", Submit(9, make_request([1])))
    assert clients.finishes["a", 9].code == "worker_died"
    stats = loop.stats()
    assert not stats.healthy
    assert "rank 1" in stats.reason


_MIXED = [
    make_request([1, 2, 3], max_tokens=9, n=3, seed=5),
    make_request([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=5),
    make_request([7] * 90, max_tokens=6),
    make_request([9], max_tokens=30, stop_token_ids=(expected_tokens(make_request([9], max_tokens=12))[-1],)),
]


def _run_mixed(executor: FakeExecutor) -> tuple[EngineLoop, _Clients]:
    loop, clients = _loop(executor, max_num_batched_tokens=32)
    for number, request in enumerate(_MIXED):
        loop.submit("a", Submit(10 * number, request))
    _run(loop)
    return loop, clients


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_a_fault_at_any_step_changes_no_token(kind: str, depth: int) -> None:
    """Every boundary in turn: mixed sizes, several choices, a prompt in chunks, a stop token."""
    undisturbed = FakeExecutor(max_inflight_steps=depth)
    _, expected = _run_mixed(undisturbed)
    for step in range(1, len(undisturbed.sent) + 1):
        loop, clients = _run_mixed(FakeExecutor(max_inflight_steps=depth, **{kind: [step]}))  # type: ignore[arg-type]
        assert clients.tokens == expected.tokens
        assert clients.finishes == expected.finishes
        stats = loop.stats()
        assert (stats.num_faults, stats.healthy, stats.recovering) == (1, True, False)
        assert stats.num_replays > 0 or step == len(undisturbed.sent)  # what the last one computes is past a stop token
        assert stats.num_blocks_used == 0
    assert expected.tokens["a", 0] == expected_tokens(_MIXED[0])


def test_a_second_fault_before_any_step_came_changes_no_token() -> None:
    _, expected = _run_mixed(FakeExecutor())
    loop, clients = _run_mixed(FakeExecutor(dies=[4, 6]))
    assert loop.stats().num_faults == 2
    assert (clients.tokens, clients.finishes) == (expected.tokens, expected.finishes)


def test_silent_ranks_are_replaced_and_no_others() -> None:
    executor = FakeExecutor(hangs=[4], silent=[0])
    _run_mixed(executor)
    assert executor.recovered == [[0]]


def test_where_all_ranks_live_the_step_is_waited_for_once_more_and_then_all_are_replaced() -> None:
    class _Slow(FakeExecutor):
        def __init__(self, wait_s: float) -> None:
            super().__init__(silent=[])
            self.left_s = wait_s

        def receive(self, timeout_s: float | None) -> StepResult:
            if self._plans[0].step == 12 and self.left_s > 0:
                self.left_s -= timeout_s or 0
                raise TimeoutError("no result")
            return super().receive(timeout_s)

    _, expected = _run_mixed(FakeExecutor())
    slow = _Slow(MIN_LIMIT_S)
    loop, clients = _run_mixed(slow)
    assert (slow.recovered, loop.stats().num_faults) == ([], 0)
    assert clients.tokens == expected.tokens
    stuck = _Slow(MIN_LIMIT_S + EXTENDED_LIMIT_S)
    loop, clients = _run_mixed(stuck)
    assert (stuck.recovered, loop.stats().num_faults) == ([[0, 1]], 1)
    assert clients.tokens == expected.tokens


def test_a_rank_that_is_seen_to_be_stopped_is_not_waited_for() -> None:
    class _Stopped(FakeExecutor):
        waited_s = 0.0

        def receive(self, timeout_s: float | None) -> StepResult:
            if self._plans[0].step in self._hangs:
                self.waited_s += timeout_s or 0
            return super().receive(timeout_s)

        def stopped_ranks(self) -> list[int]:
            return [1]

    executor = _Stopped(hangs=[1])  # of the first steps, which may take long
    _run_mixed(executor)
    assert (executor.recovered, executor.waited_s) == ([[1]], 1.0)


def test_cached_tokens_are_said_once() -> None:
    def said(clients: _Clients) -> int:
        messages = [message for _, message in clients.messages if isinstance(message, Deltas)]
        return sum(delta.num_cached_tokens for message in messages for delta in message.deltas)

    assert said(_run_mixed(FakeExecutor(dies=[6]))[1]) == said(_run_mixed(FakeExecutor())[1])


class _Poisoned(FakeExecutor):
    """Rank 1 dies whenever a sequence that begins with 13 is computed."""

    def receive(self, timeout_s: float | None) -> StepResult:
        plan = self._plans[0]
        rows = {row: state["tokens"] for row, state in self._rows.items()}
        rows |= {new.row: list(unpack_ids(new.tokens)) for new in plan.new_rows}
        if any(rows[row][0] == 13 for row in unpack_ids(plan.rows)):
            raise WorkerDiedError(1, "killed by a request")
        return super().receive(timeout_s)


def test_a_request_that_kills_its_worker_three_times_is_refused_alone() -> None:
    executor = _Poisoned()
    loop, clients = _loop(executor)
    innocent = {stream: make_request([stream + 1, 2], max_tokens=12, seed=stream) for stream in range(5)}
    for stream, request in innocent.items():
        loop.submit("a", Submit(stream, request))
    loop.submit("b", Submit(0, make_request([13, 1], max_tokens=12)))
    _run(loop)
    assert clients.finishes["b", 0].code == "poison_request"
    assert clients.tokens["b", 0] == []
    for stream, request in innocent.items():
        assert clients.finishes["a", stream].reason == "length"
        assert clients.tokens["a", stream] == expected_tokens(request)
    assert len(executor.recovered) >= 3
    assert loop.stats().healthy


def test_those_that_ran_at_two_faults_run_together_again_once_each_has_run_by_itself_for_a_while() -> None:
    executor = FakeExecutor(num_blocks=512, dies=[10, 12])
    loop, clients = _loop(executor)
    requests = {stream: make_request([stream + 1], max_tokens=100, seed=stream) for stream in range(8)}
    for stream, request in requests.items():
        loop.submit("a", Submit(stream, request))
    _run(loop)
    assert clients.tokens == {("a", stream): expected_tokens(request) for stream, request in requests.items()}
    sizes = [len(unpack_ids(plan.rows)) for plan in executor.sent]
    assert sizes[20] == 1
    assert max(sizes[20:]) == 3, "the third begins before the first has ended"
    assert len(sizes) < 10 + 8 * QUARANTINE_TOKENS + 100


def test_a_request_that_kills_its_worker_now_and_then_is_refused_in_the_end() -> None:
    class _Sometimes(FakeExecutor):
        """Rank 1 dies each time that the request has come 40 tokens further."""

        num_left = 40

        def receive(self, timeout_s: float | None) -> StepResult:
            self.num_left -= 1
            if not self.num_left:
                self.num_left = 40
                raise WorkerDiedError(1, "killed by a request")
            return super().receive(timeout_s)

    loop, clients = _loop(_Sometimes(num_blocks=512), max_model_len=2000)
    loop.submit("a", Submit(0, make_request([1], max_tokens=1000)))
    _run(loop)
    assert clients.finishes["a", 0].code == "poison_request"
    assert loop.stats().num_faults == MAX_FAULTS_OF_REQUEST + MAX_QUARANTINE_RELEASES


def test_a_machine_that_fails_at_every_step_is_given_up_with_rank_and_log() -> None:
    executor = FakeExecutor(dies=range(1000))
    loop, clients = _loop(executor)
    for stream in range(100):
        loop.submit("a", Submit(stream, make_request([1, stream], max_tokens=12)))
    with pytest.raises(WorkerDiedError, match=r"rank 1 failed: killed by the test; 9 faults .*rank 1's log is empty"):
        _run(loop)
    assert not loop.stats().healthy
    assert len(clients.finishes) == 100


def test_answers_of_an_old_epoch_are_dropped() -> None:
    class _Late(FakeExecutor):
        late: StepResult | None = None

        def receive(self, timeout_s: float | None) -> StepResult:
            if self.recovered and self.late is not None:
                late, self.late = self.late, None
                return late
            if self._plans[0].step == 4:
                self.late = StepResult(4, 0, pack_ids([0]), pack_ids([77]), {}, {}, 0.0)
            return super().receive(timeout_s)

    _, expected = _run_mixed(FakeExecutor())
    _, clients = _run_mixed(_Late(dies=[4]))
    assert clients.tokens == expected.tokens


def test_clients_are_answered_while_a_worker_is_replaced() -> None:
    release, woken = threading.Event(), threading.Event()

    class _SlowToRecover(FakeExecutor):
        def recover(self, lost: Iterable[int]) -> dict[str, float]:
            release.wait(10.0)
            return super().recover(lost)

    config, executor, clients = fake_config(), _SlowToRecover(dies=[3]), _Clients()
    scheduler = build_scheduler(config, executor.num_blocks)
    loop = EngineLoop(config, scheduler, executor, clients, wake=woken.set)
    request = make_request([1, 2], max_tokens=9)
    loop.submit("a", Submit(0, request))
    _run(loop)
    stats = loop.stats()
    assert (stats.recovering, stats.healthy, stats.num_faults, loop.is_interrupted) == (True, False, 1, True)
    assert stats.reason == "worker rank 1 failed: killed by the test; it is being replaced"
    late = make_request([3, 4], max_tokens=5)
    loop.submit("a", Submit(1, late))
    loop.submit("a", Submit(2, late))
    loop.submit("a", Abort(2))
    assert not loop.step()
    release.set()
    assert woken.wait(10.0)
    _run(loop)
    assert clients.tokens == {("a", 0): expected_tokens(request), ("a", 1): expected_tokens(late)}
    assert loop.stats().gap_s > 0
    assert list(loop.stats().recovery_s) == ["all", "first step"]


def test_a_worker_lost_without_work_is_replaced_and_one_that_is_lost_again_and_again_is_given_up() -> None:
    class _Lost(FakeExecutor):
        def check(self) -> None:
            raise WorkerDiedError(0, "out of memory")

    executor = _Lost()
    loop, _ = _loop(executor)
    for _ in range(3):
        loop.check()
        loop.step()
    assert executor.recovered == [[0]] * 3
    loop.check()
    with pytest.raises(WorkerDiedError, match="4 faults in a row without a finished step; rank 0's log"):
        loop.step()
    loop.check()
    assert not loop.stats().healthy


def test_work_that_waits_without_progress_is_not_healthy() -> None:
    config, executor, now = fake_config(), FakeExecutor(), [100.0]
    loop = EngineLoop(config, build_scheduler(config, 64), executor, _Clients(), clock=lambda: now[0])
    now[0] = 1000.0
    assert (loop.stats().healthy, loop.stats().stalled_s) == (True, 0.0)
    loop.submit("a", Submit(0, make_request([1, 2], max_tokens=9)))
    loop.step()
    now[0] = 1003.0
    assert (loop.stats().healthy, loop.stats().stalled_s) == (True, 3.0)
    now[0] = 1200.0
    assert (loop.stats().healthy, loop.stats().reason) == (
        False,
        "no step finished for 200.0 s while requests were waiting",
    )
    _run(loop)
    assert loop.stats().healthy


def test_a_passed_deadline_ends_the_request_with_a_reason() -> None:
    loop, clients = _loop(FakeExecutor())
    request = msgspec.structs.replace(make_request([1, 2], max_tokens=50), deadline_s=10.0)
    loop.submit("a", Submit(0, request))
    loop.step()
    loop.step()
    loop.now[0] = 11.0  # type: ignore[attr-defined]
    _run(loop)
    assert clients.finishes["a", 0].code == "deadline_exceeded"
    assert loop.stats().num_running == 0


def test_figures_count_what_was_done() -> None:
    loop, clients = _loop(FakeExecutor())
    loop.submit("a", Submit(0, make_request([1, 2, 3], max_tokens=5)))
    _run(loop)
    loop.submit("a", StatsQuery(7))
    stats = clients.messages[-1][1]
    assert isinstance(stats, EngineStats)
    assert (stats.ticket, stats.num_prompt_tokens, stats.num_generation_tokens, stats.num_steps) == (7, 3, 5, 5)
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used, stats.healthy) == (0, 0, 0, True)


def test_the_end_of_sequence_token_stops_a_request() -> None:
    executor = FakeExecutor()
    loop, clients = _loop(executor)
    request = make_request([1, 2, 3], max_tokens=30, stop_token_ids=(expected_tokens(make_request([1, 2, 3]))[2],))
    loop.submit("a", Submit(0, request))
    _run(loop)
    assert clients.tokens["a", 0] == expected_tokens(request)[:3]
    assert clients.finishes["a", 0] == Finish("stop", expected_tokens(request)[2])
    assert EOS_ID not in clients.tokens["a", 0]
