"""Server-sent events: their lines, their numbers, and the end of every stream."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

import pytest

from rayllm.api.sse import DONE, ChunkWriter, EventWriter, error_event, whole_stream
from rayllm.errors import EngineError, RequestError


def test_chunks_are_json_with_the_head_and_numbered_from_one() -> None:
    writer = ChunkWriter({"id": "cmpl-1", "model": 'a "model"'})
    pieces = [writer.chunk({"index": 0, "text": "ö\n"}), writer.chunk(None, {"usage": None})]
    lines = [piece.decode().removesuffix("\n\n").split("\n") for piece in pieces]
    assert [line[1] for line in lines] == ["id: cmpl-1:1", "id: cmpl-1:2"]
    head = {"id": "cmpl-1", "model": 'a "model"'}
    assert json.loads(lines[0][0].removeprefix("data: ")) == {**head, "choices": [{"index": 0, "text": "ö\n"}]}
    assert json.loads(lines[1][0].removeprefix("data: ")) == {**head, "choices": [], "usage": None}


def test_events_are_named_by_their_type_and_numbered_from_one() -> None:
    writer = EventWriter("msg_1")
    assert writer.event({"type": "ping"}) == b'event: ping\ndata: {"type":"ping"}\nid: msg_1:1\n\n'
    assert writer.event({"type": "stop", "a": 1}) == b'event: stop\ndata: {"type":"stop","a":1}\nid: msg_1:2\n\n'
    assert writer.num_events == 2


async def _stream(fault: Exception | None) -> AsyncIterator[bytes]:
    yield b"data: a\n\n"
    if fault is not None:
        raise fault


async def test_every_stream_ends_with_done_after_a_fault_too() -> None:
    assert [event async for event in whole_stream(_stream(None))] == [b"data: a\n\n", DONE]
    first, fault, done = [event async for event in whole_stream(_stream(EngineError("gone", code="driver_died")))]
    assert (first, done) == (b"data: a\n\n", DONE)
    name, data = fault.decode().removesuffix("\n\n").split("\n")
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (name, error["message"], error["code"]) == ("event: error", "gone", "driver_died")


def test_only_a_fault_of_the_program_is_logged_and_its_text_stays_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="rayllm.api.sse"):
        assert b"too long" in error_event(RequestError("too long"))
        assert caplog.records == []
        assert b"secret" not in error_event(ZeroDivisionError("secret"))
    [record] = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
