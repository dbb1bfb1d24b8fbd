from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fakes import make_request

from rayllm.engine.address import MAX_CLIENT_FRAME_BYTES, DriverAddress
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.client.driver_connection import DriverConnection, connect
from rayllm.engine.driver.link import ClientGone, ClientLink
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.channel import FrameTooLargeError
from rayllm.messages import READER_PAUSED, Abort, Deltas, EngineStats, Finish, StatsQuery, Submit, TokenDelta
from rayllm.request import pack_ids, unpack_ids

_STOP = Finish("stop")


class _FakeDriver:
    """A `ClientLink` answered by hand from a thread. For each choice of a request: as many deltas as `max_tokens`,
    each with its number, then a stop. A request with seed 1 is never answered, one with seed 2 kills the driver."""

    def __init__(self) -> None:
        self.link = ClientLink()
        self.seen: list[Any] = []
        self.changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> DriverAddress:
        return DriverAddress("node", self.link.unix_path, self.link.token)

    def wait_for(self, event: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.seen, 5.0), f"no {event} in {self.seen}"

    def close(self) -> None:
        self._stopped = True
        self.link.wake()
        self._thread.join(5.0)
        self.link.close()

    def _run(self) -> None:
        while not self._stopped:
            select.select([self.link], [], [])
            for client, event in self.link.drain():
                with self.changed:
                    self.seen.append(type(event) if isinstance(event, ClientGone) else event)
                    self.changed.notify_all()
                if isinstance(event, StatsQuery):
                    self.link.send(client, _stats(event.ticket))
                elif isinstance(event, Submit) and event.request.seed == 2:
                    threading.Thread(target=self.close).start()
                elif isinstance(event, Submit) and event.request.seed == 0:
                    self._answer(client, event)

    def _answer(self, client: int, submit: Submit) -> None:
        first, choices = submit.stream, range(submit.request.params.n)
        for token in range(submit.request.max_tokens):
            last = token + 1 == submit.request.max_tokens
            finish = _STOP if last else None
            deltas = [TokenDelta(first + c, c, pack_ids([(first + c) * 100 + token]), finish) for c in choices]
            self.link.send(client, Deltas(deltas))


def _stats(ticket: int) -> EngineStats:
    return EngineStats(ticket, True, "", *[0] * 12)  # type: ignore[arg-type]


@pytest.fixture
def driver() -> Iterator[_FakeDriver]:
    driver = _FakeDriver()
    yield driver
    driver.close()


async def _collect(stream: Any) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for deltas in stream:
        assert deltas
        for delta in deltas:
            tokens.setdefault(delta.choice, []).extend(unpack_ids(delta.token_ids))
    return tokens


async def test_each_request_gets_the_tokens_of_its_own_choices(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        streams = [
            connection.submit(make_request([1], max_tokens=3)),
            connection.submit(make_request([1], max_tokens=2, n=2)),
            connection.submit(make_request([1], max_tokens=1)),
        ]
        answers = await asyncio.gather(*[_collect(stream) for stream in streams])
    assert answers == [{0: [0, 1, 2]}, {0: [100, 101], 1: [200, 201]}, {0: [300]}]
    assert all(stream.finished for stream in streams)


async def test_what_came_meanwhile_is_handed_over_at_once(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        stream = connection.submit(make_request([1], max_tokens=50))
        while not stream.finished:
            await asyncio.sleep(0.01)
        deltas = await anext(stream)
        assert [unpack_ids(delta.token_ids)[0] for delta in deltas] == list(range(50))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_reader_that_does_not_read_is_paused_and_others_are_not(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        paused = connection.submit(make_request([1], max_tokens=5000), max_held_bytes=2000)
        other = connection.submit(make_request([1], max_tokens=5000))
        await asyncio.to_thread(driver.wait_for, Abort(0, pauses=True))
        tokens = [token for delta in await anext(paused) for token in unpack_ids(delta.token_ids)]
        with pytest.raises(EngineError) as error:
            await anext(paused)
        assert error.value.code == READER_PAUSED
        assert tokens == list(range(len(tokens)))
        assert 0 < len(tokens) < 20
        assert len((await _collect(other))[0]) == 5000


async def test_a_request_too_long_for_a_frame_fails_alone(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        other = connection.submit(make_request([1], max_tokens=2))
        with pytest.raises(FrameTooLargeError, match=r"a Submit of .* exceeds the limit of a frame"):
            connection.submit(make_request([0] * (MAX_CLIENT_FRAME_BYTES // 4), max_tokens=2))
        after = connection.submit(make_request([1], max_tokens=2))
        assert (await _collect(other), await _collect(after)) == ({0: [0, 1]}, {0: [100, 101]})


async def test_closing_a_stream_aborts_each_unfinished_choice_once(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        silent = connection.submit(make_request([1], seed=1, n=3))
        silent.abort_choice(1)
        silent.abort_choice(1)
        silent.close()
        silent.close()
        await asyncio.to_thread(driver.wait_for, Abort(2))
        finished = connection.submit(make_request([1], max_tokens=1))
        await _collect(finished)
        finished.close()
        await connection.stats()
        assert [event for event in driver.seen if isinstance(event, Abort)] == [Abort(1), Abort(0), Abort(2)]
        assert await _collect(silent) == {}


async def test_aborting_the_last_open_choice_ends_the_stream(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        silent = connection.submit(make_request([1], seed=1))
        waiting = asyncio.ensure_future(_collect(silent))
        await asyncio.sleep(0)
        silent.abort_choice(0)
        assert await waiting == {}


async def test_leaving_the_block_closes_the_stream(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        async with connection.submit(make_request([1], seed=1)):
            pass
        await asyncio.to_thread(driver.wait_for, Abort(0))


async def test_a_cancelled_wait_loses_nothing(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        silent = connection.submit(make_request([1], seed=1))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(silent), 0.01)
        stream = connection.submit(make_request([1], max_tokens=2))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(silent), 0.01)
        assert await _collect(stream) == {0: [100, 101]}


async def test_stats_are_answered_each_to_its_asker(driver: _FakeDriver) -> None:
    async with await connect(driver.address) as connection:
        answers = await asyncio.gather(*[connection.stats() for _ in range(3)])
        assert [answer.ticket for answer in answers] == [1, 2, 3]


async def test_when_the_driver_goes_every_open_stream_says_so_at_once(driver: _FakeDriver) -> None:
    connection = await connect(driver.address)
    streams = [connection.submit(make_request([1], seed=1, n=2)) for _ in range(2)]
    partial = connection.submit(make_request([1], max_tokens=1))
    await _collect(partial)
    connection.submit(make_request([1], seed=2))
    for stream in streams:
        with pytest.raises(EngineError, match="the engine's driver is gone: it closed") as error:
            await _collect(stream)
        assert error.value.code == "engine_gone"
        stream.close()
    assert await connection.wait_lost() == connection.lost_reason
    with pytest.raises(EngineError, match="gone"):
        connection.submit(make_request([1]))
    with pytest.raises(EngineError, match="gone"):
        await connection.stats()


async def test_what_came_before_the_end_is_still_handed_over(driver: _FakeDriver) -> None:
    connection = await connect(driver.address)
    stream = connection.submit(make_request([1], max_tokens=2))
    other = connection.submit(make_request([1], seed=1))
    while not stream.finished:
        await asyncio.sleep(0.01)
    connection.close()
    assert await _collect(stream) == {0: [0, 1]}
    with pytest.raises(EngineError, match="this client closed"):
        await _collect(other)


async def test_closing_the_connection_is_seen_by_the_driver(driver: _FakeDriver) -> None:
    connection = await connect(driver.address)
    connection.close()
    connection.close()
    await asyncio.to_thread(driver.wait_for, ClientGone)


@pytest.mark.parametrize("kind", ["asyncio", "blocking"])
async def test_addresses_that_lead_nowhere_say_why(driver: _FakeDriver, kind: str) -> None:
    async def join(address: DriverAddress) -> None:
        if kind == "asyncio":
            (await connect(address, timeout_s=1.0)).close()
        else:
            (await asyncio.to_thread(BlockingDriverConnection, address, timeout_s=1.0)).close()

    with pytest.raises(EngineUnreachableError, match="refused this client"):
        await join(replace(driver.address, token="guess"))
    with pytest.raises(EngineUnreachableError, match="another node"):
        await join(DriverAddress("far", "/nowhere/s", "token"))
    host, port = driver.link.listen_tcp("127.0.0.1")
    await join(DriverAddress("far", "/nowhere/s", driver.link.token, host, port))
    driver.close()
    with pytest.raises(EngineUnreachableError, match="no driver answers"):
        await join(DriverAddress("far", "/nowhere/s", driver.link.token, host, port))


async def test_submitting_does_not_wait_for_a_driver_that_is_busy(driver: _FakeDriver) -> None:
    connection: DriverConnection = await connect(driver.address)
    streams = [connection.submit(make_request(list(range(5000)), max_tokens=1)) for _ in range(200)]
    for number, stream in enumerate(streams):
        assert await _collect(stream) == {0: [number * 100]}
    connection.close()


def test_one_thread_can_submit_receive_and_ask(driver: _FakeDriver) -> None:
    connection = BlockingDriverConnection(driver.address)
    connection.submit(0, make_request([1], max_tokens=2))
    connection.submit(5, make_request([1], max_tokens=1))
    connection.submit(9, make_request([1], seed=1))
    assert connection.stats().ticket == 1
    tokens: list[int] = []
    while len(tokens) < 3:
        for delta in connection.receive():
            tokens += unpack_ids(delta.token_ids)
    assert tokens == [0, 1, 500]
    connection.abort(9)
    driver.wait_for(Abort(9))
    connection.submit(10, make_request([1], seed=2))
    with pytest.raises(EngineError, match="the engine's driver") as error:
        connection.receive()
    assert error.value.code == "engine_gone"
    connection.close()
    connection.close()
