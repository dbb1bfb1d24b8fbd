"""The HTTP application: routes, and the one shape of errors. All that is said of a model comes from `api`."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import rayllm
from rayllm.api.errors import answer, envelope, shaped
from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.resume import RESUME_HEADER
from rayllm.api.service import READY, Health, ModelService
from rayllm.errors import RequestError, shorten, without_paths
from rayllm.observability.metrics import CONTENT_TYPE
from rayllm.observability.trace import Tracer
from rayllm.serve import openapi
from rayllm.serve.browser_guard import BrowserGuard, Cors
from rayllm.serve.http_guard import Guard
from rayllm.serve.http_responses import READ_TIMEOUT_S, error_response, json_response
from rayllm.serve.markup.markup import Markup
from rayllm.serve.routes import (
    faults,
    generate,
    invocations,
    markup,
    messages,
    models,
    pooling,
    responses,
)
from rayllm.serve.routes.endpoints import Endpoints
from rayllm.serve.routes.faults import KillWorker
from rayllm.serve.routes.pages import Describe, add_page_routes

MAX_BODY_BYTES = 32 * 2**20
"""Whatever the model."""


def create_app(
    service: ModelService,
    *,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    read_timeout_s: float = READ_TIMEOUT_S,
    describe: Describe | None = None,
    kill_worker: KillWorker | None = None,
    tracer: Tracer | None = None,
    sends_request_id: bool = True,
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The application in front of a service. With `api_keys`, all but `/health`, `/ready`, `/ping` and the files of
    the pages ask for one. `describe` says what runs where, for the dashboard; `kill_worker` turns fault injection on;
    `sends_request_id=False`, that what stands before the application sends `x-request-id` by itself.
    Pages of `allowed_origins` may call it from a browser. Without `api_keys` no others may, and `allowed_hosts` are
    the names that it is called by, besides addresses and localhost (None: any).
    """
    app = FastAPI(
        title="RayLLM",
        version=rayllm.__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    allowed_origins = [origin.lower().rstrip("/") for origin in allowed_origins]
    app.add_middleware(
        Guard,
        api_keys=tuple(api_keys),
        max_body_bytes=lambda: min(max_body_bytes, service.max_body_bytes),
        sends_request_id=sends_request_id,
        on_answer=service.note_answer,
        tracer=tracer,
        browsers=BrowserGuard(allowed_hosts, allowed_origins),
    )
    if allowed_origins:  # outermost: a browser asks whether it may without any key
        app.add_middleware(Cors, allow_origins=allowed_origins)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _http_error)
    endpoints = Endpoints(service, max_body_bytes, read_timeout_s)
    app.state.held = endpoints.held
    _add_answer_routes(app, endpoints)
    for add_routes in (
        generate.add_routes,
        invocations.add_routes,
        messages.add_routes,
        models.add_routes,
        pooling.add_routes,
        responses.add_routes,
    ):
        add_routes(app, endpoints)
    _add_state_routes(app, service)
    faults.add_routes(app, endpoints, kill_worker)
    app.state.markup = Markup()
    markup.add_routes(app, endpoints, app.state.markup)
    add_page_routes(app, service, describe, can_kill_workers=kill_worker is not None)
    openapi.add_routes(app)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        return error_response(shaped(answer(400, str(error)), request.scope["path"]))
    codes = {404: "path_not_found", 405: "method_not_allowed"}
    allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
    message = {
        404: f"there is nothing at {request.scope['path']}",
        405: f"{request.method} is not allowed here: use {allowed.replace(', ', ' or ')}",
    }
    status = error.status_code
    refused = answer(status, message.get(status, str(error.detail)), code=codes.get(status))
    refused.headers.update(error.headers or {})
    return error_response(shaped(refused, request.scope["path"]))


# --------------------------------------------------------------------------------------------------------- answers


def _add_answer_routes(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await endpoints.generate(request, open_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await endpoints.generate(request, open_chat)

    @app.delete("/v1/chat/completions/{answer_id}")
    async def drop_chat_completion(request: Request, answer_id: str) -> Response:
        """Ends an answer that `x-rayllm-resume` keeps going without its client."""
        try:
            if not await endpoints.drop("/v1/chat/completions", answer_id, request.state.client_key):
                message = (
                    f"no answer {shorten(answer_id)} is held: it has ended, or {RESUME_HEADER}: true did not begin it"
                )
                raise RequestError(message, code="answer_not_found", status=404)
        except Exception as error:
            return endpoints.refuse(request, error)
        return json_response({"id": answer_id, "object": "chat.completion.deleted", "deleted": True})


# ----------------------------------------------------------------------------------------------------------- state


def _health_response(health: Health) -> Response:
    if health.healthy:
        return json_response({"status": "ok", "stage": health.stage})
    stage, reason = without_paths(health.stage), without_paths(health.reason)
    said = stage if stage != READY else reason
    message = f"not healthy: {said}" + (f" ({reason})" if reason and reason != said else "")
    body = envelope(503, message, code="not_ready" if health.stage != READY else "engine_unhealthy")
    body |= {"status": "unavailable", "stage": stage, "reason": reason}
    return json_response(body, 503, {"retry-after": "1"})


def _add_state_routes(app: FastAPI, service: ModelService) -> None:
    async def health() -> Response:
        return _health_response(await service.health())

    async def ready() -> Response:
        return _health_response(service.ready())

    for path, answer_state in (("/health", health), ("/ping", health), ("/ready", ready)):
        app.add_api_route(path, answer_state, methods=["GET", "HEAD"], name=path[1:])
    app.add_api_route("/ping", health, methods=["POST"], include_in_schema=False)  # SageMaker asks either way

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": rayllm.__version__})

    @app.get("/load")
    async def load() -> Response:
        metrics = service.metrics
        return json_response({"server_load": metrics.num_open if metrics else 0})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(await service.render_metrics(), media_type=CONTENT_TYPE)
