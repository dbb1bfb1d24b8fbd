"""Anthropic's bodies and answers."""

from __future__ import annotations

from typing import Any

import pytest
from api.conftest import ANSWER
from api.fake_engine import MAX_MODEL_LEN, FakeEngine
from api.streams import typed_events_of, whole_of

from rayllm.api.anthropic.answer import Blocks
from rayllm.api.anthropic.conversion import chat_messages, chat_tool_choice, chat_tools
from rayllm.api.anthropic.messages import count_tokens, open_message
from rayllm.api.service import ModelService
from rayllm.errors import RequestError
from rayllm.parsing.events import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **fields}


def prompt_of(service: ModelService, engine: FakeEngine) -> str:
    return service.model().tokenizer.decode(engine.requests[-1].prompt_token_ids, False)


async def test_an_answer_is_whole(service: ModelService, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 8
    answer = await open_message(message(system="be brief", top_k=3, temperature=0.5, bad_words=["never"]), service)
    whole = await whole_of(answer)

    assert whole.pop("id").startswith("msg_")
    num_prompt = len(engine.requests[0].prompt_token_ids)
    assert whole == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": ANSWER}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt - 8,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 8,
            "output_tokens": len(answer.generation.choices[0].token_ids),
        },
    }
    params = engine.requests[0].params
    assert (params.top_k, params.temperature, len(params.bad_words_token_ids)) == (3, 0.5, 2)
    assert prompt_of(service, engine).count("be brief") == 1


async def test_a_stream_has_anthropics_events_in_their_order(service: ModelService, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 8
    events = await typed_events_of(await open_message(message(stream=True), service))

    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None
    begun, ended = events[0]["message"]["usage"], events[-2]["usage"]
    assert begun["input_tokens"] == ended["input_tokens"] + ended["cache_read_input_tokens"]
    assert (begun["cache_read_input_tokens"], begun["output_tokens"], ended["cache_read_input_tokens"]) == (0, 0, 8)
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == ANSWER
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"stop_sequences": ["zz", "more"]}, "stop_sequence", "more"),
        ({"max_tokens": 3}, "max_tokens", None),
        ({}, "end_turn", None),
    ],
)
async def test_how_it_ended_is_told(service: ModelService, fields: Any, reason: str, sequence: Any) -> None:
    whole = await whole_of(await open_message(message(**fields), service))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)


async def test_more_tokens_than_the_context_has_room_for_end_with_the_context(
    service: ModelService, engine: FakeEngine
) -> None:
    engine.say = lambda request, choice: [98] * 1000
    whole = await whole_of(await open_message(message(max_tokens=10_000), service))

    assert whole["stop_reason"] == "model_context_window_exceeded"
    assert whole["usage"]["input_tokens"] + whole["usage"]["output_tokens"] == MAX_MODEL_LEN


async def test_a_fault_inside_a_stream_is_an_error_event(service: ModelService, engine: FakeEngine) -> None:
    engine.fault_at = 3
    events = await typed_events_of(await open_message(message(stream=True), service))

    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    assert "driver is gone" in events[-1]["error"]["message"]


async def test_the_last_words_of_the_assistant_are_gone_on_with(service: ModelService, engine: FakeEngine) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    await whole_of(await open_message(message(messages=turns), service))

    assert prompt_of(service, engine).endswith("Well")


async def test_tokens_are_counted_as_they_would_be_sent(service: ModelService, engine: FakeEngine) -> None:
    body = message(system="be brief")
    await whole_of(await open_message(body, service))
    del body["max_tokens"]

    assert await count_tokens(body, service) == {"input_tokens": len(engine.requests[0].prompt_token_ids)}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": None}, "max_tokens", ""),
        ({"output_config": {"effort": "huge"}}, "output_config.effort", "output_config.effort: "),
        ({"stop": "x"}, "stop", "stop_sequences"),
        ({"stop_sequence": ["x"]}, "stop_sequence", "did you mean 'stop_sequences'"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages", "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "texts": "x"}]}]}, "messages", "'texts'"),
        ({"system": 5}, "system", ""),
        ({"system": [{"type": "image"}]}, "system", "'image'"),
        ({"stop_sequences": [""]}, "stop_sequences", "stop"),
        ({"temperature": -1}, "temperature", "outside"),
        ({"thinking": {"type": "on"}}, "thinking", "enabled"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools", "web_search_20250305"),
        ({"tools": [{"name": "f", "input_schema": 3}]}, "tools", "input_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice", "auto, any, tool or none"),
        ({"mcp_servers": [{}]}, "mcp_servers", "not supported"),
    ],
)
async def test_what_cannot_be_served_names_its_field(
    service: ModelService, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        await open_message(message(**fields), service)
    assert caught.value.param == param
    assert words in caught.value.message


def test_blocks_become_the_messages_of_a_chat() -> None:
    none = [{"type": "text", "text": "none"}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "weather?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look.", "parsed_output": None},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": none, "is_error": True},
                {"type": "text", "text": "well?"},
            ],
        },
        {"role": "user", "content": "now"},
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Köln"}'}}

    assert chat_messages(turns, "be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "Error: none"},
        {"role": "user", "content": "well?\nnow"},
    ]


def test_tools_and_choices_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    assert chat_tools([{"name": "f", "description": "d", "input_schema": schema, "strict": True}]) == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}
    ]
    assert chat_tool_choice({"type": "any", "disable_parallel_tool_use": True}) == {
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    assert chat_tool_choice({"type": "tool", "name": "f"}) == {
        "tool_choice": {"type": "function", "function": {"name": "f"}}
    }


def test_thoughts_text_and_calls_become_blocks() -> None:
    blocks = Blocks()
    told = [
        event
        for piece in (
            Reasoning("h"),
            Reasoning("m"),
            Text("so"),
            ToolCallBegin(0, "t1", "look"),
            ToolCallArguments(0, '{"a":'),
            ToolCallArguments(0, "1}"),
            ToolCallEnd(0),
            ToolCallBegin(1, "t2", "cut"),
            ToolCallArguments(1, '{"a'),
            ToolCallEnd(1),
        )
        for event in blocks.take(piece)
    ]

    assert blocks.content == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}},
        {"type": "tool_use", "id": "t2", "name": "cut", "input": {"INVALID_JSON": '{"a'}},
    ]
    kinds = [(event["index"], event.get("delta", event)["type"]) for event in told]
    assert kinds == [
        (0, "content_block_start"),
        (0, "thinking_delta"),
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (0, "content_block_stop"),
        (1, "content_block_start"),
        (1, "text_delta"),
        (1, "content_block_stop"),
        (2, "content_block_start"),
        (2, "input_json_delta"),
        (2, "input_json_delta"),
        (2, "content_block_stop"),
        (3, "content_block_start"),
        (3, "input_json_delta"),
        (3, "content_block_stop"),
    ]
