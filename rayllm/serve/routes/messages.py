"""Anthropic's routes."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.anthropic.messages import count_tokens, open_message
from rayllm.serve.routes.endpoints import Endpoints


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await endpoints.generate(request, open_message)

    @app.post("/v1/messages/count_tokens")
    async def count_message_tokens(request: Request) -> Response:
        return await endpoints.plain(request, count_tokens)
