"""What is found out of a chat template, and how messages and tools reach it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayllm.config import EngineConfig
from rayllm.parsing.chat_format import ChatFormat
from rayllm.parsing.tool_grammar import Thinking
from rayllm.parsing.tools import Tool
from rayllm.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
WANTS_OBJECTS = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
)
WANTS_TEXT = WANTS_OBJECTS.replace(
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "{{ '' + c.function.arguments }}"
)
WANTS_NO_NULL = WANTS_OBJECTS.replace("{{ m.content or '' }}", "{{ m.content }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
TOOL = Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}}, "Of a city")
CALL = {"id": "call_1", "name": "weather", "arguments": '{"city": "Ulm"}'}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": "rainy"},
]


def form_of(tokenizer: Tokenizer, template: str, **settings: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer.with_template(template), EngineConfig(**settings))


def shown(form: ChatFormat, messages: list[dict[str, Any]], tools: list[Tool]) -> str:
    found, tools_shown = form.template_messages(messages, tools)
    return form.tokenizer.render_chat(found, tools=tools_shown)


@pytest.mark.parametrize(
    ("template", "takes_tools", "as_text", "no_content"),
    [(PLAIN, False, False, ""), (WANTS_OBJECTS, True, False, None), (WANTS_TEXT, True, True, None)],
)
def test_how_a_template_wants_calls_is_found_by_trying(
    tokenizer: Tokenizer, template: str, takes_tools: bool, as_text: bool, no_content: str | None
) -> None:
    form = form_of(tokenizer, template)
    assert (form.takes_tools, form.arguments_as_text, form.no_content) == (takes_tools, as_text, no_content)
    assert form.takes_system


def test_a_template_that_shows_none_gets_an_empty_content(tokenizer: Tokenizer) -> None:
    assert form_of(tokenizer, WANTS_NO_NULL).no_content == ""


def test_a_template_that_raises_at_a_system_prompt_takes_none(tokenizer: Tokenizer) -> None:
    form = form_of(tokenizer, NO_SYSTEM)
    assert not form.takes_system
    messages, _ = form.template_messages(CHAT[:1], [TOOL])
    assert [message["role"] for message in messages] == ["user"]
    assert messages[0]["content"].startswith("hi\n\n")
    assert "<tools>" in messages[0]["content"]


def test_the_operators_choice_of_parsers_holds_more_than_the_template(tokenizer: Tokenizer) -> None:
    form = form_of(tokenizer, WANTS_OBJECTS, tool_call_parser="mistral", reasoning_parser="qwen3")
    assert form.tool_format.name == "mistral"
    assert form.reasoning_format is not None
    assert form.reasoning_format.name == "qwen3"
    found = form_of(tokenizer, WANTS_OBJECTS)
    assert (found.tool_format.name, found.reasoning_format) == ("hermes", None)


def test_a_template_without_tools_gets_calls_and_their_results_in_words(tokenizer: Tokenizer) -> None:
    messages, tools = form_of(tokenizer, PLAIN).template_messages(CHAT, [TOOL])
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    text = shown(form_of(tokenizer, PLAIN), CHAT, [TOOL])
    assert json.dumps(TOOL.parameters) in text
    assert text.count('<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>') == 2
    assert text.endswith("sunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>")


def test_a_template_with_tools_gets_arguments_as_it_wants_them(tokenizer: Tokenizer) -> None:
    assert "<tool_call>weather:city=Ulm" in shown(form_of(tokenizer, WANTS_OBJECTS), CHAT, [TOOL])
    assert '<tool_call>weather:{"city": "Ulm"}' in shown(form_of(tokenizer, WANTS_TEXT), CHAT, [TOOL])


def test_ids_of_calls_have_the_length_that_the_format_insists_on(tokenizer: Tokenizer) -> None:
    form = form_of(tokenizer, WANTS_OBJECTS, tool_call_parser="mistral")
    messages, _ = form.template_messages(CHAT, [TOOL])
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert [len(call_id) for call_id in ids] == [9, 9]
    assert [message["tool_call_id"] for message in messages[2:]] == ids
    assert form.call_id("seed") == form.call_id("seed") != form.call_id("other")
    assert len(form.call_id("seed")) == 9
    assert form_of(tokenizer, WANTS_OBJECTS).call_id("seed").startswith("call_")


def test_ids_of_calls_are_numbered_where_the_model_writes_them_so(tokenizer: Tokenizer) -> None:
    messages, _ = form_of(tokenizer, WANTS_OBJECTS, tool_call_parser="kimi_k2").template_messages(CHAT, [TOOL])
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert ids == ["functions.weather:0", "functions.weather:1"]
    assert [message["tool_call_id"] for message in messages[2:]] == ids


@pytest.mark.parametrize(
    ("parser", "prompt", "thinking"),
    [
        ("none", "<think>", Thinking.NONE),
        ("qwen3", "assistant\n<think>\n", Thinking.OPEN),
        ("qwen3", "<think>\n\n</think>\n\n", Thinking.NONE),
        ("qwen3", "assistant\n", Thinking.POSSIBLE),
        ("openai_gptoss", "<|start|>assistant", Thinking.POSSIBLE),
        ("openai_gptoss", "<|start|>assistant<|channel|>final<|message|>So", Thinking.NONE),
    ],
)
def test_the_end_of_a_prompt_says_what_is_left_to_think(
    tokenizer: Tokenizer, parser: str, prompt: str, thinking: Thinking
) -> None:
    assert form_of(tokenizer, PLAIN, reasoning_parser=parser).thinking_after(prompt) is thinking


def test_only_variables_that_the_template_knows_ask_for_reasoning(tokenizer: Tokenizer) -> None:
    form = form_of(tokenizer, PLAIN + "{{ enable_thinking }}{{ reasoning_effort }}")
    assert form.thinking_variables("none", "low") == {"enable_thinking": False, "reasoning_effort": "none"}
    assert form.thinking_variables("high", None) == {"enable_thinking": True, "reasoning_effort": "high"}
    assert form_of(tokenizer, PLAIN).thinking_variables("high", "low") == {}


def test_a_template_that_reads_tools_from_its_messages_gets_them_in_words(tokenizer: Tokenizer) -> None:
    source = (
        "{% for item in messages %}{% if item['tools'] is defined %}{% set tools = item['tools'] %}{{ tools }}"
        "{% endif %}{{ item['role'] }}: {{ item['content'] }}\n{% endfor %}"
    )
    form = ChatFormat.of(tokenizer.with_template(source), EngineConfig())
    assert not form.takes_tools
