"""Real clients: the `openai` package over a loopback port, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from serve.served import ANSWER, KEY, Served, chat, completion

MESSAGES: Any = chat()["messages"]


def test_openai_reads_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.25
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None

    completion = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=100, logprobs=1)
    assert [choice.text for choice in completion.choices] == [ANSWER, ANSWER]
    assert completion.choices[1].logprobs is not None
    assert completion.choices[1].logprobs.text_offset is not None
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_reads_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, stop=["more"]
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == ANSWER.removesuffix("more")
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []

    pieces = client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == ANSWER


def test_vllms_fields_go_through_extra_body(client: openai.OpenAI, served: tuple[Served, int]) -> None:
    client.completions.create(model="tiny", prompt="a", extra_body={"top_k": 7, "min_p": 0.1, "ignore_eos": True})

    params = served[0].engine.requests[-1].params
    assert (params.top_k, params.min_p, params.ignore_eos) == (7, 0.1, True)


def test_openai_raises_its_own_errors(client: openai.OpenAI, served: tuple[Served, int]) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()

    engine = served[0].engine
    engine.fault_at = 3
    try:
        with pytest.raises(openai.APIError, match="the driver is gone"):
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
    finally:
        engine.fault_at = None


async def test_openais_async_client_reads_a_stream_in_process() -> None:
    served = Served()
    async with (
        served.client() as http,
        openai.AsyncOpenAI(base_url="http://served/v1", api_key="x", http_client=http) as client,
    ):
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == ANSWER


def test_the_first_token_is_sent_at_once_and_a_gone_client_aborts(served: tuple[Served, int]) -> None:
    app, port = served
    app.engine.stall_at, before = 1, len(app.engine.streams)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(_http(chat(stream=True)))
            received = b""
            while b'"content":"H"' not in received:
                received += connection.recv(65536)
        assert _until(lambda: app.engine.streams[before].closed)
    finally:
        app.engine.stall_at = None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_the_first_token_aborts(served: tuple[Served, int], stream: bool) -> None:
    app, port = served
    app.engine.stall_at, before = 0, len(app.engine.streams)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(_http(chat(stream=stream)))
            assert _until(lambda: len(app.engine.streams) > before)
            assert not app.engine.streams[before].closed
        assert _until(lambda: app.engine.streams[before].closed)
        assert app.service.metrics is not None
        assert _until(lambda: app.service.metrics is not None and app.service.metrics.num_open == 0)
    finally:
        app.engine.stall_at = None


async def test_a_send_that_fails_closes_the_request() -> None:
    """A server whose `send` raises when the client is gone, and that sends no disconnect message."""
    served = Served()
    body = json.dumps(completion(stream=True)).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    num_sent = 0

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 3:
            raise OSError("connection reset")

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    await served.app(scope, receive, send)

    assert num_sent == 3
    assert served.engine.streams[0].closed


async def test_a_cancelled_request_closes_its_engine_request() -> None:
    served = Served()
    served.engine.stall_at = 2
    async with served.client() as client:
        request = asyncio.create_task(client.post("/v1/completions", json=completion(stream=True, prompt=["a", "b"])))
        await served.engine.stalled.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    assert [stream.closed for stream in served.engine.streams] == [True, True]


def _http(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def _until(condition: Any, timeout_s: float = 10.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.005)
    return bool(condition())


def test_a_client_that_does_not_read_is_paused_then_closed_and_others_are_not_harmed() -> None:
    app = Served(read_timeout_s=0.5)
    app.engine.say = lambda request, choice: [98] * 100_000
    app.engine.tokens_a_step = 100
    with app.port() as port, socket.socket() as reader:
        app.make_ready(max_model_len=200_000)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(_http(chat(stream=True, max_tokens=100_000, return_token_ids=True, logprobs=True)))
        assert _until(lambda: bool(app.engine.streams))
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as other:
            usage = other.completions.create(model="tiny", prompt="a", max_tokens=500).usage
        assert usage is not None
        assert usage.completion_tokens == 500
        stream = app.engine.streams[0]
        assert _until(lambda: stream.closed)
        assert stream.num_steps < 1000
        reader.settimeout(10)
        while reader.recv(65536):
            pass
    assert app.service.metrics is not None
    assert app.service.metrics.num_open == 0


def test_a_client_that_asked_for_it_comes_back_to_its_stream() -> None:
    app = Served()
    app.engine.stall_at = 3
    with app.port() as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        body, headers = chat(stream=True), {"x-rayllm-resume": "true"}
        events: list[str] = []
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            for line in response.iter_lines():
                events.append(line)
                if line.startswith("id: ") and line.endswith(":3"):
                    break
        time.sleep(0.05)
        assert not app.engine.streams[0].closed
        app.engine.stall_at = None
        app.engine.go_on.set()
        last_event_id = next(line[4:] for line in reversed(events) if line.startswith("id: "))
        rest = client.post("/v1/chat/completions", json=body, headers={"last-event-id": last_event_id}).text
        chunks = [json.loads(line[6:]) for line in [*events, *rest.split("\n")] if line.startswith("data: {")]
        assert "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]) == ANSWER
        assert rest.endswith("data: [DONE]\n\n")
        assert len(app.engine.streams) == 1
        assert client.post("/v1/chat/completions", json=body, headers={"last-event-id": "no:1"}).status_code == 404
