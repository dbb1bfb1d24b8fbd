"""A request's messages, checked, in the one shape that all rendering begins from: plain text, calls whose arguments are
JSON text, and whatever else a chat template may know how to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayllm.errors import RequestError, did_you_mean, shorten

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's roles and the names that templates know them by. Others are for templates that know more."""
MAX_ROLE_CHARACTERS = 64
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
    what an assistant thought is `reasoning_content`; a content that came as several parts, or as one with fields of its
    own, stands in `content_parts` as well. Roles and fields that OpenAI does not know are kept for the template, unless
    they are misspelt known ones. Raises `RequestError`."""
    if not messages:
        raise RequestError("messages is empty: give at least one", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages holds {len(messages)} messages, at most {MAX_MESSAGES} are allowed", param="messages"
        )
    return [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _read_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = _read_role(f"{where}.role", message.get("role"))
    read: dict[str, Any] = {"role": role, **_further_fields(where, role, message)}
    if role == "assistant":
        _read_assistant(where, message, read)
    else:
        _read_content(f"{where}.content", message.get("content"), read)
    if role == "tool":
        read["tool_call_id"] = _text(f"{where}.tool_call_id", message.get("tool_call_id"), "")
    if message.get("name") is not None:
        read["name"] = _text(f"{where}.name", message["name"])
    return read


def _read_role(where: str, role: Any) -> str:
    """The role as templates know it."""
    if isinstance(role, str) and role in _ROLES:
        return _ROLES[role]
    known = ", ".join(_ROLES)
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE_CHARACTERS or not role.isprintable():
        raise RequestError(
            f"{where} must be one of {known}, or 1 to {MAX_ROLE_CHARACTERS} printable characters of a role that the "
            f"chat template knows, got {shorten(role)}",
            param="messages",
        )
    hint = "; functions are tools now, role 'tool'" if role == "function" else did_you_mean(role, _ROLES)
    if hint:
        raise RequestError(f"{where} must be one of {known}, got {shorten(role)}{hint}", param="messages")
    return role


def _further_fields(where: str, role: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only a template may know. Raises `RequestError` for a known field with another role, and for a
    misspelt one."""
    own = _ROLE_FIELDS.get(role, ())
    known = (*_FIELDS, *own, *_EMPTY_FIELDS)
    found: dict[str, Any] = {}
    for name, value in message.items():
        if name in _FIELDS or name in own or (name == "refusal" and role == "assistant"):
            continue
        if name in _EMPTY_FIELDS or any(name in fields for fields in _ROLE_FIELDS.values()):
            if value:
                raise RequestError(f"{where}.{name} is not supported with role {role!r}", param="messages")
        elif name == "content_parts":
            raise RequestError(f"{where}.{name} is not supported: content may be a list of parts", param="messages")
        else:
            shown = str(name)[:100]
            if hint := did_you_mean(shown, known):
                raise RequestError(f"{where}: unknown field {shown!r}{hint}", param="messages")
            found[name] = value
    return found


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
    read["content"] = "\n".join(part["text"] for part in parts)
    if len(parts) > 1 or any(len(part) > len(_PART_FIELDS) for part in parts):
        read["content_parts"] = parts


_PART_FIELDS = ("type", "text")


def _read_part(where: str, part: Any) -> dict[str, Any]:
    """A part of type `text`, with the fields of its own that the client gave it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        got = shorten(part if kind is None else kind)
        raise RequestError(f"{where}: this model reads parts of type 'text' only, got {got}", param="messages")
    own = {name: value for name, value in part.items() if name not in ("type", kind)}
    return {**own, "type": "text", "text": _text(f"{where}.{kind}", part.get(kind))}
