"""vLLM's own routes beside OpenAI's: plain generation, and tokens."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.vllm import tokens
from rayllm.api.vllm.generate import open_generate, open_generate_stream
from rayllm.api.vllm.tokenizer_info import tokenizer_info
from rayllm.serve.http_responses import json_response
from rayllm.serve.routes.endpoints import Endpoints


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post("/generate")
    async def generate(request: Request) -> Response:
        return await endpoints.generate(request, open_generate)

    @app.post("/generate_stream")
    async def generate_stream(request: Request) -> Response:
        return await endpoints.generate(request, open_generate_stream, always_streams=True)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await endpoints.plain(request, tokens.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await endpoints.plain(request, tokens.detokenize)

    @app.get("/tokenizer_info")
    async def show_tokenizer_info(request: Request) -> Response:
        try:
            return json_response(tokenizer_info(endpoints.service.model()))
        except Exception as error:
            return endpoints.refuse(request, error)
