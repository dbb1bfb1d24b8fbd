"""A request's messages, checked, in the one shape that all rendering begins from: known roles, plain text, calls whose
arguments are JSON text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayllm.api.errors import shorten
from rayllm.errors import RequestError, did_you_mean

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""A role and the name that templates know it by."""
_FIELDS = ("role", "content", "name")
_ROLE_FIELDS = {
    "assistant": ("tool_calls", "reasoning_content", "reasoning"),
    "tool": ("tool_call_id",),
}
_EMPTY_FIELDS = ("refusal", "audio", "function_call", "annotations")
"""Fields of an earlier answer that clients send back; they must hold nothing, but for `refusal`."""
MAX_MESSAGES = 4096
MAX_CALLS = 256
"""In one message."""


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates want them. `tool_calls` are `{"id", "name", "arguments"}`, the last as JSON text;
    what an assistant thought is `reasoning_content`; a content that came as several parts stands in `content_parts` as
    well, a list of texts. Raises `RequestError`."""
    if not messages:
        raise RequestError("messages is empty: give at least one", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages holds {len(messages)} messages, at most {MAX_MESSAGES} are allowed", param="messages"
        )
    return [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _read_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        mend = "; functions are tools now, role 'tool'" if role == "function" else ""
        raise RequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {shorten(role)}{mend}", param="messages"
        )
    _check_fields(where, role, message)
    read: dict[str, Any] = {"role": _ROLES[role]}
    if role == "assistant":
        _read_assistant(where, message, read)
    else:
        _read_content(f"{where}.content", message.get("content"), read)
    if role == "tool":
        read["tool_call_id"] = _text(f"{where}.tool_call_id", message.get("tool_call_id"), "")
    if message.get("name") is not None:
        read["name"] = _text(f"{where}.name", message["name"])
    return read


def _check_fields(where: str, role: str, message: Mapping[str, Any]) -> None:
    own = _ROLE_FIELDS.get(role, ())
    known = (*_FIELDS, *own, *_EMPTY_FIELDS)
    for name, value in message.items():
        if name in _FIELDS or name in own or (name == "refusal" and role == "assistant"):
            continue
        if name in _EMPTY_FIELDS or any(name in fields for fields in _ROLE_FIELDS.values()):
            if value:
                raise RequestError(f"{where}.{name} is not supported with role {role!r}", param="messages")
            continue
        shown = str(name)[:100]
        raise RequestError(f"{where}: unknown field {shown!r}{did_you_mean(shown, known)}", param="messages")


def _read_assistant(where: str, message: Mapping[str, Any], read: dict[str, Any]) -> None:
    calls = _read_calls(f"{where}.tool_calls", message.get("tool_calls"))
    content, refusal = message.get("content"), message.get("refusal")
    if content is None and refusal is not None:
        content = _text(f"{where}.refusal", refusal)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if content is None and not calls and not reasoning:
        raise RequestError(f"{where}.content must be text where there are no tool_calls, got None", param="messages")
    _read_content(f"{where}.content", "" if content is None else content, read, may_be_empty=bool(calls))
    if reasoning:
        read["reasoning_content"] = _text(f"{where}.reasoning_content", reasoning)
    if calls:
        read["tool_calls"] = calls


def _read_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise RequestError(
            f"{where} must be a list of at most {MAX_CALLS} calls, got {shorten(calls)}", param="messages"
        )
    return [_read_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _read_call(where: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise RequestError(f"{where} must be a call of type 'function', got {shorten(call)}", param="messages")
    function = call.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object, got {shorten(function)}", param="messages")
    return {
        "id": _text(f"{where}.id", call.get("id"), ""),
        "name": _text(f"{where}.function.name", function.get("name")),
        "arguments": _text(f"{where}.function.arguments", function.get("arguments"), "") or "{}",
    }


def _text(where: str, value: Any, default: str | None = None) -> str:
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RequestError(f"{where} must be text, got {shorten(value)}", param="messages")
    return value


def _read_content(where: str, content: Any, read: dict[str, Any], may_be_empty: bool = False) -> None:
    """Text as it is; text parts joined by line ends, and as they are."""
    if isinstance(content, str):
        read["content"] = content
        return
    if not isinstance(content, list) or not (content or may_be_empty):
        raise RequestError(f"{where} must be text or a list of text parts, got {shorten(content)}", param="messages")
    parts = [_read_part(f"{where}[{i}]", part) for i, part in enumerate(content)]
    read["content"] = "\n".join(parts)
    if len(parts) > 1:
        read["content_parts"] = parts


def _read_part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        got = shorten(part if kind is None else kind)
        raise RequestError(f"{where}: this model reads parts of type 'text' only, got {got}", param="messages")
    return _text(f"{where}.{kind}", part.get(kind))
