from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from serve.served import ANSWER, Served, chat, completion, tokenizer

import rayllm
from rayllm.errors import EngineError, OverloadedError
from rayllm.messages import Finish
from rayllm.serve.routes.pages import PAGE_PATHS

FIELDS = {"message", "type", "param", "code"}


def error_of(response: Any) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body["error"]) == FIELDS
    return dict(body["error"])


async def test_the_routes_are_these() -> None:
    """A frozen list: a new path is a decision."""
    routes = {
        (path, method)
        for route in Served().app.routes
        for path in [getattr(route, "path", "")]
        for method in getattr(route, "methods", None) or ()
        if path not in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", *PAGE_PATHS)
    }

    assert sorted(routes) == [
        ("/admin/kill_worker", "POST"),
        ("/classify", "POST"),
        ("/dashboard/state", "GET"),
        ("/detokenize", "POST"),
        ("/generate", "POST"),
        ("/generate_stream", "POST"),
        ("/health", "GET"),
        ("/health", "HEAD"),
        ("/invocations", "POST"),
        ("/load", "GET"),
        ("/markup/code", "POST"),
        ("/markup/formulas", "POST"),
        ("/metrics", "GET"),
        ("/metrics", "HEAD"),
        ("/ping", "GET"),
        ("/ping", "HEAD"),
        ("/ping", "POST"),
        ("/pooling", "POST"),
        ("/ready", "GET"),
        ("/ready", "HEAD"),
        ("/rerank", "POST"),
        ("/score", "POST"),
        ("/tokenize", "POST"),
        ("/tokenizer_info", "GET"),
        ("/v1/chat/completions", "POST"),
        ("/v1/chat/completions/{answer_id}", "DELETE"),
        ("/v1/completions", "POST"),
        ("/v1/embeddings", "POST"),
        ("/v1/messages", "POST"),
        ("/v1/messages/count_tokens", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models/{model_id:path}", "GET"),
        ("/v1/rerank", "POST"),
        ("/v1/responses", "POST"),
        ("/v1/responses/{response_id}", "DELETE"),
        ("/v1/responses/{response_id}", "GET"),
        ("/v1/responses/{response_id}/cancel", "POST"),
        ("/v1/responses/{response_id}/input_items", "GET"),
        ("/v1/score", "POST"),
        ("/v2/rerank", "POST"),
        ("/version", "GET"),
    ]


async def test_answers_are_json_and_streams_are_events() -> None:
    async with Served().client() as client:
        answer = await client.post("/v1/completions", json=completion())
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == ANSWER
        answer = await client.post("/v1/chat/completions", json=chat())
        assert answer.json()["choices"][0]["message"]["content"] == ANSWER

        for path, body in (("/v1/completions", completion()), ("/v1/chat/completions", chat())):
            stream = await client.post(path, json={**body, "stream": True})
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.text.startswith("data: {")
            assert stream.text.endswith("data: [DONE]\n\n")


async def test_the_model_is_listed() -> None:
    async with Served().client() as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 128)
        assert (await client.get("/v1/models/tiny")).json() == card
        missing = await client.get("/v1/models/some/other")
        assert missing.status_code == 404
        assert error_of(missing)["code"] == "model_not_found"


async def test_texts_become_tokens_and_tokens_text() -> None:
    async with Served().client() as client:
        tokens = (await client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        ids = tokenizer().encode("hé")
        assert tokens == {"count": 3, "max_model_len": 128, "tokens": ids, "token_strs": ["h", "Ã", "©"]}
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "hé"}

        messages = (await client.post("/tokenize", json={"messages": chat()["messages"]})).json()
        text = (await client.post("/detokenize", json={"tokens": messages["tokens"]})).json()["prompt"]
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

        for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []})):
            assert error_of(await client.post(path, json=body))["param"] == "prompt"
        for tokens in ([-1], [2**40], "x"):
            assert error_of(await client.post("/detokenize", json={"tokens": tokens}))["param"] == "tokens"


async def test_health_tells_the_stage_until_the_model_is_ready() -> None:
    served = Served(ready=False)
    served.service.set_stage("load shards", "3 of 8")
    async with served.client() as client:
        for path in ("/health", "/ready", "/ping"):
            waiting = await client.get(path)
            assert waiting.status_code == 503
            assert waiting.headers["retry-after"] == "1"
            assert set(waiting.json()["error"]) == FIELDS
            assert (waiting.json()["stage"], waiting.json()["reason"]) == ("load shards", "3 of 8")
        for refused in (
            await client.post("/v1/completions", json=completion()),
            await client.get("/v1/models"),
            await client.post("/tokenize", json={"prompt": "x"}),
        ):
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert error_of(refused)["code"] == "not_ready"

        served.make_ready()
        for path in ("/health", "/ready", "/ping"):
            assert (await client.get(path)).json() == {"status": "ok", "stage": "ready"}
            assert (await client.head(path)).status_code == 200

        served.engine.healthy = False
        sick = await client.get("/health")
        assert sick.status_code == 503
        assert sick.json()["reason"] == "a worker is being replaced"


async def test_version_load_and_metrics() -> None:
    served = Served()
    async with served.client() as client:
        assert (await client.get("/version")).json() == {"version": rayllm.__version__}
        assert (await client.get("/load")).json() == {"server_load": 0}
        await client.post("/v1/completions", json=completion(n=2))
        await client.post("/v1/completions", json=completion(n=-2))

        metrics = await client.get("/metrics")

        assert metrics.headers["content-type"].startswith("text/plain; version=")
        assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 2.0' in metrics.text
        assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 2.0' in metrics.text
        assert (
            'rayllm:requests_refused_total{code="invalid_request_error",engine="0",model_name="tiny"} 1.0'
            in metrics.text
        )
        assert 'rayllm:steps_total{engine="0",model_name="tiny"} 3.0' in metrics.text
        assert 'http_requests_total{engine="0",handler="/v1/completions",method="POST"' in metrics.text
        assert 'rayllm:requests_open{engine="0",model_name="tiny"} 0.0' in metrics.text
        assert (await client.head("/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "path_not_found"),
        ("GET", "/v1/completions/", 404, "path_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_methods_have_the_envelope(method: str, path: str, status: int, code: str) -> None:
    async with Served().client() as client:
        response = await client.request(method, path)

    assert response.status_code == status
    assert error_of(response)["code"] == code
    if status == 405:
        assert f"use {response.headers['allow'].replace(', ', ' or ')}" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b'{"a": NaN}', b"\xff", b'{"no_such_field": 1}'])
async def test_a_bad_body_is_a_400_everywhere(path: str, body: bytes) -> None:
    async with Served().client() as client:
        response = await client.post(path, content=body)

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_a_body_that_is_too_large_is_refused_unread_or_as_it_comes() -> None:
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 100

    async with Served(max_body_bytes=1000).client() as client:
        for content in (b" " * 1001, chunks()):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert error_of(response)["code"] == "body_too_large"
            assert response.headers["connection"] == "close"
        fits = await client.post("/v1/completions", content=json.dumps(completion()).ljust(1000))
    assert sent < 20
    assert fits.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("trouble", "status", "code"),
    [
        ({"error": Finish("error", code="overloaded", message="busy")}, 429, "overloaded"),
        ({"error": Finish("error", code="worker_died", message="rank 1")}, 503, "worker_died"),
        ({"error": Finish("error", message="no such token")}, 400, None),
        ({"refusal": OverloadedError("full", retry_after_s=3)}, 429, "overloaded"),
        ({"refusal": EngineError("gone", code="driver_died")}, 503, "driver_died"),
        ({"refusal": KeyError("a bug")}, 500, "internal_error"),
        ({"fault_at": 0}, 503, "driver_died"),
    ],
)
async def test_what_the_engine_refuses_has_a_status_even_for_a_stream(
    trouble: dict[str, Any], status: int, code: str | None, stream: bool
) -> None:
    served = Served()
    for name, value in trouble.items():
        setattr(served.engine, name, value)

    async with served.client() as client:
        response = await client.post("/v1/completions", json=completion(stream=stream))

    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert "a bug" not in response.text
    assert all(s.closed for s in served.engine.streams)


async def test_a_fault_inside_a_stream_is_an_error_event_and_then_the_end() -> None:
    served = Served()
    served.engine.fault_at = 3
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True))

    assert response.status_code == 200
    *_, error, done, rest = response.text.split("\n\n")
    assert error.startswith('event: error\ndata: {"error":{"message":"the driver is gone"')
    assert (done, rest) == ("data: [DONE]", "")


async def test_a_fault_while_the_whole_is_awaited_is_a_503() -> None:
    served = Served()
    served.engine.fault_at = 3
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json=chat())

    assert response.status_code == 503
    assert error_of(response)["code"] == "driver_died"


async def test_a_body_that_does_not_come_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.serve.body_reader.BODY_TIMEOUT_S", 0.01)

    async def never_ends() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    async with Served().client() as client:
        response = await client.post("/v1/completions", content=never_ends())

    assert response.status_code == 408
    assert error_of(response)["code"] == "body_timeout"


async def test_a_body_of_untold_length_begins_at_once_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.serve.body_reader.FIRST_CHUNK_TIMEOUT_S", 0.05)
    text = json.dumps(completion(max_tokens=1)).encode()

    async def begins(first_s: float, second_s: float) -> Any:
        for part, wait_s in ((text[:5], first_s), (text[5:], second_s)):
            await asyncio.sleep(wait_s)
            yield part

    async with Served().client() as client:
        late = await client.post("/v1/completions", content=begins(10.0, 0.0))
        slow = await client.post("/v1/completions", content=begins(0.0, 0.2))
        told = {"content-length": str(len(text))}  # where it is, there is no chunk's line to wait for
        slow_to_begin = await client.post("/v1/completions", content=begins(0.2, 0.0), headers=told)

    assert (late.status_code, error_of(late)["code"], late.headers["connection"]) == (400, "body_timeout", "close")
    assert (slow.status_code, slow_to_begin.status_code) == (200, 200)


async def test_a_draining_server_refuses_new_requests_and_says_when_to_come_back() -> None:
    served = Served()
    served.service.drain()
    async with served.client() as client:
        refused = await client.post("/v1/completions", json=completion())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "not_ready"
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200


async def test_a_timeout_is_the_fields_or_the_headers_and_becomes_a_deadline() -> None:
    served = Served()
    async with served.client() as client:
        now_s = time.time()
        await client.post("/v1/completions", json=completion(timeout=30))
        await client.post("/v1/chat/completions", json=chat(), headers={"x-request-timeout": "90.5"})
        await client.post("/v1/completions", json=completion())
        deadlines = [request.deadline_s for request in served.engine.requests]
        assert [d and round(d - now_s) // 10 for d in deadlines] == [3, 9, None]
        for headers, value in (
            ({"x-request-timeout": "soon"}, None),
            ({}, 0),
            ({}, -1),
            ({"x-request-timeout": "nan"}, None),
        ):
            refused = await client.post("/v1/completions", json=completion(timeout=value), headers=headers)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "timeout"


async def test_requests_carry_whose_they_are_without_the_key() -> None:
    served = Served(api_keys=("one", "two"))
    for key in ("one", "two", "one"):
        async with served.client(authorization=f"Bearer {key}") as client:
            await client.post("/v1/completions", json=completion())
    one, two, again = [request.client_key for request in served.engine.requests]
    assert one == again != two
    assert "one" not in one
    open_to_all = Served()
    async with open_to_all.client(authorization="Bearer anything") as client:
        await client.post("/v1/completions", json=completion())
    assert open_to_all.engine.requests[0].client_key == ""
