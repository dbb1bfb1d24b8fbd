"""What `/openapi.json` and `/docs` say: the bodies that are read, and every status that is answered."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.anthropic.messages import CountTokensBody, MessagesBody
from rayllm.api.openai.pooling import ClassifyBody, EmbeddingsBody, PoolingBody, RerankBody, ScoreBody
from rayllm.api.openai.responses import ResponsesBody
from rayllm.api.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, GenerateBody, TokenizeBody
from rayllm.observability.metrics import CONTENT_TYPE
from rayllm.serve.http_responses import json_response

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/generate": GenerateBody,
    "/generate_stream": GenerateBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/embeddings": EmbeddingsBody,
    "/pooling": PoolingBody,
    "/classify": ClassifyBody,
    "/v1/score": ScoreBody,
    "/score": ScoreBody,
    "/v1/rerank": RerankBody,
    "/v2/rerank": RerankBody,
    "/rerank": RerankBody,
}
_STREAMS = {
    "/v1/completions": "text/event-stream",
    "/v1/chat/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/v1/responses/{response_id}": "text/event-stream",
    "/v1/messages": "text/event-stream",
    "/generate": "application/x-ndjson",
    "/generate_stream": "text/event-stream",
}
"""What a stream of that path is."""
_TEXTS = {"/metrics": CONTENT_TYPE.partition(";")[0], "/docs": "text/html", "/": "text/html", "/dashboard": "text/html"}
_QUERIES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/responses/{response_id}": {
        "stream": {"type": "boolean"},
        "starting_after": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    },
    "/v1/responses/{response_id}/input_items": {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"type": "string", "enum": ["asc", "desc"]},
        "after": {"type": "string"},
    },
}
_ALWAYS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "An API key is asked for, and none or a wrong one was sent.",
    "404": "There is no such model or object.",
    "431": "The headers are too long.",
    "503": "The model is not ready, or failed; come back after `Retry-After` seconds.",
}
_OF_BODIES = {
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "429": "Too many requests wait; come back after `Retry-After` seconds.",
}
_STRING, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _STRING, "type": _STRING, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
        }
    },
}


def add_routes(app: FastAPI) -> None:
    """Both pages, made once and from nothing outside."""
    app.openapi = lambda: app.openapi_schema or document(app)  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        return json_response(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return Response(page(app.openapi()), media_type="text/html")


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application; kept at it."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            path = route.path_format
            for method in sorted(route.methods or ()):
                paths.setdefault(path, {})[method.lower()] = _operation(path, method.lower(), route, schemas)
    app.openapi_schema = {
        "openapi": "3.1.0",
        "info": {
            "title": app.title,
            "version": app.version,
            "description": "An LLM inference engine native to Ray.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }
    return app.openapi_schema


def _operation(path: str, method: str, route: APIRoute, schemas: dict[str, Any]) -> dict[str, Any]:
    words = f"{method} {path}"
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.param_convertors
    ]
    for name, schema in _QUERIES.get(path, {}).items() if method == "get" else ():
        parameters.append({"name": name, "in": "query", "schema": schema})
    operation: dict[str, Any] = {"operationId": re.sub(r"\W+", "_", words).strip("_"), "parameters": parameters}
    body = BODIES.get(path) if method == "post" else None
    if body is not None:
        schemas.setdefault(body.__name__, _schema(body, schemas))
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        operation["requestBody"] = {"required": True, "content": content}
    operation["responses"] = _responses(path, method, has_body=body is not None)
    return operation


def _responses(path: str, method: str, *, has_body: bool) -> dict[str, Any]:
    answers: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path in _TEXTS:
        answers = {_TEXTS[path]: {"schema": {"type": "string"}}}
    elif path in _STREAMS and method != "delete":
        answers[_STREAMS[path]] = {"schema": {"type": "object"}}
    refusals = _ALWAYS | (_OF_BODIES if has_body else {})
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "The answer.", "content": answers},
        **{status: {"description": why, "content": error} for status, why in sorted(refusals.items())},
    }


def _schema(body: type[Body], schemas: dict[str, Any]) -> dict[str, Any]:
    """The body's own fields, and the names that it takes without effect or for a neutral value alone."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    properties = schema["properties"]
    for name in sorted(body.without_effect - properties.keys()):
        properties[name] = {"description": "Accepted, without effect."}
    for name, (neutral, reason) in sorted(body.not_supported.items()):
        if name not in properties:
            properties[name] = {"enum": [None, *neutral], "description": f"{name} {reason}."}
    return dict(schema)


# ------------------------------------------------------------------------------------------------------------- page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
summary{cursor:pointer;padding:.3rem 0}code{font-size:.95em}b{display:inline-block;min-width:4.5rem}
table{border-collapse:collapse;margin:.5rem 0 1rem;width:100%}td{border-top:1px solid #8884;padding:.2rem .6rem .2rem 0;
vertical-align:top}pre{overflow:auto;padding:.6rem;border:1px solid #8884}
"""


def page(found: dict[str, Any]) -> str:
    """The document for reading: no script, no outside asset."""
    info, schemas = found["info"], found["components"]["schemas"]
    rows = "".join(
        _section(path, method, operation, schemas)
        for path, operations in sorted(found["paths"].items())
        for method, operation in operations.items()
    )
    error = html.escape(json.dumps({"error": {"message": "...", "type": "...", "param": None, "code": None}}, indent=2))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<link rel=icon type=image/svg+xml href=pages/icon.svg>"
        f"<title>{html.escape(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1><p>{html.escape(info['description'])} "
        f"The same for programs: <a href=openapi.json>openapi.json</a>.</p>{rows}"
        f"<h2>Errors</h2><p>Anthropic's paths wrap this as Anthropic does.</p><pre>{error}</pre></html>"
    )


def _section(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
    fields = "".join(_field_rows(schema))
    statuses = ", ".join(operation["responses"])
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code></summary>"
        f"<table>{fields}</table><p>Answers with {statuses}.</p></details>"
    )


def _field_rows(schema: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        mark = " <i>required</i>" if name in required else ""
        description = field.get("description") or _type_words(field)
        yield f"<tr><td><code>{html.escape(name)}</code>{mark}<td>{html.escape(description)}"


def _type_words(field: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in field:
        return " or ".join(words for inner in field["anyOf"] if (words := _type_words(inner)) != "null")
    if "enum" in field or "const" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "object"
    if field.get("type") == "array":
        return f"list of {_type_words(field.get('items', {}))}"
    kind = field.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
