from __future__ import annotations

import logging
from typing import Any

import pytest
from serve.served import ANSWER, KEY, Served, completion, tokenizer

from rayllm.observability.logs import TextFormatter

GUARDED = [
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/path"),
    ("POST", "/v1/completions"),
    ("POST", "//v1/completions"),
    ("POST", "/V1/completions"),
    ("POST", "/v1/completions%00"),
    ("POST", "/health/../v1/completions"),
    ("POST", "/health/"),
    ("POST", "/tokenize"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_every_path_asks_for_a_key(method: str, path: str) -> None:
    async with Served(api_keys=(KEY,)).client() as client:
        response = await client.request(method, path, headers={"x-original-url": "/health"})

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
async def test_probes_need_no_key(path: str) -> None:
    async with Served(api_keys=(KEY,)).client() as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer other", 200),
        ("Bearer wrong", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer ", 401),
        (KEY, 401),
        ("Basic dXNlcjpwYXNz", 401),
        (b"Bearer \xff\xfe\xe9", 401),
    ],
)
async def test_only_a_right_key_opens(value: Any, status: int) -> None:
    async with Served(api_keys=(KEY, "other")).client() as client:
        response = await client.get("/v1/models", headers=[(b"authorization", value)])

    assert response.status_code == status


async def test_two_keys_at_once_open_nothing() -> None:
    async with Served(api_keys=(KEY,)).client() as client:
        headers = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_without_keys_nothing_is_asked() -> None:
    async with Served().client() as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-big", "a" * 40_000)], 431),
        ([("x-odd", b"a\x00b")], 400),
        ([("x-odd", b"a\r\nb: c")], 400),
        ([("host", "a"), ("host", "b")], 400),
        ([("content-encoding", "gzip")], 415),
        ([("transfer-encoding", "gzip, chunked")], 400),
        ([("content-length", "99999999999999")], 413),
        ([("content-length", "9" * 5000)], 413),
    ],
)
async def test_headers_are_bounded_and_plain(headers: list[tuple[str, Any]], status: int) -> None:
    async with Served().client() as client:
        response = await client.post("/v1/completions", headers=headers, json=completion())

    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("my-id.1", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("two words", False),
        (b"\xc3\xa9", False),
        ("", False),
    ],
)
async def test_a_request_id_is_answered_the_clients_where_it_is_sane(sent: Any, kept: bool) -> None:
    async with Served().client() as client:
        for path in ("/health", "/nowhere"):
            answered = (await client.get(path, headers=[("x-request-id", sent)])).headers["x-request-id"]
            assert (answered == sent) is kept
            assert kept or answered.startswith("req-")


async def test_each_request_is_one_log_line_with_its_id_and_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = Served(api_keys=[KEY])
    async with served.client(authorization=f"Bearer {KEY}") as client:
        await client.post("/v1/completions", json=completion(prompt="my secret"), headers={"x-request-id": "job-7"})
        await client.get("/health")
        await client.get("/dashboard/state")  # which an open page asks for every few seconds

    access = [record for record in caplog.records if record.name == "rayllm.serve.access"]
    assert [(record.levelname, vars(record)["fields"]["path"]) for record in access] == [
        ("INFO", "/v1/completions"),
        ("DEBUG", "/health"),
        ("DEBUG", "/dashboard/state"),
    ]
    fields = vars(access[0])["fields"]
    assert (vars(access[0])["request_id"], fields["method"], fields["status"]) == ("job-7", "POST", 200)
    num_prompt = len(served.engine.requests[0].prompt_token_ids)
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (num_prompt, len(tokenizer().encode(ANSWER)) + 1)
    assert "POST /v1/completions 200" in access[0].getMessage()
    assert KEY not in caplog.text
    assert "my secret" not in caplog.text


async def test_a_path_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rayllm.serve.access")
    async with Served().client() as client:
        await client.get("/v1/a%0d%0aINFO:fake", headers={"x-request-id": "mine"})

    (record,) = [r for r in caplog.records if r.name == "rayllm.serve.access"]
    assert " 404 " in record.getMessage()
    assert TextFormatter().format(record).endswith(" [mine]")
    assert "\n" not in TextFormatter().format(record)


async def test_the_engine_is_told_the_id_of_the_client() -> None:
    served = Served()
    async with served.client() as client:
        await client.post("/v1/completions", json=completion(prompt=["a", "b"]), headers={"x-request-id": "job-7"})

    assert [request.log_id for request in served.engine.requests] == ["job-7", "job-7"]


async def test_a_bug_behind_the_guard_is_a_500_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    served = Served()

    async def broken() -> None:
        raise KeyError("secret")

    served.app.add_api_route("/broken", broken)
    async with served.client() as client:
        response = await client.get("/broken")

    assert response.status_code == 500
    assert "retry-after" not in response.headers
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("scope", [{"path": "*"}, {"path": "/health", "http_version": "0.9"}])
async def test_what_is_not_http_1_is_refused(scope: dict[str, Any]) -> None:
    sent = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    await Served().app({"type": "http", "method": "GET", "headers": [], **scope}, receive, send)

    assert sent[0]["status"] == 400


async def test_a_websocket_is_refused() -> None:
    sent = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/completions", "headers": []}
    await Served().app(scope, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("origin", ["https://page.example", "https://other.example"])
async def test_pages_of_allowed_origins_may_call_it_and_no_others(origin: str) -> None:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    async with Served(api_keys=(KEY,), allowed_origins=("https://page.example",)).client() as client:
        preflight = await client.options("/v1/completions", headers=asked)
        answer = await client.get("/v1/models", headers={"origin": origin, "authorization": f"Bearer {KEY}"})
        refused = await client.get("/v1/models", headers={"origin": origin})

    allowed = origin if origin == "https://page.example" else None
    assert preflight.status_code == (200 if allowed else 400)
    assert answer.headers.get("access-control-allow-origin") == allowed
    assert refused.status_code == 401


async def test_no_origin_is_allowed_unless_it_is_said() -> None:
    async with Served().client() as client:
        answer = await client.get("/v1/models", headers={"origin": "https://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
