"""The models that are served, in the shape of whoever asks."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.openai.models import anthropic_card, anthropic_list, model_card, model_list
from rayllm.api.service import ServedModel
from rayllm.errors import RayLLMError
from rayllm.serve.http_responses import json_response
from rayllm.serve.routes.endpoints import Endpoints

_ANTHROPIC_HEADER = "anthropic-version"


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    service = endpoints.service

    def card(request: Request, model: ServedModel, name: str) -> dict[str, Any]:
        return (anthropic_card if _ANTHROPIC_HEADER in request.headers else model_card)(model, name)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            model = service.model()
            cards = [card(request, model, name) for name in model.names]
        except RayLLMError as error:
            return endpoints.refuse(request, error)
        return json_response((anthropic_list if _ANTHROPIC_HEADER in request.headers else model_list)(cards))

    @app.get("/v1/models/{model_id:path}")
    async def one_model(request: Request, model_id: str) -> Response:
        try:
            return json_response(card(request, service.named(model_id), model_id))
        except RayLLMError as error:
            return endpoints.refuse(request, error)
