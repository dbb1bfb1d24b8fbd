"""Python programs and HTTP clients get the same prompt for the same chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from rayllm.api.openai.chat import prepare_chat
from rayllm.api.protocol import ChatBody, read_body
from rayllm.api.service import ServedModel
from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import ContextLengthError, RequestError
from rayllm.prompt.conversations import ChatPrompts
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
def config() -> ResolvedConfig:
    """The built-in model's, of a server that lets requests bring templates."""
    return resolve(EngineConfig(trust_request_chat_template=True, device="cpu"))


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
