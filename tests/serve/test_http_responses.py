from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rayllm.api.errors import answer
from rayllm.serve.http_responses import ClientGoneError, EventStream, error_response, json_response, unless_gone


class Connection:
    """A client: what it was sent, and when it goes."""

    def __init__(self, *, reads: bool = True):
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            await self.reads.wait()
        self.sent.append(message)


class Events:
    """Pieces of a stream, then silence where it is endless."""

    def __init__(self, *pieces: bytes, endless: bool = False):
        self._pieces, self._endless = pieces, endless
        self.num_closed = 0

    async def __call__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._endless:
            await asyncio.Event().wait()

    def close(self) -> None:
        self.num_closed += 1


def test_json_has_its_type_and_status() -> None:
    response = json_response({"a": [1, "é"]}, 201, {"x-a": "b"})
    assert (response.status_code, json.loads(response.body)) == (201, {"a": [1, "é"]})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-a"] == "b"


def test_an_error_closes_a_connection_whose_body_was_not_read_and_says_how_to_authenticate() -> None:
    response = error_response(answer(401, "no key"), close=True)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["connection"] == "close"
    assert "connection" not in error_response(answer(400, "no")).headers


async def test_work_ends_when_its_client_goes() -> None:
    connection, was_cancelled = Connection(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    asyncio.get_running_loop().call_later(0.01, connection.gone.set)
    with pytest.raises(ClientGoneError):
        await unless_gone(connection.receive, work())
    assert was_cancelled.is_set()


async def test_work_gives_its_result_or_its_error() -> None:
    async def fail() -> None:
        raise ValueError("no")

    assert await unless_gone(Connection().receive, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="no"):
        await unless_gone(Connection().receive, fail())


async def test_a_stream_is_sent_piece_by_piece_and_closed_once() -> None:
    connection, events = Connection(), Events(b"data: 1\n\n", b"data: 2\n\n")
    await EventStream(events(), events.close)({}, connection.receive, connection.send)
    start, *bodies = connection.sent
    assert dict(start["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert [(message["body"], message["more_body"]) for message in bodies] == [
        (b"data: 1\n\n", True),
        (b"data: 2\n\n", True),
        (b"", False),
    ]
    assert events.num_closed == 1


async def test_a_stream_ends_with_its_client_while_no_event_comes() -> None:
    connection, events = Connection(), Events(b"data: 1\n\n", endless=True)
    asyncio.get_running_loop().call_later(0.01, connection.gone.set)
    await asyncio.wait_for(EventStream(events(), events.close)({}, connection.receive, connection.send), 10)
    assert connection.sent[-1]["more_body"]
    assert events.num_closed == 1


async def test_a_client_that_does_not_read_is_taken_for_gone(caplog: pytest.LogCaptureFixture) -> None:
    connection, events = Connection(reads=False), Events(b"data: 1\n\n")
    stream = EventStream(events(), events.close, read_timeout_s=0.05)
    await asyncio.wait_for(stream({}, connection.receive, connection.send), 10)
    assert "did not read for 0.05 s" in caplog.text
    assert events.num_closed == 1
    assert [message["type"] for message in connection.sent] == ["http.response.start"]
