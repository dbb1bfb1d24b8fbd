"""Anthropic's routes over HTTP: its envelope, its key, streams that are resumed."""

from __future__ import annotations

from typing import Any

from api.streams import typed_events
from serve.served import ANSWER, KEY, Served

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


async def test_errors_have_anthropics_envelope_whatever_finds_them() -> None:
    async with Served(api_keys=(KEY,)).client() as client:
        cases = [
            (await client.post("/v1/messages", json=BODY), 401, "authentication_error"),
            *[
                (await client.request(method, path, json=body, headers={"x-api-key": KEY}), status, kind)
                for method, path, body, status, kind in (
                    ("POST", "/v1/messages", {**BODY, "max_tokens": 0}, 400, "invalid_request_error"),
                    ("POST", "/v1/messages", {**BODY, "model": "x"}, 404, "not_found_error"),
                    ("GET", "/v1/messages", None, 405, "invalid_request_error"),
                    ("POST", "/v1/messages/batches", {}, 404, "not_found_error"),
                    ("POST", "/v1/messages/count_tokens", {}, 400, "invalid_request_error"),
                )
            ],
        ]
    for response, status, kind in cases:
        body = response.json()
        assert response.status_code == status
        assert body["type"] == "error"
        assert body["error"]["type"] == kind
        assert set(body["error"]) == {"message", "type", "param", "code"}


async def test_the_key_may_come_as_anthropics_clients_send_it() -> None:
    async with Served(api_keys=(KEY,)).client() as client:
        headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01", "anthropic-beta": "x"}
        answer = await client.post("/v1/messages", json=BODY, headers=headers)
        assert answer.json()["content"] == [{"type": "text", "text": ANSWER}]
        both = await client.get("/v1/models", headers={"x-api-key": KEY, "authorization": "Bearer wrong"})
        assert both.status_code == 401


async def test_a_stream_can_be_resumed() -> None:
    async with Served().client() as client:
        first = await client.post("/v1/messages", json={**BODY, "stream": True}, headers={"x-rayllm-resume": "true"})
        events = typed_events(first.content)
        name = events[0]["message"]["id"]
        again = await client.post("/v1/messages", json=BODY, headers={"last-event-id": f"{name}:2"})
        assert again.content == first.content.split(b"\n\n", 2)[2]
