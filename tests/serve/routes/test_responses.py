"""Responses over HTTP, by the `openai` package."""

from __future__ import annotations

import time

import openai
import pytest
from serve.served import ANSWER, Served


def test_openai_makes_follows_and_fetches_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hi")
    assert first.output_text == ANSWER
    assert client.responses.retrieve(first.id).output_text == ANSWER
    second = client.responses.create(model="tiny", input="on", previous_response_id=first.id)
    assert len(client.responses.input_items.list(second.id, order="asc", limit=2).data) == 2
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(second.id)

    with client.responses.stream(model="tiny", input="hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == ANSWER == text


def test_a_response_in_the_background_is_followed_from_any_event_on(
    client: openai.OpenAI, served: tuple[Served, int]
) -> None:
    engine = served[0].engine
    engine.stall_at = 4
    try:
        queued = client.responses.create(model="tiny", input="hi", background=True)
        assert queued.status == "queued"
        seen = []
        for event in client.responses.retrieve(queued.id, stream=True):
            seen.append(event)
            if event.sequence_number == 6:
                break
    finally:
        engine.stall_at = None
        engine.go_on.set()
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    seen += client.responses.retrieve(queued.id, stream=True, starting_after=6)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    last = seen[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER
    assert client.responses.retrieve(queued.id).output_text == ANSWER


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI, served: tuple[Served, int]) -> None:
    engine = served[0].engine
    engine.go_on.clear()
    engine.stall_at, before = 2, len(engine.streams)
    try:
        stream = client.responses.create(model="tiny", input="hi", background=True, stream=True)
        created = next(iter(stream))
        assert created.type == "response.created"
        end_s = time.monotonic() + 10
        while len(engine.streams) == before and time.monotonic() < end_s:
            time.sleep(0.005)
        assert client.responses.cancel(created.response.id).status == "cancelled"
        assert list(stream)[-1].type == "error"
        assert engine.streams[before].closed
        assert client.responses.retrieve(created.response.id).status == "cancelled"
        with pytest.raises(openai.NotFoundError, match="are held"):
            client.responses.retrieve(created.response.id, stream=True, starting_after=9999)
    finally:
        engine.stall_at = None


def test_a_client_that_goes_ends_its_response(client: openai.OpenAI, served: tuple[Served, int]) -> None:
    engine = served[0].engine
    engine.go_on.clear()
    engine.stall_at, before = 3, len(engine.streams)
    try:
        stream = client.responses.create(model="tiny", input="hi", stream=True)
        created = next(iter(stream))
        assert created.type == "response.created"
        stream.close()
        end_s = time.monotonic() + 10
        while not engine.streams[before].closed and time.monotonic() < end_s:
            time.sleep(0.005)
        assert engine.streams[before].closed
        assert client.responses.retrieve(created.response.id).status == "cancelled"
    finally:
        engine.stall_at = None
