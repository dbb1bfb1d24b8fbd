"""What the chat page asks for when a code block or a formula is whole: data, of which it makes nodes by itself.

`POST /markup/code` takes `{"language", "code"}` and answers `{"tokens": [[kind, text], ...]}`; `POST /markup/formulas`
takes `{"formulas": [{"latex", "display"}, ...]}` and answers `{"formulas": [tree, ...]}`. Null stands for what cannot
be marked up. Both ask for the API key, where there is one.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.errors import RequestError
from rayllm.serve.body_reader import BodyReader
from rayllm.serve.markup.markup import Markup
from rayllm.serve.routes.endpoints import Endpoints

MAX_BODY_BYTES = 256 * 1024
MAX_CODE_CHARACTERS = 64 * 1024
MAX_LANGUAGE_CHARACTERS = 30
MAX_FORMULAS = 64
MAX_LATEX_CHARACTERS = 4000


def add_routes(app: FastAPI, endpoints: Endpoints, markup: Markup) -> None:
    bodies = BodyReader(endpoints.service, MAX_BODY_BYTES)

    async def read(request: Request) -> dict[str, Any]:
        async with bodies.opened(request) as fields:
            return fields

    @app.post("/markup/code", include_in_schema=False)
    async def code(request: Request) -> Response:
        try:
            fields = _fields(await read(request), ("language", "code"))
            asked = {
                "language": _text(fields, "language", MAX_LANGUAGE_CHARACTERS),
                "code": _text(fields, "code", MAX_CODE_CHARACTERS),
            }
            return _json(b'{"tokens":' + await markup.of(asked) + b"}")
        except Exception as error:
            return endpoints.refuse(request, error)

    @app.post("/markup/formulas", include_in_schema=False)
    async def formulas(request: Request) -> Response:
        try:
            fields = _fields(await read(request), ("formulas",))
            asked = [_formula(value) for value in _list(fields["formulas"])]
            trees = await asyncio.gather(*map(markup.of, asked))
            return _json(b'{"formulas":[' + b",".join(trees) + b"]}")
        except Exception as error:
            return endpoints.refuse(request, error)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _fields(body: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The body, where it has these fields and no others."""
    if not isinstance(body, dict):
        raise RequestError(f"a formula must be an object, got {type(body).__name__}", param="formulas")
    for name in names:
        if name not in body:
            raise RequestError(f"{name} is required", param=name)
    for name in body:
        if name not in names:
            raise RequestError(f"unknown field {name[:80]!r}: give {', '.join(names)}", param=name[:80])
    return body


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_FORMULAS:
        raise RequestError(f"formulas must be a list of 1 to {MAX_FORMULAS} formulas", param="formulas")
    return value


def _formula(value: Any) -> dict[str, Any]:
    fields = _fields(value, ("latex", "display"))
    if not isinstance(fields["display"], bool):
        raise RequestError("display must be true or false", param="formulas")
    return {"latex": _text(fields, "latex", MAX_LATEX_CHARACTERS), "display": fields["display"]}


def _text(fields: dict[str, Any], name: str, limit: int) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be a text of at least one character", param=name)
    if len(value) > limit:
        raise RequestError(f"{name} has {len(value)} characters, at most {limit} are marked up", param=name)
    return value
