from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future

import pytest

from rayllm.engine.client.pending import LoopThread, Pending, PendingOutputs, in_thread


class Counting:
    """Counts up to `total`, then raises `error` where there is one; says when it was left."""

    def __init__(self, total: int, error: Exception | None = None, is_endless: bool = False):
        self._total, self._error, self._is_endless = total, error, is_endless
        self.left = threading.Event()

    async def numbers(self) -> AsyncIterator[int]:
        try:
            for number in range(self._total):
                await asyncio.sleep(0)
                yield number
            if self._error is not None:
                raise self._error
            if self._is_endless:
                await asyncio.Event().wait()
        finally:
            self.left.set()


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread("test")
    yield made
    made.stop()
    made.join(5)


def test_outputs_that_do_not_grow_come_one_by_one_and_in_order(thread: LoopThread) -> None:
    assert list(PendingOutputs(thread, Counting(1000).numbers(), grows=False)) == list(range(1000))


def test_result_is_the_last_output_and_may_be_asked_again(thread: LoopThread) -> None:
    outputs = PendingOutputs(thread, Counting(5).numbers(), grows=True)
    assert outputs.result(5) == 4
    assert outputs.result() == 4
    assert list(outputs) == [4], "a slow reader of outputs that grow gets the latest"


def test_requests_run_before_anybody_waits(thread: LoopThread) -> None:
    counting = Counting(3)
    held = PendingOutputs(thread, counting.numbers(), grows=True)
    assert counting.left.wait(5)
    assert held.result() == 2


async def test_coroutines_await_or_iterate(thread: LoopThread) -> None:
    assert await PendingOutputs(thread, Counting(5).numbers(), grows=True) == 4
    assert [n async for n in PendingOutputs(thread, Counting(5).numbers(), grows=False)] == [0, 1, 2, 3, 4]
    many = [PendingOutputs(thread, Counting(n + 1).numbers(), grows=True) for n in range(50)]
    assert await asyncio.gather(*many) == list(range(50))


async def test_blocking_calls_in_a_coroutine_are_refused(thread: LoopThread) -> None:
    outputs = PendingOutputs(thread, Counting(1).numbers(), grows=True)
    for block in (outputs.result, lambda: list(outputs), Pending(in_thread(lambda: 1, "work")).result):
        with pytest.raises(RuntimeError, match="'await'"):
            block()
    assert await asyncio.to_thread(outputs.result) == 0


def test_errors_come_after_what_came_before(thread: LoopThread) -> None:
    outputs = PendingOutputs(thread, Counting(2, ValueError("broken")).numbers(), grows=False)
    assert (next(outputs), next(outputs)) == (0, 1)
    for ask in (lambda: next(outputs), outputs.result):
        with pytest.raises(ValueError, match="broken"):
            ask()


async def test_errors_are_raised_by_await(thread: LoopThread) -> None:
    with pytest.raises(ValueError, match="broken"):
        await PendingOutputs(thread, Counting(0, ValueError("broken")).numbers(), grows=True)


def test_who_waits_too_long_may_go_on_waiting(thread: LoopThread) -> None:
    outputs = PendingOutputs(thread, Counting(1, is_endless=True).numbers(), grows=True)
    with pytest.raises(TimeoutError, match=r"no result within 0.05 s"):
        outputs.result(0.05)
    assert next(outputs) == 0


def test_leaving_the_loop_ends_the_request(thread: LoopThread) -> None:
    counting = Counting(1, is_endless=True)
    for number in PendingOutputs(thread, counting.numbers(), grows=False):
        assert number == 0
        break
    gc.collect()
    assert counting.left.wait(5)


async def test_leaving_the_asynchronous_loop_ends_the_request(thread: LoopThread) -> None:
    counting = Counting(1, is_endless=True)
    async for number in PendingOutputs(thread, counting.numbers(), grows=False):
        assert number == 0
        break
    gc.collect()
    assert await asyncio.to_thread(counting.left.wait, 5)


async def test_a_wait_that_is_cancelled_ends_a_request_that_nobody_else_holds(thread: LoopThread) -> None:
    counting = Counting(1, is_endless=True)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(PendingOutputs(thread, counting.numbers(), grows=True), 0.05)
    gc.collect()
    assert await asyncio.to_thread(counting.left.wait, 5)


async def test_a_cancelled_request_says_so(thread: LoopThread) -> None:
    outputs = PendingOutputs(thread, Counting(1, is_endless=True).numbers(), grows=True)
    assert await outputs.__anext__() == 0
    outputs.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        await outputs


def test_several_threads_wait_for_one_result(thread: LoopThread) -> None:
    gate: Future[int] = Future()
    found: list[int] = []
    pending = Pending(gate)
    waiting = [threading.Thread(target=lambda: found.append(pending.result())) for _ in range(4)]
    for each in waiting:
        each.start()
    time.sleep(0.01)
    gate.set_result(7)
    for each in waiting:
        each.join()
    assert found == [7] * 4


def test_what_is_open_when_the_loop_stops_is_cancelled_and_says_so() -> None:
    thread = LoopThread("test")
    counting = Counting(1, is_endless=True)
    outputs = PendingOutputs(thread, counting.numbers(), grows=False)
    assert next(outputs) == 0
    thread.stop()
    with pytest.raises(RuntimeError, match="cancelled"):
        outputs.result(5)
    assert counting.left.wait(5)
    thread.stop()
    thread.join(5)
