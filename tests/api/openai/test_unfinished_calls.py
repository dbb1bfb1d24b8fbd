"""What began as a tool call and has no JSON for arguments is content, with `stop` or `length`, on every route."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from api.fake_engine import EOS_ID, FakeEngine, config
from api.openai.test_chat_tools import joined
from api.streams import chunks_of, typed_events_of, whole_of
from parsing.test_output_parser import TOOLS, parse

from rayllm.api.anthropic.messages import open_message
from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.response_store import ResponseStore
from rayllm.api.openai.responses import open_response
from rayllm.api.service import ModelService
from rayllm.parsing.events import Text, ToolCallBegin, ToolCallEnd
from rayllm.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
FUNCTIONS = [{"type": "function", "function": {"name": name, "parameters": TOOLS[name]}} for name in ("weather", "now")]
WHOLE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
UNFINISHED = [
    '<tool_call>\n{"name": "weather"',
    '<tool_call>\n{"name": "weather", "arguments": ',
    '<tool_call>\n{"name": "weather", "arguments": {',
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ul',
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"',
    '<tool_call>\n{"name": "weather", "arguments": {"city": Ulm}}\n</tool_call>',
    '<tool_call>\n{"name": "weather", "arguments": {\'city\': \'Ulm\'}}\n</tool_call>',
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm\n"}}',
    '<tool_call>\n{"name": "weather", "arguments": {"days": NaN}}\n</tool_call>',
]
Serve = Callable[..., ModelService]


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Serve:
    def service(text: str) -> ModelService:
        made = ModelService()
        engine = FakeEngine(lambda request, choice: [*tokenizer.encode(text), EOS_ID])
        made.set_ready(config(max_model_len=2048), tokenizer, engine)
        return made

    return service


@pytest.mark.parametrize("text", UNFINISHED)
@pytest.mark.parametrize("before", ["", "I look. "])
async def test_a_call_that_is_none_is_content(serve: Serve, text: str, before: str) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "tools": FUNCTIONS}
    answer = await whole_of(await open_chat(fields, serve(before + text)))

    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].rstrip() == (before + text).removesuffix("\n</tool_call>").rstrip()

    told = joined(await chunks_of(await open_chat({**fields, "stream": True}, serve(before + text))))
    assert told["finish_reason"] == "stop"
    assert [call["function"]["name"] for call in told["tool_calls"]] == ["weather"]  # was told before it was known


@pytest.mark.parametrize("num_tokens", range(1, 60, 4))
async def test_a_call_that_the_limit_cuts_says_length(serve: Serve, num_tokens: int) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "tools": FUNCTIONS, "max_tokens": num_tokens}
    [choice] = (await whole_of(await open_chat(fields, serve(WHOLE))))["choices"]
    for call in choice["message"].get("tool_calls", ()):
        assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
    if choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]:
        assert WHOLE.startswith(choice["message"]["content"])
    else:
        assert choice["message"]["tool_calls"]
    told = joined(await chunks_of(await open_chat({**fields, "stream": True}, serve(WHOLE))))
    assert told["finish_reason"] == choice["finish_reason"]


async def test_a_whole_call_before_an_unfinished_one_is_kept(serve: Serve) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "tools": FUNCTIONS}
    text = f"{WHOLE}\n{UNFINISHED[3]}"

    [choice] = (await whole_of(await open_chat(fields, serve(text))))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"city": "Ulm"}']
    assert choice["message"]["content"] == UNFINISHED[3]

    told = joined(await chunks_of(await open_chat({**fields, "stream": True}, serve(text))))
    assert told["finish_reason"] == "stop"  # not all calls that were told of can be made


@pytest.mark.parametrize("text", UNFINISHED)
async def test_anthropics_message_has_it_as_text(serve: Serve, text: str) -> None:
    tools = [{"name": "weather", "input_schema": TOOLS["weather"]}]
    fields = {"model": "tiny", "messages": MESSAGES, "tools": tools, "max_tokens": 500}

    answer = await whole_of(await open_message(fields, serve(text)))
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert answer["content"][0]["text"].startswith('<tool_call>\n{"name": "weather"')
    assert answer["stop_reason"] == "end_turn"

    events = await typed_events_of(await open_message({**fields, "stream": True}, serve(text)))
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


@pytest.mark.parametrize("text", UNFINISHED)
async def test_a_response_has_it_as_a_message_and_a_stream_as_incomplete(serve: Serve, text: str) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": TOOLS["weather"]}]
    fields = {"model": "tiny", "input": "hi", "tools": tools}

    answer = await whole_of((await open_response(fields, serve(text), ResponseStore())).answer)
    [item] = answer["output"]
    assert (item["type"], item["status"]) == ("message", "completed")
    assert item["content"][0]["text"].startswith('<tool_call>\n{"name": "weather"')

    opened = await open_response({**fields, "stream": True}, serve(text), ResponseStore())
    events = await typed_events_of(opened.answer)
    [done] = [event for event in events if event["type"] == "response.output_item.done"]
    assert (done["item"]["type"], done["item"]["status"]) == ("function_call", "incomplete")
    assert events[-1]["response"]["output"] == [done["item"]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Ul'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ul'),
        ("mistral_v11", '[TOOL_CALLS]weather[ARGS]{"city": "Ul'),
        ("glm4", 'weather\n{"city": "Ul'),
        ("glm45", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ul"),
        ("pythonic", "[weather(city='Ul"),
        ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ul'),
        (
            "kimi_k2",
            '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"a',
        ),
        ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nUl"),
        ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Ul'),
    ],
)
def test_every_notation_gives_back_what_was_written(name: str, text: str) -> None:
    events = parse(name, f"So: {text}") if name not in ("llama3_json", "glm4", "pythonic") else parse(name, text)

    begun = [event for event in events if isinstance(event, ToolCallBegin)]
    [end] = [event for event in events if isinstance(event, ToolCallEnd)]
    assert [event.name for event in begun] == ["weather"]
    assert end.unread is not None
    assert text.endswith(end.unread.strip())  # but for the mark of a section of calls
    assert "weather" in end.unread
    assert [event.text for event in events if isinstance(event, Text)] in ([], ["So:"])
