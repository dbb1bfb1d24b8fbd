"""The items of `/v1/responses` as the messages, tools and choices of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayllm.api.anthropic.conversion import merge_message
from rayllm.api.protocol import check_names
from rayllm.errors import RequestError, shorten

Item = dict[str, Any]
_TEXT_PARTS = ("input_text", "output_text", "text")
_ROLES = ("user", "assistant", "system", "developer")
_ID_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}
_COMMON = ("type", "id", "status")


def read_input(given: str | Sequence[Any]) -> list[Item]:
    """The input as items that all have a type and an id, and content in parts, as they are given back."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise RequestError("input is empty: give text or at least one item", param="input")
    return [_read_item(item, f"input[{i}]") for i, item in enumerate(given)]


def _read_item(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be an item, got {shorten(item)}", param="input")
    kind = item.get("type") or ("message" if "role" in item else None)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None or kind is None:
        raise RequestError(
            f"{where}.type must be {', '.join(_READERS)} or item_reference, got {shorten(kind)}", param="input"
        )
    read = reader(item, where)
    given_id = item.get("id")
    if given_id is not None and not isinstance(given_id, str):
        raise RequestError(f"{where}.id must be text, got {shorten(given_id)}", param="input")
    return {"id": given_id or f"{_ID_PREFIXES[kind]}{secrets.token_hex(16)}", "type": kind, **read}


def _read_message(item: Mapping[str, Any], where: str) -> Item:
    check_names(where, item, (*_COMMON, "role", "content", "phase"), "input")
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise RequestError(f"{where}.role must be {', '.join(_ROLES)}, got {shorten(role)}", param="input")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content must be text or a list of parts, got {shorten(content)}", param="input")
    parts = []
    for i, part in enumerate(content):
        found = part.get("type") if isinstance(part, dict) else part
        if found == "refusal":
            text = part.get("refusal")
        elif found in _TEXT_PARTS:
            text = part.get("text")
        else:
            raise RequestError(
                f"{where}.content[{i}]: this model reads parts of text only, got {shorten(found)}", param="input"
            )
        if not isinstance(text, str):
            raise RequestError(f"{where}.content[{i}].text must be text, got {shorten(text)}", param="input")
        parts.append({"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})})
    return {"role": role, "status": "completed", "content": parts}


def _read_call(item: Mapping[str, Any], where: str) -> Item:
    check_names(where, item, (*_COMMON, "call_id", "name", "arguments", "namespace", "caller"), "input")
    return {"status": "completed", **_texts(item, where, ("call_id", "name", "arguments"))}


def _read_call_output(item: Mapping[str, Any], where: str) -> Item:
    check_names(where, item, (*_COMMON, "call_id", "output", "caller"), "input")
    output = item.get("output")
    if isinstance(output, list):
        output = "\n".join(_part_text(part, f"{where}.output[{i}]") for i, part in enumerate(output))
    return {"status": "completed", **_texts({**item, "output": output}, where, ("call_id", "output"))}


def _read_reasoning(item: Mapping[str, Any], where: str) -> Item:
    check_names(where, item, (*_COMMON, "summary", "content", "encrypted_content"), "input")
    read: Item = {"summary": [], "content": []}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = item.get(name) or []
        if not isinstance(parts, list):
            raise RequestError(f"{where}.{name} must be a list of parts, got {shorten(parts)}", param="input")
        texts = [_part_text(part, f"{where}.{name}[{i}]") for i, part in enumerate(parts)]
        read[name] = [{"type": kind, "text": text} for text in texts]
    return read


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind not in (*_TEXT_PARTS, "summary_text", "reasoning_text") or not isinstance(part.get("text"), str):
        raise RequestError(f"{where} must be a part of text, got {shorten(kind)}", param="input")
    return str(part["text"])


def _texts(item: Mapping[str, Any], where: str, names: Sequence[str]) -> Item:
    for name in names:
        if not isinstance(item.get(name), str):
            raise RequestError(f"{where}.{name} must be text, got {shorten(item.get(name))}", param="input")
    return {name: item[name] for name in names}


_READERS: dict[str, Callable[[Mapping[str, Any], str], Item]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_call_output,
    "reasoning": _read_reasoning,
}


def chat_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """What a chat's template is fed. Reasoning, text and calls of one turn of the assistant are one message."""
    found: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        message = _chat_message(item)
        if found and found[-1]["role"] == message["role"] == "assistant":
            merge_message(found[-1], message)
        else:
            found.append(message)
    return found


def _chat_message(item: Item) -> dict[str, Any]:
    kind = item["type"]
    if kind == "message":
        return {"role": item["role"], "content": "\n".join(part["text"] for part in item["content"])}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or ()
        return {
            "role": "assistant",
            "content": "",
            "reasoning_content": "\n".join(part["text"] for part in parts),
        }
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Function tools as they are given back. Those that OpenAI runs itself are refused."""
    found = []
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if kind != "function":
            raise RequestError(
                f"tools[{i}].type {shorten(kind)} is not supported: this server runs no tools itself, only 'function' "
                "tools, which the client runs",
                param="tools",
                code="unsupported_parameter",
            )
        check_names(f"tools[{i}]", tool, ("type", "name", "description", "parameters", "strict"), "tools")
        names = ("name", "description", "parameters", "strict")
        found.append({"type": "function", **{name: tool.get(name) for name in names}})
    return found


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, as a chat's."""
    return [
        {
            "type": "function",
            "function": {name: value for name, value in tool.items() if name != "type" and value is not None},
        }
        for tool in tools
    ]


def chat_tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A choice as a chat says it, which checks what it holds."""
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function":
        return _named_function(choice, "tool_choice")
    if choice.get("type") == "allowed_tools":
        check_names("tool_choice", choice, ("type", "mode", "tools"), "tool_choice")
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RequestError(f"tool_choice.tools must be a list of tools, got {shorten(tools)}", param="tool_choice")
        allowed = [_named_function(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": allowed}}
    raise RequestError(
        f"tool_choice.type must be function or allowed_tools, got {shorten(choice.get('type'))}", param="tool_choice"
    )


def _named_function(choice: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_names(where, choice, ("type", "name"), "tool_choice")
    name = choice.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name must be text, got {shorten(name)}", param="tool_choice")
    return {"type": "function", "function": {"name": name}}
