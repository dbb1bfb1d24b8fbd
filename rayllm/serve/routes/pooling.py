"""Routes of models that answer with vectors, scores and classes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.openai import pooling
from rayllm.serve.routes.endpoints import Endpoints, PlainWork

ROUTES: dict[str, PlainWork] = {
    "/v1/embeddings": pooling.embeddings,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/rerank": pooling.rerank,
    "/v1/score": pooling.score,
    "/score": pooling.score,
    "/classify": pooling.classify,
    "/pooling": pooling.pooling,
}


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    for path, work in ROUTES.items():
        app.add_api_route(path, _route(endpoints, work), methods=["POST"], name=path.strip("/").replace("/", "_"))


def _route(endpoints: Endpoints, work: PlainWork) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await endpoints.plain(request, work)

    return route
