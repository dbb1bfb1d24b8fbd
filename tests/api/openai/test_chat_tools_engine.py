"""Calls that a model must make, made by a random model: whatever it wants, they are calls, and follow the schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from api.inproc_engine import InprocClient
from api.streams import chunks_of, whole_of

from rayllm.api.openai.chat import open_chat
from rayllm.api.service import ModelService
from rayllm.text.tokenizer import Tokenizer

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
SHORT = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
"""The tiny model's context is too short to be told of tools."""
THINKS = SHORT + "<think>\n{# until </think> #}"


@pytest.fixture(scope="module")
def client(llama_path: Path) -> Iterator[InprocClient]:
    client = InprocClient(str(llama_path))
    yield client
    client.engine.close()


def served(client: InprocClient, template: str = SHORT, **settings: Any) -> ModelService:
    service = ModelService()
    tokenizer = Tokenizer.from_path(client.config.tokenizer_path)
    engine = client.config.engine.model_copy(update=settings)
    service.set_ready(
        client.config.model_copy(update={"engine": engine}),
        tokenizer.with_template(template),
        client,
    )
    return service


def body(service: ModelService, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": service.model().name, "messages": messages, "tools": TOOLS, "max_tokens": 120, **fields}


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral_v11", "deepseek_v3", "glm45", "pythonic", "openai"])
async def test_required_calls_follow_their_schemas_in_every_notation(client: InprocClient, name: str) -> None:
    service = served(client, tool_call_parser=name)

    fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    answer = await whole_of(await open_chat(body(service, **fields), service))

    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


async def test_a_named_tool_is_the_one_called_and_its_stream_is_the_same(client: InprocClient) -> None:
    service = served(client)
    fields = {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 3}

    [call] = (await whole_of(await open_chat(body(service, **fields), service)))["choices"][0]["message"]["tool_calls"]
    chunks = await chunks_of(await open_chat(body(service, **fields, stream=True), service))

    assert call["function"]["name"] == "weather"
    deltas = [delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS["weather"])


async def test_a_call_that_must_be_made_comes_after_reasoning(client: InprocClient) -> None:
    service = served(client, THINKS)
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400, "temperature": 2}
    end = service.model().tokenizer.encode("</think>")

    answer = await whole_of(
        await open_chat(body(service, **fields, logit_bias={str(i): 8 for i in end}, seed=5), service)
    )

    [choice] = answer["choices"]
    if choice["finish_reason"] != "length":  # a random model may think for ever
        assert choice["message"]["tool_calls"]
    assert choice["message"].get("content") in (None, "")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
