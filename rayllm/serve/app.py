"""The HTTP application: routes, and the one shape of errors. All that is said of a model comes from `api`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import rayllm
from rayllm.api import tokens
from rayllm.api.answer import Answer
from rayllm.api.chat import open_chat
from rayllm.api.completions import open_completion
from rayllm.api.errors import answer, answer_for, envelope, shorten
from rayllm.api.resume import LAST_EVENT_HEADER, RESUME_HEADER, HeldStreams
from rayllm.api.service import READY, Health, ModelService
from rayllm.api.sse import whole_stream
from rayllm.errors import RayLLMError, RequestError
from rayllm.observability.metrics import CONTENT_TYPE
from rayllm.serve.http_answers import (
    READ_TIMEOUT_S,
    ClientGoneError,
    EventStream,
    error_response,
    json_response,
    read_object,
    unless_gone,
)
from rayllm.serve.http_guard import Guard

MAX_BODY_BYTES = 32 * 2**20
_CLIENT_CLOSED_STATUS = 499
TIMEOUT_HEADER = "x-request-timeout"
_LOG = logging.getLogger("rayllm.serve")

_Open = Callable[[dict[str, Any], ModelService, str], Awaitable[Answer]]
_Plain = Callable[[dict[str, Any], ModelService], Awaitable[dict[str, Any]]]


def create_app(
    service: ModelService,
    *,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> FastAPI:
    """The application in front of a service. With `api_keys`, all but `/health`, `/ready` and `/ping` ask for one."""
    app = FastAPI(title="RayLLM", version=rayllm.__version__, redirect_slashes=False)
    app.add_middleware(Guard, api_keys=tuple(api_keys), max_body_bytes=max_body_bytes)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _http_error)
    _add_model_routes(app, service)
    _add_answer_routes(app, service, max_body_bytes, read_timeout_s)
    _add_state_routes(app, service)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        return error_response(answer(400, str(error)))
    codes = {404: "path_not_found", 405: "method_not_allowed"}
    message = {404: f"there is nothing at {request.scope['path']}", 405: f"{request.method} is not allowed here"}
    status = error.status_code
    refused = answer(status, message.get(status, str(error.detail)), code=codes.get(status))
    refused.headers.update(error.headers or {})
    return error_response(refused)


# ---------------------------------------------------------------------------------------------------------- models


def _add_model_routes(app: FastAPI, service: ModelService) -> None:
    def card() -> dict[str, Any]:
        model = service.model()
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "rayllm",
            "root": model.name,
            "max_model_len": model.config.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        try:
            return json_response({"object": "list", "data": [card()]})
        except RayLLMError as error:
            return _refuse(service, error)

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        try:
            service.named(model_id)
            return json_response(card())
        except RayLLMError as error:
            return _refuse(service, error)


# --------------------------------------------------------------------------------------------------------- answers


def _add_answer_routes(app: FastAPI, service: ModelService, max_body_bytes: int, read_timeout_s: float) -> None:
    held = app.state.held = HeldStreams()

    async def generate(request: Request, open_answer: _Open) -> Response:
        last_event_id, client_key = request.headers.get(LAST_EVENT_HEADER), request.state.client_key
        try:
            if last_event_id is not None:
                return EventStream(held.resume(last_event_id, client_key), _nothing, read_timeout_s)
            fields = await read_object(request, max_body_bytes)
            _read_timeout(request, fields)
            found = await open_answer(fields, service, client_key)
        except Exception as error:
            return _refuse(service, error)
        if not fields.get("stream"):
            return await _whole(request, found, service)
        holder = held if request.headers.get(RESUME_HEADER, "").lower() == "true" else None
        return await _stream(request, found, service, holder, read_timeout_s)

    async def plain(request: Request, work: _Plain) -> Response:
        try:
            return json_response(await work(await read_object(request, max_body_bytes), service))
        except Exception as error:
            return _refuse(service, error)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, open_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, open_chat)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await plain(request, tokens.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await plain(request, tokens.detokenize)


def _read_timeout(request: Request, fields: dict[str, Any]) -> None:
    """The header means what the field means, and the field wins."""
    header = request.headers.get(TIMEOUT_HEADER)
    if header is not None and fields.get("timeout") is None:
        try:
            fields["timeout"] = float(header)
        except ValueError:
            raise RequestError(
                f"the header {TIMEOUT_HEADER} must be seconds, got {shorten(header)}", param="timeout"
            ) from None


async def _whole(request: Request, found: Answer, service: ModelService) -> Response:
    """Waits for all of an answer. Aborts it when the client goes."""
    try:
        return json_response(await unless_gone(request.receive, found.whole()))
    except Exception as error:
        return _refuse(service, error)
    finally:
        found.close()


async def _stream(
    request: Request, found: Answer, service: ModelService, holder: HeldStreams | None, read_timeout_s: float
) -> Response:
    """Waits for the beginning of an answer. Aborts it when the client goes, unless `holder` keeps it for its return."""
    handed_on = False
    try:
        await unless_gone(request.receive, found.start())
        handed_on = True
    except Exception as error:
        return _refuse(service, error)
    finally:
        if not handed_on:
            found.close()
    events = whole_stream(found.events())
    if holder is None:
        return EventStream(events, found.close, read_timeout_s)
    stream = holder.hold(found.id, request.state.client_key, events, found.close)
    return EventStream(stream.read(), _nothing, read_timeout_s)


def _nothing() -> None:
    """A held stream outlives its connection."""


def _refuse(service: ModelService, error: Exception) -> Response:
    if isinstance(error, ClientGoneError):
        return Response(status_code=_CLIENT_CLOSED_STATUS)
    if not isinstance(error, RayLLMError):
        _LOG.error("a request failed", exc_info=error)
    refused = answer_for(error)
    if service.metrics is not None:
        service.metrics.request_refused(refused.code)
    body_unread = isinstance(error, RequestError) and error.status in (408, 413)
    return error_response(refused, close=body_unread)


# ----------------------------------------------------------------------------------------------------------- state


def _health_response(health: Health) -> Response:
    if health.healthy:
        return json_response({"status": "ok", "stage": health.stage})
    message = f"not healthy: {health.stage}" + (f" ({health.reason})" if health.reason else "")
    body = envelope(503, message, code="not_ready" if health.stage != READY else "engine_unhealthy")
    return json_response(
        {**body, "status": "unavailable", "stage": health.stage, "reason": health.reason}, 503, {"retry-after": "1"}
    )


def _add_state_routes(app: FastAPI, service: ModelService) -> None:
    async def health() -> Response:
        return _health_response(await service.health())

    async def ready() -> Response:
        return _health_response(service.ready())

    for path, answer_state in (("/health", health), ("/ping", health), ("/ready", ready)):
        app.add_api_route(path, answer_state, methods=["GET", "HEAD"], name=path[1:])

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": rayllm.__version__})

    @app.get("/load")
    async def load() -> Response:
        metrics = service.metrics
        return json_response({"server_load": metrics.num_open if metrics else 0})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        stats = await service.engine_stats()
        text = service.metrics.render(stats) if service.metrics else b""
        return Response(text, media_type=CONTENT_TYPE)
