from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.engine.client.engine_thread import Call, EngineThread
from rayllm.engine.owner.local import LocalEngine
from rayllm.errors import EngineError
from rayllm.messages import StepResult, TokenDelta
from rayllm.request import Request, unpack_ids


class SlowExecutor(FakeExecutor):
    """A step takes long enough that a call is still open when its first token has come."""

    def receive(self, timeout_s: float | None) -> StepResult:
        time.sleep(0.003)
        return super().receive(timeout_s)


def _local(**executor: Any) -> LocalEngine:
    return LocalEngine(fake_config(max_num_seqs=4), SlowExecutor(**executor))


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    thread = EngineThread(_local)
    yield thread
    thread.close()
    thread.join()


def _tokens(call: Call, num_choices: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(num_choices)]
    num_open = num_choices
    while num_open:
        for delta in call.receive():
            tokens[call.streams.index(delta.stream)] += unpack_ids(delta.token_ids)
            if delta.finish is not None and delta.finish.reason == "error":
                raise EngineError(delta.finish.message or "")
            num_open -= delta.finish is not None
    return tokens


def _endless(number: int = 1) -> Request:
    return make_request([number], max_tokens=100)


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_of_many_threads_gets_the_tokens_of_its_own_requests(engine: EngineThread) -> None:
    found: dict[int, list[list[int]]] = {}

    def run(number: int) -> None:
        for turn in range(4):
            requests = [make_request([number, turn], n=2, seed=number, max_tokens=9), make_request([turn])]
            found[10 * number + turn] = _tokens(engine.open(requests), 3)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 32
    for place, tokens in found.items():
        number, turn = divmod(place, 10)
        first = make_request([number, turn], n=2, seed=number, max_tokens=9)
        expected = [expected_tokens(first), expected_tokens(first, 1), expected_tokens(make_request([turn]))]
        assert tokens == expected


def test_calls_that_are_open_at_once_in_one_thread_do_not_mix(engine: EngineThread) -> None:
    outer = engine.open([_endless(1)])
    first = outer.receive()
    assert _tokens(engine.open([make_request([2])]), 1) == [expected_tokens(make_request([2]))]
    rest = _tokens(outer, 1)
    assert [i for delta in first for i in unpack_ids(delta.token_ids)] + rest[0] == expected_tokens(_endless(1))


def test_a_call_that_is_closed_or_garbage_frees_its_blocks(engine: EngineThread) -> None:
    closed, garbage = engine.open([_endless(1)]), engine.open([_endless(2)])
    closed.receive()
    garbage.receive()
    closed.close()
    closed.close()
    del garbage
    gc.collect()
    _wait_until(lambda: engine.stats().num_blocks_used == 0)
    assert engine.stats().num_running == 0


def test_closing_a_call_wakes_the_thread_that_waits_for_it() -> None:
    class Silent(LocalEngine):
        def receive(self, wake: Any = None) -> list[TokenDelta]:
            time.sleep(0.01)
            return []

    engine = EngineThread(lambda: Silent(fake_config(), FakeExecutor()))
    call = engine.open([_endless()])
    received: list[object] = []
    waiting = threading.Thread(target=lambda: received.append(call.receive()))
    waiting.start()
    time.sleep(0.05)
    call.close()
    waiting.join(10)
    assert received == [[]]
    engine.close()
    engine.join()


def test_an_aborted_choice_brings_nothing_more_and_its_siblings_go_on(engine: EngineThread) -> None:
    request = make_request([1], n=2, max_tokens=60)
    call = engine.open([request])
    deltas = call.receive()
    call.abort(call.streams[0])
    while all(delta.choice != 1 or delta.finish is None for delta in deltas):
        deltas += call.receive()
    assert all(delta.choice != 0 or delta.finish is None for delta in deltas)
    tokens = [token for delta in deltas if delta.choice == 1 for token in unpack_ids(delta.token_ids)]
    assert tokens == expected_tokens(request, 1)


def test_close_ends_open_calls_and_later_ones_with_one_clear_error() -> None:
    executor = SlowExecutor()
    engine = EngineThread(lambda: LocalEngine(fake_config(), executor))
    call = engine.open([_endless()])
    engine.close()
    engine.join()
    with pytest.raises(EngineError, match="this engine is closed: create a new LLM"):
        _tokens(call, 1)
    for use in (lambda: engine.open([_endless()]), engine.stats):
        with pytest.raises(EngineError, match="this engine is closed"):
            use()
    assert executor.closed
    call.close()
    engine.close()


def test_a_lost_engine_tells_every_caller() -> None:
    engine = EngineThread(lambda: _local(dies=[3], recovers=False))
    calls = [engine.open([_endless(number)]) for number in range(3)]
    for call in calls:
        with pytest.raises(EngineError, match="killed by the test"):
            _tokens(call, 1)
    with pytest.raises(EngineError, match="killed by the test"):
        engine.open([_endless()])
    engine.close()
    engine.join()


def test_a_forked_child_is_told_so_at_once(engine: EngineThread) -> None:
    _tokens(engine.open([make_request([1])]), 1)
    call = engine.open([_endless()])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            engine.close()
            call.close()
            engine.open([make_request([2])])
        except EngineError as error:
            said = str(error).encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert f"this engine was made in process {os.getpid()} and cannot be used in its forked child, process" in said
    assert _tokens(call, 1) == [expected_tokens(_endless())]


def test_what_is_asked_of_the_engine_is_answered_while_it_computes(engine: EngineThread) -> None:
    call = engine.open([_endless()])
    assert engine.ask(lambda engine: threading.current_thread().name) == "rayllm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.ask(lambda engine: 1 // 0)
    assert _tokens(call, 1) == [expected_tokens(_endless())]


def test_the_engine_is_made_on_the_thread_that_runs_it() -> None:
    made_on: list[str] = []

    def make() -> LocalEngine:
        made_on.append(threading.current_thread().name)
        return _local()

    engine = EngineThread(make)
    assert engine.ask(lambda made: made.stats().num_running) == 0
    assert made_on == ["rayllm-engine"] == [engine.ask(lambda _: threading.current_thread().name)]
    engine.close()
    engine.join()


def test_an_engine_that_cannot_be_made_says_why_to_who_waits_for_it_and_to_who_uses_it() -> None:
    def make() -> LocalEngine:
        raise ValueError("no such model")

    engine = EngineThread(make)
    with pytest.raises(ValueError, match="no such model"):
        engine.wait_until_made()
    with pytest.raises(EngineError, match="ValueError: no such model"):
        engine.open([_endless()])
    engine.close()
    engine.join()
