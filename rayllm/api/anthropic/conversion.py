"""Anthropic's messages, blocks and tools as OpenAI's, which the chat templates are fed from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayllm.api.protocol import check_names
from rayllm.errors import RequestError, shorten

_Message = dict[str, Any]


def chat_messages(messages: Sequence[Mapping[str, Any]], system: str | Sequence[Any] | None) -> list[_Message]:
    """The system prompt and the messages. Neighbours of one role become one message, as Anthropic has it."""
    if not messages:
        raise RequestError("messages is empty: give at least one", param="messages")
    found: list[_Message] = []
    if system:
        found.append({"role": "system", "content": _text(system, "system", "system")})
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        check_names(where, message, ("role", "content"), "messages")
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{where}.role must be user, assistant or system, got {shorten(role)}", param="messages")
        for read in _READERS[role](message.get("content"), f"{where}.content"):
            _add(found, read)
    return found


def _add(found: list[_Message], message: _Message) -> None:
    if found and found[-1]["role"] == message["role"] and message["role"] != "tool":
        merge_message(found[-1], message)
    else:
        found.append(message)


def merge_message(last: _Message, message: _Message) -> None:
    """Adds what a message says to the one before it."""
    texts = [text for text in (last.get("content"), message.get("content")) if text]
    last["content"] = "\n".join(texts)
    for name in ("tool_calls", "reasoning_content"):
        if message.get(name):
            last[name] = last[name] + message[name] if last.get(name) else message[name]


def _user_messages(content: Any, where: str) -> list[_Message]:
    """What the user says, and each result of a tool, in their order."""
    found: list[_Message] = []
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "text":
            _add(found, {"role": "user", "content": _block_text(block, place)})
        elif kind == "tool_result":
            found.append(_tool_message(block, place))
        else:
            raise _unreadable(kind, place, "text or tool_result")
    return found


_RESULT_FIELDS = ("type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name")


def _tool_message(block: Mapping[str, Any], where: str) -> _Message:
    check_names(where, block, _RESULT_FIELDS, "messages")
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str) or not call_id:
        raise RequestError(f"{where}.tool_use_id must be text, got {shorten(call_id)}", param="messages")
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content", "messages")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _assistant_messages(content: Any, where: str) -> list[_Message]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "text":
            texts.append(_block_text(block, place))
        elif kind == "thinking":
            thoughts.append(_field(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_call(block, place))
        elif kind != "redacted_thinking":  # which nobody here can read
            raise _unreadable(kind, place, "text, thinking or tool_use")
    message: _Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.input must be an object, got {shorten(arguments)}", param="messages")
    function = {"name": _field(block, "name", where), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _field(block, "id", where), "type": "function", "function": function}


def _system_messages(content: Any, where: str) -> list[_Message]:
    return [{"role": "system", "content": _text(content, where, "messages")}]


_READERS: dict[Any, Callable[[Any, str], list[_Message]]] = {
    "user": _user_messages,
    "assistant": _assistant_messages,
    "system": _system_messages,
}


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools of the client's own. Those that Anthropic runs itself are refused."""
    return [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _chat_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"{where}.type {shorten(tool['type'])} is not supported: only tools with a name and an input_schema are",
            param="tools",
        )
    check_names(where, tool, _TOOL_FIELDS, "tools")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    if not isinstance(function["parameters"], dict):
        raise RequestError(
            f"{where}.input_schema must be a JSON schema, got {shorten(function['parameters'])}", param="tools"
        )
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


_TOOL_FIELDS = (
    "name",
    "description",
    "input_schema",
    "type",
    "strict",
    "cache_control",
    "input_examples",
    "eager_input_streaming",
    "defer_loading",
    "allowed_callers",
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat that ask for the same."""
    check_names("tool_choice", choice, ("type", "name", "disable_parallel_tool_use"), "tool_choice")
    kind, name = choice.get("type"), choice.get("name")
    found: dict[str, Any] = {}
    if kind == "tool":
        if not isinstance(name, str) or not name:
            raise RequestError(f"tool_choice.name must be text, got {shorten(name)}", param="tool_choice")
        found["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in _CHOICES:
        found["tool_choice"] = _CHOICES[kind]
    else:
        raise RequestError(
            f"tool_choice.type must be auto, any, tool or none, got {shorten(kind)}", param="tool_choice"
        )
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _blocks(content: Any, where: str) -> list[tuple[Mapping[str, Any], str]]:
    """The blocks of a content, each with its place. Plain text is one block."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where} must be text or a list of blocks, got {shorten(content)}", param="messages")
    found: list[tuple[Mapping[str, Any], str]] = []
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise RequestError(f"{where}[{i}] must be a block, got {shorten(block)}", param="messages")
        found.append((block, f"{where}[{i}]"))
    return found


def _text(content: Any, where: str, param: str) -> str:
    """Text, or text blocks joined by line ends."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text blocks, got {shorten(content)}", param=param)
    texts = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else block
        if kind != "text":
            raise _unreadable(kind, f"{where}[{i}]", "text", param)
        texts.append(_block_text(block, f"{where}[{i}]", param))
    return "\n".join(texts)


def _block_text(block: Mapping[str, Any], where: str, param: str = "messages") -> str:
    check_names(where, block, ("type", "text", "cache_control", "citations"), param)
    return _field(block, "text", where, param)


def _field(block: Mapping[str, Any], name: str, where: str, param: str = "messages") -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be text, got {shorten(value)}", param=param)
    return value


def _unreadable(kind: Any, where: str, known: str, param: str = "messages") -> RequestError:
    return RequestError(f"{where}: this model reads blocks of type {known}, got {shorten(kind)}", param=param)
