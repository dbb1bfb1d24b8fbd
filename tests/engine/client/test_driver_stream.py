from __future__ import annotations

import pytest
from fakes import make_request

from rayllm.engine.client.driver_stream import DriverStream
from rayllm.errors import EngineError
from rayllm.messages import READER_PAUSED, Finish, TokenDelta
from rayllm.request import pack_ids


class _Connection:
    def __init__(self) -> None:
        self.aborted: list[tuple[int, bool]] = []

    def abort(self, stream: int, pauses: bool) -> None:
        self.aborted.append((stream, pauses))


def _stream(n: int = 1, **options: object) -> tuple[DriverStream, _Connection]:
    connection = _Connection()
    request = make_request([1], max_tokens=9, n=n)
    return DriverStream(connection, request, 10, **options), connection  # type: ignore[arg-type]


def _delta(choice: int, num_tokens: int = 1, finish: Finish | None = None) -> TokenDelta:
    return TokenDelta(10 + choice, choice, pack_ids([7] * num_tokens), finish)


async def test_a_list_holds_all_that_came_and_the_stream_ends_after_each_choice() -> None:
    stream, connection = _stream(n=2)
    stream.add(0, _delta(0))
    stream.add(1, _delta(1, finish=Finish("stop")))
    assert [delta.choice for delta in await stream.__anext__()] == [0, 1]
    stream.add(0, _delta(0, finish=Finish("length")))
    assert [len(deltas) async for deltas in stream] == [1]
    assert (stream.finished, connection.aborted) == (True, [])


async def test_closing_aborts_the_choices_that_are_open() -> None:
    stream, connection = _stream(n=3)
    stream.add(1, _delta(1, finish=Finish("stop")))
    stream.close()
    stream.close()
    assert connection.aborted == [(10, False), (12, False)]
    assert [deltas async for deltas in stream] == []


async def test_a_reader_that_leaves_too_much_is_paused_and_gets_what_came_before() -> None:
    stream, connection = _stream(max_held_bytes=1000)
    for _ in range(2):
        stream.add(0, _delta(0, num_tokens=100))
    assert connection.aborted == [(10, True)]
    assert len(await stream.__anext__()) == 2
    with pytest.raises(EngineError) as caught:
        await stream.__anext__()
    assert caught.value.code == READER_PAUSED


async def test_what_comes_before_the_first_is_taken_does_not_count_for_one_that_begins_late() -> None:
    stream, connection = _stream(max_held_bytes=1000, begins_late=True)
    for _ in range(9):
        stream.add(0, _delta(0, num_tokens=100))
    assert (len(await stream.__anext__()), connection.aborted) == (9, [])


async def test_a_lost_driver_is_an_error_after_what_came() -> None:
    stream, _ = _stream()
    stream.add(0, _delta(0))
    stream.fail(EngineError("gone", code="engine_gone"))
    assert len(await stream.__anext__()) == 1
    with pytest.raises(EngineError, match="gone"):
        await stream.__anext__()
