"""SageMaker's routes: `/invocations` for every body, and `/ping` (`app`)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.answer import Answer
from rayllm.api.openai import pooling
from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.resume import LAST_EVENT_HEADER
from rayllm.api.service import ModelService
from rayllm.api.vllm.invocations import Endpoint, endpoint_of
from rayllm.serve.routes.endpoints import Endpoints, PlainWork

_PLAIN: dict[Endpoint, PlainWork] = {
    "embeddings": pooling.embeddings,
    "rerank": pooling.rerank,
    "score": pooling.score,
}


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    async def open_answer(fields: dict[str, Any], service: ModelService, client_key: str) -> Answer:
        if endpoint_of(fields) == "chat":
            return await open_chat(fields, service, client_key)
        return await open_completion(fields, service, client_key)

    @app.post("/invocations", include_in_schema=False)  # its bodies are those of the other routes
    async def invocations(request: Request) -> Response:
        if LAST_EVENT_HEADER in request.headers:
            return await endpoints.generate(request, open_answer)
        try:
            async with endpoints.body(request) as fields:
                work = _PLAIN.get(endpoint_of(fields))
        except Exception as error:
            return endpoints.refuse(request, error)
        if work is not None:
            return await endpoints.plain(request, work, fields)
        return await endpoints.generate(request, open_answer, fields=fields)
