from __future__ import annotations

from collections import defaultdict

import pytest
from fakes import EOS_ID, FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.engine.local import build_scheduler
from rayllm.engine.loop import EngineLoop
from rayllm.errors import WorkerDiedError
from rayllm.messages import Abort, Deltas, DriverMessage, EngineStats, Finish, StatsQuery, Submit
from rayllm.request import Request, unpack_ids


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
    loop, clients = _loop(FakeExecutor(pipeline_depth=depth))
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
    executor = FakeExecutor(pipeline_depth=2)
    loop, clients = _loop(executor)
    loop.submit("a", Submit(0, make_request([1, 2], max_tokens=4)))
    assert loop.step()
    assert len(executor.sent) == 1
    assert not clients.messages
    assert loop.step()
    assert len(executor.sent) == 2
    assert len(clients.messages) == 1


def test_a_known_length_never_costs_a_step_too_many() -> None:
    executor = FakeExecutor(pipeline_depth=2)
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


def test_a_dead_worker_ends_every_open_request_with_rank_and_reason() -> None:
    loop, clients = _loop(FakeExecutor(die_at=3))
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


def test_a_passed_deadline_ends_the_request_with_a_reason() -> None:
    import msgspec

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
