"""The model's sampling defaults hold on every route, and what a request says holds more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from api.fake_engine import MAX_MODEL_LEN, FakeEngine, config

from rayllm.api.anthropic.messages import open_message
from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.openai.response_store import ResponseStore
from rayllm.api.openai.responses import open_response
from rayllm.api.service import ModelService
from rayllm.api.vllm.generate import open_generate
from rayllm.config import GenerationDefaults
from rayllm.request import Request
from rayllm.text.tokenizer import Tokenizer

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
MESSAGES = [{"role": "user", "content": "hi"}]
Open = Callable[[dict[str, Any], ModelService], Awaitable[Any]]


async def _chat(fields: dict[str, Any], service: ModelService) -> Any:
    return await open_chat({"messages": MESSAGES, **fields}, service)


async def _completion(fields: dict[str, Any], service: ModelService) -> Any:
    return await open_completion({"prompt": "hi", **fields}, service)


async def _generate(fields: dict[str, Any], service: ModelService) -> Any:
    return await open_generate({"prompt": "hi", **fields}, service)


async def _response(fields: dict[str, Any], service: ModelService) -> Any:
    fields = {"max_output_tokens" if name == "max_tokens" else name: value for name, value in fields.items()}
    return (await open_response({"input": "hi", **fields}, service, ResponseStore())).answer


async def _message(fields: dict[str, Any], service: ModelService) -> Any:
    return await open_message({"messages": MESSAGES, "max_tokens": 50, **fields}, service)


ROUTES: dict[str, Open] = {
    "chat": _chat,
    "completions": _completion,
    "generate": _generate,
    "responses": _response,
    "messages": _message,
}


async def _asked(open_: Open, engine: FakeEngine, tokenizer: Tokenizer, limit: int | None, **fields: Any) -> Request:
    service = ModelService()
    defaults = GenerationDefaults(**DEFAULTS, max_tokens=30, max_tokens_limit=limit)
    service.set_ready(config(generation=defaults), tokenizer, engine)
    answer = await open_({"model": "tiny", **fields}, service)
    await answer.whole()
    return engine.requests[-1]


@pytest.mark.parametrize("route", ROUTES)
async def test_defaults_hold_on_every_route(route: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    request = await _asked(ROUTES[route], engine, tokenizer, None)

    assert {name: getattr(request.params, name) for name in DEFAULTS} == DEFAULTS
    assert request.max_tokens == (50 if route == "messages" else 30)  # there it is always given


@pytest.mark.parametrize("route", ROUTES)
async def test_what_a_request_says_holds_more(route: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

    request = await _asked(ROUTES[route], engine, tokenizer, None, **said, max_tokens=60)

    assert {name: getattr(request.params, name) for name in said} == said
    assert request.max_tokens == 60


@pytest.mark.parametrize("route", ROUTES)
async def test_null_is_not_said_and_a_bound_of_the_operators_holds(
    route: str, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    request = await _asked(ROUTES[route], engine, tokenizer, 30, temperature=None)
    assert request.params.temperature == 0.6
    assert request.max_tokens == 30
    request = await _asked(ROUTES[route], engine, tokenizer, 30, max_tokens=10 * MAX_MODEL_LEN)
    assert request.max_tokens == 30
    request = await _asked(ROUTES[route], engine, tokenizer, 30, max_tokens=5)
    assert request.max_tokens == 5


async def test_a_response_tells_what_it_was_drawn_with(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    service = ModelService()
    service.set_ready(config(generation=GenerationDefaults(**DEFAULTS)), tokenizer, engine)

    whole = await (await _response({"model": "tiny", "top_p": 0.5}, service)).whole()

    assert (whole["temperature"], whole["top_p"]) == (0.6, 0.5)
