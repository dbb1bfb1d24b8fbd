"""The document of the API is of the API: what it says of bodies and statuses is what is read and answered."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from serve.served import Served, chat, completion

from rayllm.api.protocol import read_body
from rayllm.errors import RequestError
from rayllm.serve.openapi import BODIES

DOCUMENT: dict[str, Any] = Served().app.openapi()
BODILESS = {"/v1/responses/{response_id}/cancel"}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": completion(),
    "/v1/chat/completions": chat(tools=None),
    "/v1/responses": {"model": "tiny", "input": "hi"},
    "/v1/messages": chat(max_tokens=5),
    "/generate": {"prompt": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [70]},
}


def schema_of(path: str) -> dict[str, Any]:
    name = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return {"$ref": name, "components": DOCUMENT["components"]}


def test_every_route_is_described_and_every_body() -> None:
    routes = {
        (re.sub(r":path}", "}", route.path), method.lower())
        for route in Served().app.routes
        if getattr(route, "include_in_schema", False)
        for method in route.methods  # type: ignore[attr-defined]
    }
    described = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == routes
    posts = {path for path, method in routes if method == "post"}
    assert posts == BODIES.keys() | BODILESS
    identities = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("path", sorted(RIGHT))
async def test_what_the_document_allows_is_read_and_answered(path: str) -> None:
    jsonschema.validate(RIGHT[path], schema_of(path))
    async with Served().client() as client:
        assert (await client.post(path, json=RIGHT[path])).status_code == 200


@pytest.mark.parametrize("path", sorted(BODIES))
async def test_a_wrong_body_is_refused_with_a_status_of_the_document(path: str) -> None:
    statuses = DOCUMENT["paths"][path]["post"]["responses"].keys()
    async with Served().client() as client:
        for body in ({}, {"model": 5}, {**RIGHT.get(path, {}), "unknown_field": 1}, {"model": "other"}):
            response = await client.post(path, json=body)
            assert response.status_code in (400, 404)
            assert str(response.status_code) in statuses
            assert response.json()["error"]["message"]


def test_names_without_effect_are_described_and_unknown_ones_are_not_allowed() -> None:
    right = completion(user="me", service_tier="auto", suffix=None)
    jsonschema.validate(right, schema_of("/v1/completions"))
    read_body(right, BODIES["/v1/completions"])
    for wrong in (completion(usr="me"), completion(suffix="x"), completion(n="1")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema_of("/v1/completions"))
        with pytest.raises(RequestError):
            read_body(wrong, BODIES["/v1/completions"])


async def test_the_page_loads_nothing_from_outside() -> None:
    async with Served().client() as client:
        page = await client.get("/docs")
        document = await client.get("/openapi.json")
    assert document.json() == DOCUMENT
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/responses/{response_id}/cancel" in page.text
    assert "href=pages/icon.svg" in page.text  # else a browser asks for /favicon.ico
    assert not re.search(r"https?://|//cdn|<script", page.text)
