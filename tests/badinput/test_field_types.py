"""Whatever the type of a value in a body, the answer is 200 or the client's fault (400 to 422), never the server's."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from badinput.field_types import BASES, BOUND_BASES, RAW_VALUES, VALUES, fields_of, places, replaced
from serve.served import Served

_PLACE = "\N{HEAVY CHECK MARK}"
_JSON = {"content-type": "application/json"}


async def _post(client: httpx.AsyncClient, route: str, content: bytes) -> httpx.Response:
    return await client.post(route, content=content, headers=_JSON)


def _check(answer: httpx.Response, sent: Any) -> None:
    assert answer.status_code in (200, 400, 404, 413, 422), (answer.status_code, sent)
    if answer.status_code == 200:
        assert b'"internal_error"' not in answer.content, sent
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize("route", BASES)
async def test_a_value_of_any_type_is_never_the_servers_fault(route: str) -> None:
    base = {"model": "tiny", **BASES[route]}
    async with Served().client() as client:
        spec = (await client.get("/openapi.json")).json()
        further = [(name,) for name in fields_of(spec, route) if name not in base]
        for path in (*places(base), *further):
            for value in VALUES:
                body = replaced(base, path, value)
                _check(await _post(client, route, json.dumps(body).encode()), (path, value))


@pytest.mark.parametrize("route", BASES)
async def test_what_is_no_json_is_refused_wherever_it_stands(route: str) -> None:
    base = {"model": "tiny", **BASES[route]}
    async with Served().client() as client:
        for path in places(base):
            for value in RAW_VALUES:
                body = json.dumps(replaced(base, path, _PLACE)).encode()
                content = body.replace(json.dumps(_PLACE).encode(), value)
                answer = await _post(client, route, content)
                assert answer.status_code == 400, (path, value[:20], answer.status_code)


@pytest.mark.parametrize(("route", "base"), BOUND_BASES)
async def test_a_schema_with_values_of_any_type_is_never_the_servers_fault(route: str, base: dict[str, Any]) -> None:
    base = {"model": "tiny", "max_tokens": 4, **base}
    async with Served().client() as client:
        for path in places(base):
            for value in VALUES:
                body = replaced(base, path, value)
                _check(await _post(client, route, json.dumps(body).encode()), (path, value))


@pytest.mark.parametrize("content", [5, 1.5, True, -1, 10**30, {"a": 1}, [5], [None], [[]]])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
async def test_a_content_that_is_no_text_is_named(content: Any, role: str) -> None:
    body = {"model": "tiny", "messages": [{"role": role, "content": content}]}
    async with Served().client() as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "messages[0].content" in answer.json()["error"]["message"]
