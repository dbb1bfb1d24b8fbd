from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rayllm.api.resume import MAX_READ_BYTES, MAX_UNREAD_BYTES, EventName, HeldStream, HeldStreams
from rayllm.errors import RequestError

EVENTS = [
    b"data: a\nid: x:1\n\n",
    b"data: b\nid: x:2\n\ndata: c\nid: x:3\n\n",
    b"data: d\nid: x:4\n\n",
    b"data: [DONE]\n\n",
]
ALL = b"".join(EVENTS)
BIG = b"data: " + b"." * 10_000 + b"\n\n"


class _Source:
    """Gives the events one by one, each when `go` allows it."""

    id = "x"

    def __init__(self, events: list[bytes], num_allowed: int | None = None):
        self.events = events
        self.num_made = 0
        self.num_closed = 0
        self.is_adopted_by_another = False
        self.allowed = asyncio.Semaphore(len(events) if num_allowed is None else num_allowed)

    async def stream(self) -> AsyncIterator[bytes]:
        for event in self.events:
            await self.allowed.acquire()
            self.num_made += 1
            yield event

    def close(self) -> None:
        self.num_closed += 1


def _held(source: _Source, hold_s: float = 60) -> tuple[HeldStreams, HeldStream]:
    streams = HeldStreams(hold_s)
    return streams, streams.hold(source, "me")


def _resumed(streams: HeldStreams, last_event_id: str, client_key: str) -> AsyncIterator[bytes]:
    name = EventName.parse(last_event_id)
    events = streams.find(name, client_key)
    if events is None:
        raise streams.not_held(name)
    return events


async def _read(reader: AsyncIterator[bytes], num_pieces: int | None = None) -> bytes:
    """So many pieces, then the connection is lost; or all."""
    read = b""
    async for piece in reader:
        read += piece
        num_pieces = None if num_pieces is None else num_pieces - 1
        if num_pieces == 0:
            await reader.aclose()  # type: ignore[attr-defined]
            break
    return read


async def test_an_answer_that_nobody_wants_any_more_is_ended_by_its_own_client_alone() -> None:
    source = _Source(EVENTS, num_allowed=1)
    streams, stream = _held(source)
    await _read(stream.read(), 1)
    assert not streams.drop("x", "somebody else")
    assert source.num_closed == 0
    assert streams.drop("x", "me")
    await asyncio.sleep(0)
    assert source.num_closed >= 1
    with pytest.raises(RequestError):
        _resumed(streams, "x:1", "me")


@pytest.mark.parametrize("num_seen", range(5))
@pytest.mark.parametrize("num_pieces", [1, 2, 3])
async def test_a_resumed_stream_goes_on_after_the_event_last_seen(num_seen: int, num_pieces: int) -> None:
    source = _Source(EVENTS)
    streams, stream = _held(source)
    await _read(stream.read(), num_pieces)
    while source.num_made < len(EVENTS):
        await asyncio.sleep(0)
    await asyncio.sleep(0)

    rest = await _read(_resumed(streams, f"x:{num_seen}", "me"))

    assert rest == b"".join(event + b"\n\n" for event in ALL.split(b"\n\n")[num_seen:-1])
    assert source.num_made == 4
    streams.close()


async def test_the_answer_goes_on_while_its_client_is_away_and_is_dropped_in_time() -> None:
    source = _Source(EVENTS, num_allowed=1)
    streams, stream = _held(source, hold_s=0.05)
    assert await _read(stream.read(), 1) == EVENTS[0]
    source.allowed.release()
    while source.num_made < 2:
        await asyncio.sleep(0)
    assert not source.num_closed
    while not source.num_closed:
        await asyncio.sleep(0.01)
    with pytest.raises(RequestError, match="no events are held"):
        _resumed(streams, "x:1", "me")


async def test_a_stream_that_nobody_ever_read_is_dropped_too() -> None:
    source = _Source(EVENTS, num_allowed=0)
    _held(source, hold_s=0.01)
    while not source.num_closed:
        await asyncio.sleep(0.005)


async def test_a_second_reader_ends_the_first() -> None:
    source = _Source(EVENTS, num_allowed=1)
    streams, stream = _held(source)
    first = asyncio.create_task(_read(stream.read()))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(_read(_resumed(streams, "x:0", "me")))
    await asyncio.sleep(0.01)
    for _ in EVENTS:
        source.allowed.release()
    assert await first == EVENTS[0]
    assert await second == ALL
    streams.close()


async def test_what_is_made_for_an_absent_reader_and_kept_for_a_present_one_is_bounded() -> None:
    source = _Source([BIG] * 200)
    streams, stream = _held(source)
    await _read(stream.read(), 1)
    await asyncio.sleep(0.01)
    assert MAX_UNREAD_BYTES // len(BIG) <= source.num_made <= MAX_UNREAD_BYTES // len(BIG) + 3

    assert len(await _read(_resumed(streams, "x:1", "me"))) == 199 * len(BIG)
    assert sum(len(piece) for _, piece in stream._held) <= MAX_READ_BYTES
    with pytest.raises(RequestError, match="no events are held"):
        _resumed(streams, "x:5", "me")
    assert len(await _read(_resumed(streams, "x:190", "me"))) == 10 * len(BIG)
    streams.close()


@pytest.mark.parametrize(
    ("event_id", "client"),
    [("x:9", "me"), ("x:0", "other"), ("y:0", "me"), ("x:-1", "me"), ("x:", "me"), ("", "me"), ("x:²", "me")],
)
async def test_what_is_not_held_is_not_found(event_id: str, client: str) -> None:
    streams, _ = _held(_Source(EVENTS, num_allowed=0))
    with pytest.raises(RequestError) as caught:
        _resumed(streams, event_id, client)
    assert (caught.value.status, caught.value.code) == (404, "resume_not_found")
    streams.close()


async def test_a_stream_in_the_background_waits_for_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.api.resume.MAX_BACKGROUND_BYTES", 30 * len(BIG))
    num_events = 2 * MAX_UNREAD_BYTES // len(BIG)
    source = _Source([BIG] * num_events)
    streams = HeldStreams(hold_s=0)
    stream = streams.hold(source, "me", background=True)
    slow = stream.read()
    while not source.num_closed:
        await asyncio.sleep(0)

    assert source.num_made == num_events
    assert stream.num_bytes == 30 * len(BIG)
    assert b"events_lost" in await anext(slow)
    kept = b"".join([piece async for piece in _resumed(streams, f"x:{num_events - 30}", "me")])
    assert kept == BIG * 30
    with pytest.raises(RequestError):
        _resumed(streams, "x:0", "me")


async def test_a_stream_that_is_ended_says_its_last_words() -> None:
    source = _Source(EVENTS, num_allowed=2)
    streams = HeldStreams()
    stream = streams.hold(source, "me", background=True)
    while source.num_made < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    stream.end(b"data: last\n\n")
    stream.end(b"data: twice\n\n")

    assert b"".join([piece async for piece in stream.read()]) == b"".join(EVENTS[:2]) + b"data: last\n\n"
    await asyncio.sleep(0)  # its task is cancelled, and closes it
    assert source.num_closed == 1


async def test_what_another_process_sent_of_an_answer_is_not_held_again() -> None:
    source = _Source(EVENTS, num_allowed=2)
    streams = HeldStreams()
    stream = streams.hold(source, "me", num_seen=3)
    reading = asyncio.create_task(_read(stream.read(3)))
    await asyncio.sleep(0.01)
    assert not reading.done()
    for _ in EVENTS:
        source.allowed.release()
    assert await reading == EVENTS[2] + EVENTS[3]
    assert await _read(_resumed(streams, "x:3", "me")) == EVENTS[2] + EVENTS[3]
    assert streams.find(EventName("x", 2), "me") is None, "not here, but it was made"
    with pytest.raises(RequestError):
        streams.find(EventName("x", 6), "me")
    streams.close()


async def test_a_number_beyond_what_is_made_again_is_told() -> None:
    streams = HeldStreams()
    stream = streams.hold(_Source(EVENTS), "me", num_seen=9)
    assert b"there are 5 events only" in await _read(stream.read(9))
    streams.close()


async def test_an_answer_that_goes_on_elsewhere_is_not_found_here_any_more() -> None:
    source = _Source(EVENTS)
    source.is_adopted_by_another = True
    dropped: list[str] = []
    streams = HeldStreams()
    stream = streams.hold(source, "me", on_dropped=lambda: dropped.append("x"))
    assert await _read(stream.read()) == ALL, "who reads it hears its last words"
    assert streams.find(EventName("x", 1), "me") is None
    assert dropped == ["x"]
    streams.close()
