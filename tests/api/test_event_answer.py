"""Anthropic's messages and OpenAI's responses tell what chats tell: reasoning, calls, schemas of answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api.fake_engine import EOS_ID, FakeEngine, config
from api.streams import typed_events_of, whole_of
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from rayllm.api.anthropic.messages import open_message
from rayllm.api.openai.response_store import ResponseStore
from rayllm.api.openai.responses import open_response
from rayllm.api.service import ModelService
from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOL = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "weather", "description": "Of a city", "parameters": SCHEMA}
MESSAGE: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "messages": [{"role": "user", "content": "weather?"}]}
RESPONSE: dict[str, Any] = {"model": "tiny", "input": "weather?"}


@pytest.fixture
def service(tokenizer: Tokenizer) -> ModelService:
    """Its model says a word and makes a call, whatever is asked."""
    engine = FakeEngine(lambda request, choice: [*tokenizer.encode(f"I look.\n{CALL}"), EOS_ID])
    made = ModelService()
    made.set_ready(config(max_model_len=2048), tokenizer, engine)
    return made


def prompt_of(service: ModelService) -> str:
    engine = service.model().engine
    assert isinstance(engine, FakeEngine)
    return service.model().tokenizer.decode(list(engine.requests[-1].prompt_token_ids), False)


async def test_a_responses_logprobs_are_those_of_what_follows_the_reasoning(tokenizer: Tokenizer) -> None:
    thought, said = tokenizer.encode("<think>hm, hm</think>"), tokenizer.encode("Hello")
    service = ModelService()
    settings = EngineConfig(reasoning_parser="qwen3")
    engine = FakeEngine(lambda request, choice: [*thought, *said, EOS_ID])
    service.set_ready(config(max_model_len=2048, engine=settings), tokenizer, engine)
    fields = {**RESPONSE, "include": ["message.output_text.logprobs"], "top_logprobs": 2}

    whole = await whole_of((await open_response(fields, service, ResponseStore())).answer)
    opened = await open_response({**fields, "stream": True}, service, ResponseStore())
    events = await typed_events_of(opened.answer)

    reasoning, message = whole["output"]
    assert reasoning["content"][0]["text"] == "hm, hm"
    logprobs = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == [tokenizer.token_text(i) for i in (*said, EOS_ID)]
    assert events[-1]["response"]["output"][1]["content"] == message["content"]


async def test_a_call_is_a_block_of_anthropics_message(service: ModelService) -> None:
    whole = await whole_of(await open_message({**MESSAGE, "tools": [TOOL]}, service))
    text, call = whole["content"]
    assert text == {"type": "text", "text": "I look."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Zürich"})
    assert whole["stop_reason"] == "tool_use"
    assert "Of a city" in prompt_of(service)

    events = await typed_events_of(await open_message({**MESSAGE, "tools": [TOOL], "stream": True}, service))
    parts = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert len(parts) > 1
    assert json.loads("".join(parts)) == {"city": "Zürich"}
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_results_of_calls_go_back_to_the_model(service: ModelService) -> None:
    turns = [
        *MESSAGE["messages"],
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "X"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain in X"}]},
    ]
    await whole_of(await open_message({**MESSAGE, "messages": turns, "tools": [TOOL]}, service))
    assert "rain in X" in prompt_of(service)

    items = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "X"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun in X"},
    ]
    await whole_of(
        (await open_response({**RESPONSE, "input": items, "tools": [FUNCTION]}, service, ResponseStore())).answer
    )
    assert "sun in X" in prompt_of(service)


async def test_a_call_is_an_item_of_a_response(service: ModelService) -> None:
    store = ResponseStore()
    whole = await whole_of((await open_response({**RESPONSE, "tools": [FUNCTION]}, service, store)).answer)
    Response.model_validate(whole)
    message, call = whole["output"]
    assert message["content"][0]["text"] == "I look."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "weather",
        {"city": "Zürich"},
    )
    assert whole["status"] == "completed"
    assert whole["tools"][0] == {**FUNCTION, "strict": None}

    events = await typed_events_of(
        (await open_response({**RESPONSE, "tools": [FUNCTION], "stream": True}, service, store)).answer
    )
    for event in events:
        EVENT.validate_python(event)
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert json.loads(done[0]["arguments"]) == {"city": "Zürich"}


async def test_the_call_of_a_response_is_answered_in_the_next(service: ModelService) -> None:
    store = ResponseStore()
    first = await whole_of((await open_response({**RESPONSE, "tools": [FUNCTION]}, service, store)).answer)
    output = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "fog"}
    fields = {**RESPONSE, "input": [output], "previous_response_id": first["id"], "tools": [FUNCTION]}
    await whole_of((await open_response(fields, service, store)).answer)
    prompt = prompt_of(service)
    assert prompt.index("weather?") < prompt.index("Zürich") < prompt.index("fog")


async def test_a_tool_that_must_be_called_is_asked_of_the_engine(service: ModelService) -> None:
    engine = service.model().engine
    assert isinstance(engine, FakeEngine)
    choice = {"type": "tool", "name": "weather"}
    await whole_of(await open_message({**MESSAGE, "tools": [TOOL], "tool_choice": choice}, service))
    assert engine.requests[-1].params.structured_outputs is not None
    with pytest.raises(RequestError) as caught:
        await open_message({**MESSAGE, "tools": [TOOL], "tool_choice": {**choice, "name": "other"}}, service)
    assert caught.value.param == "tool_choice"

    named = {"type": "function", "name": "weather"}
    opened = await open_response({**RESPONSE, "tools": [FUNCTION], "tool_choice": named}, service, ResponseStore())
    opened.answer.close()
    assert engine.requests[-1].params.structured_outputs is not None
