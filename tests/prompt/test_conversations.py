"""Python programs and HTTP clients get the same request for the same chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from rayllm.api.openai.chat import prepare_chat
from rayllm.api.protocol import ChatBody, read_body
from rayllm.api.service import ServedModel
from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, RequestError
from rayllm.prompt.conversations import ChatPrompts
from rayllm.prompt.requests import program_request
from rayllm.request import Request, SamplingParams, StructuredOutputsParams
from rayllm.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is RayLLM?"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "<|im_end|> RayLLM?"}],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
TOOL_TURNS = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]
BEGUN = [USER, {"role": "assistant", "content": "It is an"}]
THINKING_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ tone }}\n{% endfor %}"

CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    "content parts, with a special token in them": {"messages": [PARTS]},
    "tools": {"messages": [USER], "tools": [WEATHER]},
    "tool calls and their results": {"messages": TOOL_TURNS, "tools": [WEATHER]},
    "no generation prompt": {"messages": [USER], "add_generation_prompt": False},
    "a message that is continued": {"messages": BEGUN, "continue_final_message": True},
    "and says so": {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
    "a template": {"messages": [USER], "chat_template": TEMPLATE, "chat_template_kwargs": {"tone": "kind"}},
    "variables": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "a role of the template's own": {"messages": [{"role": "boss", "content": "work"}], "chat_template": TEMPLATE},
    "documents": {
        "messages": [USER],
        "chat_template": "{{ documents[0].text }}{{ messages[0].content }}",
        "documents": [{"text": "facts"}],
    },
}
BAD: dict[str, dict[str, Any]] = {
    "no message": {"messages": []},
    "a role that the template refuses": {"messages": [{"role": "boss", "content": "work"}]},
    "a misspelt role": {"messages": [{"role": "usr", "content": "work"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "tools that are none": {"messages": [USER], "tools": [{"type": "function"}]},
    "both ends": {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True},
    "a reserved variable": {"messages": [USER], "chat_template_kwargs": {"messages": []}},
    "a broken template": {"messages": [USER], "chat_template": "{% for %}"},
}


@pytest.fixture(scope="module")
def prompts(config: ResolvedConfig) -> ChatPrompts:
    engine = config.engine.model_copy(update={"trust_request_chat_template": False})
    return ChatPrompts(config.model_copy(update={"engine": engine}), Tokenizer.from_config(config))


async def _http_prompt(config: ResolvedConfig, fields: dict[str, Any]) -> tuple[list[int], str]:
    model = ServedModel(config, Tokenizer.from_config(config), engine=cast(Any, None), metrics=cast(Any, None))
    chat = await prepare_chat(read_body({"model": model.name, **fields}, ChatBody), model, "", "chatcmpl-")
    return list(chat.request.prompt_token_ids), chat.prompt_text


def _python_prompt(prompts: ChatPrompts, fields: dict[str, Any]) -> tuple[list[int], str | None]:
    options = dict(fields)
    prepared = prompts.prepare(options.pop("messages"), **options)
    return prepared.prompt.token_ids, prepared.prompt.text


@pytest.mark.parametrize("name", CHATS)
async def test_the_prompt_is_that_of_the_server(config: ResolvedConfig, prompts: ChatPrompts, name: str) -> None:
    assert _python_prompt(prompts, CHATS[name]) == await _http_prompt(config, CHATS[name])


@pytest.mark.parametrize("name", BAD)
async def test_what_the_server_refuses_is_refused_with_the_same_words(
    config: ResolvedConfig, prompts: ChatPrompts, name: str
) -> None:
    with pytest.raises(RequestError) as by_server:
        await _http_prompt(config, BAD[name])
    with pytest.raises(RequestError) as by_program:
        _python_prompt(prompts, BAD[name])
    assert (str(by_program.value), by_program.value.param) == (str(by_server.value), by_server.value.param)


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sampling": (
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2, "repetition_penalty": 1.1},
        {},
    ),
    "penalties and biases": ({}, {"presence_penalty": 0.5, "frequency_penalty": 0.25}, {"logit_bias": {"5": 2.0}}),
    "stops": ({}, {"stop": ["END", "\n\n"], "stop_token_ids": [7], "include_stop_str_in_output": True}, {}),
    "bad words": ({}, {"bad_words": ["rain", " sun"]}, {}),
    "lengths": ({}, {"min_tokens": 2, "ignore_eos": True}, {}),
    "a tool that may be called": ({"tools": [WEATHER]}, {}, {}),
    "a strict tool": ({"tools": [STRICT]}, {}, {}),
    "a tool that must be called": ({"tools": [WEATHER], "tool_choice": "required"}, {}, {}),
    "a named tool, one call": (
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": False,
        },
        {},
        {},
    ),
    "no tool": ({"tools": [WEATHER], "tool_choice": "none"}, {}, {}),
    "a message that is continued": ({"messages": BEGUN, "continue_final_message": True}, {"temperature": 0}, {}),
    "a schema": ({}, {}, {"structured_outputs": {"json": {"type": "object"}}}),
    "a choice and a strict tool": ({"tools": [STRICT]}, {}, {"structured_outputs": {"choice": ["yes", "no"]}}),
    "a choice after reasoning": (
        {"chat_template": THINKING_TEMPLATE},
        {},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ),
    "log-probabilities of the prompt": ({}, {"prompt_logprobs": 3}, {}),
}
BAD_REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no room": ({}, {"max_tokens": 10**6}),
    "more log-probabilities than allowed": ({}, {"prompt_logprobs": 1000}),
    "an unknown tool_choice": ({"tools": [WEATHER], "tool_choice": "maybe"}, {"max_tokens": 8}),
    "a tool that is not there": (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "sun"}}},
        {"max_tokens": 8},
    ),
}


def _python_request(prompts: ChatPrompts, config: ResolvedConfig, options: dict[str, Any], given: Any) -> Request:
    options = {"messages": [USER], **options}
    chat = prompts.prepare(options.pop("messages"), **options)
    params = chat.params(given)
    tokenizer = Tokenizer.from_config(config)
    return program_request("id", chat.prompt.token_ids, params, config, tokenizer, default_seed=0)


async def _http_request(config: ResolvedConfig, fields: dict[str, Any]) -> Request:
    model = ServedModel(config, Tokenizer.from_config(config), engine=cast(Any, None), metrics=cast(Any, None))
    body = read_body({"model": model.name, "messages": [USER], **fields}, ChatBody)
    return (await prepare_chat(body, model, "", "chatcmpl-")).request


def _native(http: dict[str, Any]) -> dict[str, Any]:
    """The fields of HTTP as `SamplingParams` has them."""
    found = dict(http)
    if "logit_bias" in found:
        found["logit_bias"] = {int(name): value for name, value in found["logit_bias"].items()}
    if "structured_outputs" in found:
        found["structured_outputs"] = StructuredOutputsParams(**found["structured_outputs"])
    return found


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_request_is_that_of_the_server(config: ResolvedConfig, prompts: ChatPrompts, name: str) -> None:
    options, fields, http = REQUESTS[name]
    fields = {"max_tokens": 8, **fields}
    by_program = _python_request(prompts, config, options, SamplingParams(**fields, **_native(http)))
    by_server = await _http_request(config, {**options, **fields, **http})
    assert by_program.prompt_token_ids == by_server.prompt_token_ids
    assert by_program.params == by_server.params
    assert by_program.max_tokens == by_server.max_tokens


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_request_that_the_server_refuses_is_refused_with_the_same_words(
    config: ResolvedConfig, prompts: ChatPrompts, name: str
) -> None:
    options, fields = BAD_REQUESTS[name]
    with pytest.raises(RequestError) as by_server:
        await _http_request(config, {**options, **fields})
    with pytest.raises(RequestError) as by_program:
        _python_request(prompts, config, options, SamplingParams(**fields))
    assert str(by_program.value) == str(by_server.value)


def test_what_must_be_called_or_follows_reasoning_binds_the_answer(
    config: ResolvedConfig, prompts: ChatPrompts
) -> None:
    def structured(name: str) -> StructuredOutputsParams | None:
        options, fields, http = REQUESTS[name]
        given = SamplingParams(max_tokens=8, **fields, **_native(http))
        return _python_request(prompts, config, options, given).params.structured_outputs

    assert structured("a tool that may be called") is None
    for name in ("a strict tool", "a tool that must be called", "a choice after reasoning"):
        bound = structured(name)
        assert bound is not None
        assert bound.grammar
    assert structured("a schema") == StructuredOutputsParams(json={"type": "object"})


def test_options_are_in_the_prompt(prompts: ChatPrompts) -> None:
    plain = _python_prompt(prompts, CHATS["plain"])[1] or ""
    assert "weather" in (_python_prompt(prompts, CHATS["tools"])[1] or "")
    assert (_python_prompt(prompts, CHATS["a message that is continued"])[1] or "").endswith("It is an")
    assert plain.startswith(_python_prompt(prompts, CHATS["no generation prompt"])[1] or "x")
    assert _python_prompt(prompts, CHATS["a template"])[1] == "[user] What is RayLLM? kind\n"


def test_a_template_may_be_a_file(prompts: ChatPrompts, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    inline = prompts.prepare([USER], chat_template=TEMPLATE)
    assert prompts.prepare([USER], chat_template=str(file)).prompt == inline.prompt
    with pytest.raises(RequestError, match="is neither a template nor a file that can be read"):
        prompts.prepare([USER], chat_template=str(tmp_path / "nowhere.jinja"))


def test_the_form_of_contents_may_be_given(prompts: ChatPrompts) -> None:
    template = "{{ messages[0].content }} {{ messages[0].content is string }}"
    for content_format, expected in (("string", "True"), ("openai", "False")):
        prepared = prompts.prepare(
            [USER], chat_template=template, chat_template_content_format=cast(Any, content_format)
        )
        assert (prepared.prompt.text or "").endswith(expected)
    with pytest.raises(RequestError, match="chat_template_content_format='xml' is not one of auto, string, openai"):
        prompts.prepare([USER], chat_template_content_format=cast(Any, "xml"))


def test_what_is_no_conversation_is_refused(prompts: ChatPrompts) -> None:
    with pytest.raises(RequestError, match="messages must be a list of messages, got str"):
        prompts.prepare(cast(Any, "hello"))
    with pytest.raises(RequestError, match="messages"):
        prompts.prepare(cast(Any, ["hello"]))
    with pytest.raises(ContextLengthError, match="maximum context length"):
        prompts.prepare([{"role": "user", "content": "x" * 10**6}])
