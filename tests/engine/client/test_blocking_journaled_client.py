from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.engine.client.blocking_journaled_client import BlockingJournaledClient
from rayllm.engine.client.journal import MAX_FAULTS
from rayllm.engine.client.protocols import BlockingEngineClient
from rayllm.engine.owner.local import LocalEngine
from rayllm.errors import EngineError
from rayllm.messages import EngineStats, Finish, TokenDelta
from rayllm.request import Request, unpack_ids


class _Driver:
    """A whole engine with fake workers, which is lost after `num_receives` batches: its methods raise then."""

    def __init__(self, num_receives: int | None = None, last_words: Finish | None = None, max_num_seqs: int = 8):
        self._engine = LocalEngine(fake_config(max_num_seqs=max_num_seqs), FakeExecutor())
        self._num_left = num_receives
        self._last_words = last_words
        self._streams: list[int] = []
        self.requests: list[Request] = []
        self.closed = False

    def _check(self) -> None:
        if self._num_left == 0:
            raise EngineError("the engine's driver is gone", code="engine_gone")

    def submit(self, stream: int, request: Request) -> None:
        self._check()
        self.requests.append(request)
        self._streams += range(stream, stream + request.params.n)
        self._engine.submit(stream, request)

    def abort(self, stream: int) -> None:
        self._check()
        self._engine.abort(stream)

    def receive(self, wake: Any = None) -> list[TokenDelta]:
        if self._num_left == 0 and self._last_words is not None:
            words, self._last_words = self._last_words, None
            return [TokenDelta(stream, 0, b"", words) for stream in self._streams]
        self._check()
        self._num_left = None if self._num_left is None else self._num_left - 1
        return self._engine.receive()

    def stats(self) -> EngineStats:
        self._check()
        return self._engine.stats()

    def close(self) -> None:
        self.closed = True


def _engine(*drivers: _Driver) -> BlockingJournaledClient:
    rest = iter(drivers)

    def next_driver(reason: str) -> BlockingEngineClient:
        driver = next(rest, None)
        if driver is None:
            raise EngineError(f"no driver is left: {reason}")
        return driver

    return BlockingJournaledClient(next(rest), next_driver)


def _run(engine: BlockingJournaledClient, num_choices: int) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    num_open = num_choices
    while num_open:
        for delta in engine.receive():
            tokens.setdefault(delta.stream, []).extend(unpack_ids(delta.token_ids))
            num_open -= delta.finish is not None
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
    return tokens


@pytest.mark.parametrize("cut", range(8))
@pytest.mark.parametrize("last_words", [None, Finish("error", code="worker_died", message="rank 1 failed")])
def test_wherever_drivers_are_lost_each_stream_has_the_tokens_of_an_undisturbed_run(
    cut: int, last_words: Finish | None
) -> None:
    many, one = make_request([1, 2, 3], n=2, max_tokens=6, seed=3), make_request([4], max_tokens=3)
    first, second = _Driver(cut, last_words), _Driver(1)
    engine = _engine(first, second, _Driver())
    engine.submit(0, many)
    engine.submit(2, one)
    expected = {0: expected_tokens(many, 0), 1: expected_tokens(many, 1), 2: expected_tokens(one)}
    assert _run(engine, 3) == expected
    assert first.closed == (cut < 6)


def test_what_is_aborted_or_ended_is_not_asked_for_again() -> None:
    first, second = _Driver(2), _Driver()
    engine = _engine(first, second)
    request = make_request([1], n=3, max_tokens=5)
    engine.submit(0, request)
    engine.submit(3, make_request([2], max_tokens=1))
    assert len(engine.receive()) == 4
    engine.abort(1)
    engine.receive()
    assert {delta.stream for delta in engine.receive()} == {0, 2}
    [again] = second.requests
    assert [len(ids) // 4 for ids in again.emitted][::2] == [2, 2]


def test_a_request_that_met_too_many_faults_ends_alone() -> None:
    later = [_Driver(2) for _ in range(MAX_FAULTS - 1)]  # they say first that it began
    engine = _engine(_Driver(1), *later, _Driver())
    engine.submit(0, make_request([1], max_tokens=9))
    for _ in range(MAX_FAULTS):
        [delta] = engine.receive()
        assert delta.finish is None
    [delta] = engine.receive()
    assert delta.finish is not None
    assert delta.finish.code == "poison_request"
    engine.submit(1, make_request([2], max_tokens=1))
    assert _run(engine, 1) == {1: expected_tokens(make_request([2], max_tokens=1))}


def test_requests_that_only_waited_when_drivers_were_lost_are_not_to_blame() -> None:
    engine = _engine(*[_Driver(20, max_num_seqs=1) for _ in range(2 * MAX_FAULTS)], _Driver())
    requests = [make_request([stream], max_tokens=6) for stream in range(12)]
    for stream, request in enumerate(requests):
        engine.submit(stream, request)
    assert _run(engine, 12) == {stream: expected_tokens(request) for stream, request in enumerate(requests)}


def test_without_another_driver_the_caller_is_told() -> None:
    engine = _engine(_Driver(0))
    engine.submit(0, make_request([1]))
    with pytest.raises(EngineError, match="no driver is left: the engine's driver is gone"):
        engine.receive()
