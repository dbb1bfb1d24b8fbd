"""Contents of messages in the form that a chat template takes, and whether the template shows them.

A template takes a message's content as text, as a list of parts (`{"type": "text", "text": ...}`), or as either.
Which, is found by rendering a probe in both forms, for each role.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayllm.config import ContentFormat
from rayllm.errors import RequestError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]
_Form = Literal["string", "openai", "both"]

_PROBED_ROLES = ("system", "user", "assistant", "tool")
_PROBE, _OTHER = "probe-text-7c3f", "other-text-9a1e"
_DATA = re.compile(rf"type.{{0,40}}text.{{0,40}}text.{{0,40}}{_PROBE}", re.DOTALL)
_PROBE_LIMIT_S = 2.0
"""For all probes of a template together; what is not known by then counts as text."""
_SHORT = 8
"""Characters of a text that may stand in a template by chance."""
_END_MARK, _TAIL = "rayllm-continues-here-51d0c7", "   "


@dataclass(frozen=True)
class ContentForms:
    """Made by `of`."""

    by_role: Mapping[str, _Form]
    default: _Form
    hidden: frozenset[str] = frozenset()
    """Roles whose messages the template takes without an error and does not show."""

    @classmethod
    def of(cls, render: Render, wanted: ContentFormat) -> ContentForms:
        if wanted != "auto":
            return cls({}, wanted)
        return _probed(render)

    def shaped(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with contents as the template takes them. Parts that become text are joined by line ends."""
        return [self._shaped(message) for message in messages]

    def _shaped(self, message: Message) -> Message:
        content = message.get("content")
        form = self.by_role.get(message.get("role", ""), self.default)
        if isinstance(content, str):
            return {**message, "content": [_part(content)]} if form == "openai" else message
        if form == "string" and isinstance(content, list) and all(map(_is_text_part, content)):
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message

    def check_shown(self, messages: Sequence[Message], rendered: str, render: Render) -> None:
        """Raises `RequestError` where `rendered` does not hold what the last user message says (or that of a role which
        the template may not know; or a system message or a tool's result, of a template that is known to hide them).

        Templates may trim, escape or cut a text: one that does not stand in the prompt as it is counts as shown where
        another text in its place changes the prompt.
        """
        roles = {message.get("role", "") for message in messages}
        checked = {"user", *self.hidden, *roles.difference(_PROBED_ROLES)}
        for i in range(len(messages) - 1, -1, -1):
            role = messages[i].get("role")
            if role not in checked:
                continue
            checked.remove(role)
            text = _text_of(messages[i].get("content")).strip()
            stands_there = role not in self.hidden and len(text) >= _SHORT and text in rendered
            if not text or stands_there or _depends_on(messages, i, rendered, render):
                continue
            raise RequestError(
                f"messages[{i}]: the model's chat template does not show the content of this message (role {role!r}), "
                "so that the model would not see it; start the server with another --chat-template or "
                "--chat-template-content-format (string or openai)",
                param="messages",
                code="chat_template_error",
            )


def _depends_on(messages: Sequence[Message], index: int, rendered: str, render: Render) -> bool:
    """Whether the content of that message changes the prompt."""
    content = messages[index]["content"]
    other = [_part(_OTHER)] if isinstance(content, list) else _OTHER
    changed = [*messages[:index], {**messages[index], "content": other}, *messages[index + 1 :]]
    try:
        return render(changed) != rendered
    except RequestError:
        return True


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if _is_text_part(part))
    return content if isinstance(content, str) else ""


# ------------------------------------------------------------------------------------------------------------- probes


class _Probes:
    """Renders conversations for as long as there is time."""

    def __init__(self, render: Render):
        self._render = render
        self._end_s = time.monotonic() + _PROBE_LIMIT_S

    def rendered(self, messages: Sequence[Message]) -> str | None:
        if time.monotonic() > self._end_s:
            return None
        try:
            return self._render(messages).casefold()
        except RequestError:
            return None

    def form(self, conversation: Callable[[Any], Sequence[Message]]) -> tuple[_Form | None, bool]:
        """The form that shows the probe in a conversation that is made with it as one message's content; and whether
        the template takes the message and hides it."""
        text = self.rendered(conversation(_PROBE))
        parts = self.rendered(conversation([_part(_PROBE)]))
        takes_text = text is not None and _PROBE in text
        takes_parts = parts is not None and _PROBE in parts and not _is_written_as_data(parts)
        if takes_text or takes_parts:
            form: _Form = "both" if takes_text and takes_parts else ("string" if takes_text else "openai")
            return form, False
        return None, text is not None and (parts is None or _PROBE not in parts)


def _is_written_as_data(rendered: str) -> bool:
    """Whether the list of parts itself was printed, in Python's form or as JSON, escaped or not."""
    return _DATA.search(rendered) is not None


def _probed(render: Render) -> ContentForms:
    probes = _Probes(render)
    found, is_hidden = probes.form(lambda content: [{"role": "user", "content": content}])
    user: _Form = found or "string"
    said: Any = [_part("hello")] if user == "openai" else "hello"
    asked = {"role": "user", "content": said}
    conversations: dict[str, list[Callable[[Any], Sequence[Message]]]] = {
        "system": [lambda content: [{"role": "system", "content": content}, asked]],
        "assistant": [lambda content: [asked, {"role": "assistant", "content": content}, asked]],
        "tool": [
            lambda content, arguments=arguments: [asked, _call(arguments), _result(content)]  # type: ignore[misc]
            for arguments in ({"a": 1}, json.dumps({"a": 1}))
        ],
    }
    forms: dict[str, _Form] = {"user": user}
    hidden = {"user"} if is_hidden else set()
    for role, made in conversations.items():
        tries = [probes.form(conversation) for conversation in made]
        form = next((form for form, _ in tries if form is not None), None)
        forms[role] = form or user
        if form is None and role != "assistant" and any(hides for _, hides in tries):
            hidden.add(role)
    return ContentForms(forms, user, frozenset(hidden))


_CALL_ID = "a" * 9
"""Of Mistral's length, which its templates insist on."""


def _call(arguments: Any) -> Message:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": _CALL_ID, "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(content: Any) -> Message:
    return {"role": "tool", "tool_call_id": _CALL_ID, "name": "f", "content": content}


# --------------------------------------------------------------------------------------- to continue the last message


def with_end_mark(messages: Sequence[Message]) -> list[Message]:
    """The messages with a mark behind the content of the last, for `cut_at_end_mark`. Raises `RequestError` for a last
    message that holds no text which could go on."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if last.get("tool_calls"):
        raise _cannot_continue("it makes tool calls")
    if isinstance(content, str):
        content += _END_MARK + _TAIL
    elif isinstance(content, list) and content and _is_text_part(content[-1]):
        part = content[-1]
        content = [*content[:-1], {**part, "text": part["text"] + _END_MARK + _TAIL}]
    else:
        raise _cannot_continue("its content is no text")
    return [*messages[:-1], {**last, "content": content}]


def cut_at_end_mark(rendered: str, messages: Sequence[Message]) -> str:
    """The prompt up to the end of the last message's content, where the model goes on. `messages`: without the mark.

    Where the template drops white space at a content's end, the prompt has none either. Raises `RequestError` where the
    template does not show the end of the content.
    """
    start = rendered.rfind(_END_MARK)
    if start < 0:
        raise _cannot_continue("the chat template does not show the end of its content")
    prompt = rendered[:start]
    if rendered.startswith(_END_MARK + _TAIL, start):
        return prompt
    content = messages[-1]["content"]
    text: str = content[-1]["text"] if isinstance(content, list) else content
    bare = text.rstrip()
    return prompt.removesuffix(text[len(bare) :]) if bare else prompt


def _cannot_continue(reason: str) -> RequestError:
    return RequestError(
        f"continue_final_message: the last message cannot be continued, {reason}", param="continue_final_message"
    )
