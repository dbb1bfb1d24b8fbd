"""How one model's chats are written: what its template takes, and how it marks calls and reasoning.

All of it is found out from the template and the tokenizer, once; `--tool-call-parser` and `--reasoning-parser` decide
where that fails. A template that knows nothing of tools gets them in words: a system prompt describes them and
how calls are written, and earlier calls and their results are shown in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.parsing.reasoning import REASONING_FORMATS, ReasoningFormat, detect_reasoning
from rayllm.parsing.tool_formats import HERMES, TOOL_FORMATS, ToolFormat, detect_tool_format
from rayllm.parsing.tool_grammar import GrammarWriter, Thinking
from rayllm.parsing.tools import Tool
from rayllm.text.tokenizer import Tokenizer

_Message = dict[str, Any]
_PROBE_KEY, _PROBE_VALUE, _PROBE_NAME = "probe_key", "probe_value", "probe_name"
_THINKING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class ChatFormat:
    """Made by `of`."""

    tokenizer: Tokenizer
    tool_format: ToolFormat
    reasoning_format: ReasoningFormat | None
    takes_tools: bool
    """Whether the template shows tools and calls by itself."""
    takes_system: bool
    arguments_as_text: bool
    """Whether the template wants a call's arguments as JSON text, not as an object."""
    no_content: str | None
    """What the template wants as the content of a message that only calls."""
    shown_ids: frozenset[int]
    """Special tokens that calls and reasoning are marked by."""
    writer: GrammarWriter

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: EngineConfig) -> ChatFormat:
        template = tokenizer.chat_template
        source = template.source if template is not None else ""
        takes_tools = tokenizer.shows_tools()
        if config.tool_call_parser != "auto":
            tool_format = TOOL_FORMATS[config.tool_call_parser]
        else:
            tool_format = detect_tool_format(source) if takes_tools or "tool_calls" in source else HERMES
        if config.reasoning_parser == "auto":
            reasoning_format = detect_reasoning(source)
        else:
            reasoning_format = REASONING_FORMATS.get(config.reasoning_parser)
        as_text, no_content = _probe(tokenizer, tool_format) if takes_tools else (False, "")
        marks = "\0".join([*tool_format.markers, *(reasoning_format.markers if reasoning_format else ())])
        ids = {text: i for text, i in tokenizer.added_tokens.items() if text and text in marks}
        atoms = {text: i for text, i in ids.items() if _is_atom(tokenizer, text, i)}
        return cls(
            tokenizer,
            tool_format,
            reasoning_format,
            takes_tools,
            _renders(tokenizer, [{"role": "system", "content": "probe"}, {"role": "user", "content": "hello"}]),
            as_text,
            no_content,
            frozenset(ids.values()) & tokenizer.special_token_ids,
            GrammarWriter(atoms),
        )

    def thinking_variables(self, effort: str | None, verbosity: str | None) -> dict[str, Any]:
        """The template's variables that ask for so much reasoning and so many words; none for a template that knows
        of none."""
        template = self.tokenizer.chat_template
        known = template.variables if template is not None else frozenset[str]()
        found: dict[str, Any] = {}
        if effort is not None:
            found = dict.fromkeys(_THINKING_SWITCHES, effort != "none") | {"reasoning_effort": effort}
        if verbosity is not None:
            found["verbosity"] = verbosity
        return {name: value for name, value in found.items() if name in known}

    def thinking_after(self, prompt: str) -> Thinking:
        """What the prompt leaves to think."""
        form = self.reasoning_format
        if form is None:
            return Thinking.NONE
        end = prompt.rstrip()
        if form.turn:
            return Thinking.POSSIBLE if end.endswith(form.turn) else Thinking.NONE
        if end.endswith(form.begin):
            return Thinking.OPEN
        return Thinking.NONE if end.endswith(form.end) else Thinking.POSSIBLE

    def call_id(self, seed: str) -> str:
        """A call's id, always the same for the same seed."""
        length = self.tool_format.call_id_length
        digest = hashlib.blake2b(seed.encode(), digest_size=12).hexdigest()
        return digest[:length] if length else f"call_{digest}"

    def template_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> tuple[list[_Message], list[dict[str, Any]] | None]:
        """Messages (as `read_messages` gives them) and tools for the template, all text in them marked as written by
        the client (`Tokenizer.mark`)."""
        marked = [self._with_reasoning(self._marked(message)) for message in self._renumbered(messages)]
        shown = [self._marked(tool.shown()) for tool in tools]
        if self.takes_tools:
            return [_in_parts(self._template_message(message)) for message in marked], shown or None
        written = [_in_parts(message) for message in _merged([_in_words(m, self.tool_format) for m in marked])]
        if not shown:
            return written, None
        words = _instructions(shown, self.tool_format)
        if written[0]["role"] == "system" or not self.takes_system:
            first = _with_words(written[0], words)
            return [first, *written[1:]], None
        return [{"role": "system", "content": words}, *written], None

    def _renumbered(self, messages: Sequence[Mapping[str, Any]]) -> list[_Message]:
        """With ids of calls as the model itself writes them."""
        if not self.tool_format.shown_id:
            return [dict(message) for message in messages]
        shown: dict[str, str] = {}
        found: list[_Message] = []
        number = 0
        for message in messages:
            if "tool_calls" in message:
                calls = []
                for call in message["tool_calls"]:
                    shown[call["id"]] = self.tool_format.shown_id.format(name=call["name"], number=number)
                    calls.append({**call, "id": shown[call["id"]]})
                    number += 1
                message = {**message, "tool_calls": calls}
            elif "tool_call_id" in message:
                message = {**message, "tool_call_id": shown.get(message["tool_call_id"], message["tool_call_id"])}
            found.append(dict(message))
        return found

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.tokenizer.mark(value)
        if isinstance(value, dict):
            return {self.tokenizer.mark(name): self._marked(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._marked(inner) for inner in value]
        return value

    def _with_reasoning(self, message: _Message) -> _Message:
        """Templates know it by one name or the other."""
        if "reasoning_content" not in message:
            return message
        reasoning = message["reasoning_content"]
        if self.tool_format.frames_text and not (message.get("tool_calls") and message.get("content")):
            message = {**message, "thinking": reasoning}  # which harmony's template takes instead of content only
        return {**message, "reasoning": reasoning}

    def _template_message(self, message: _Message) -> _Message:
        found = dict(message)
        if "tool_call_id" in found:
            found["tool_call_id"] = self._template_id(found["tool_call_id"])
        if "tool_calls" in found:
            found["tool_calls"] = [
                {
                    "id": self._template_id(call["id"]),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": self._template_arguments(call["arguments"])},
                }
                for call in found["tool_calls"]
            ]
            found["content"] = found["content"] or self.no_content
        return found

    def _template_arguments(self, text: str) -> Any:
        if self.arguments_as_text:
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value if isinstance(value, dict) else text

    def _template_id(self, call_id: str) -> str:
        length = self.tool_format.call_id_length
        if length is None or (len(call_id) == length and call_id.isalnum()):
            return call_id
        return hashlib.blake2b(call_id.encode(), digest_size=16).hexdigest()[:length]


def _is_atom(tokenizer: Tokenizer, text: str, token_id: int) -> bool:
    """Whether grammars know the token by its id alone: special ones, and all that are written `<...>`."""
    return token_id in tokenizer.special_token_ids or (text.startswith("<") and text.endswith(">"))


def _renders(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> bool:
    try:
        tokenizer.render_chat(messages)
    except RequestError:
        return False
    return True


def _probe(tokenizer: Tokenizer, form: ToolFormat) -> tuple[bool, str | None]:
    """How the template wants calls, found by trying: it must show a call's name and arguments, and no Python."""
    length = form.call_id_length or 9
    call_id = "a" * length
    tools = [Tool(_PROBE_NAME, {"type": "object", "properties": {_PROBE_KEY: {"type": "string"}}}, "probe").shown()]
    for as_text in (False, True):
        for content in (None, ""):
            value = {_PROBE_KEY: _PROBE_VALUE}
            function = {"name": _PROBE_NAME, "arguments": json.dumps(value) if as_text else value}
            messages: list[_Message] = [
                {"role": "user", "content": "probe"},
                {
                    "role": "assistant",
                    "content": content,
                    "tool_calls": [{"id": call_id, "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": call_id, "name": _PROBE_NAME, "content": "probed"},
            ]
            try:
                text = tokenizer.render_chat(messages, tools=tools)
            except RequestError:
                continue
            shown_before = text.rpartition("probed")[0]
            is_shown = (
                _PROBE_VALUE in shown_before and f"{{'{_PROBE_KEY}'" not in text and f'\\"{_PROBE_KEY}' not in text
            )
            if is_shown and "None" not in text:
                return as_text, content
    return False, ""


# -------------------------------------------------------------------------------------------- templates without tools


def _instructions(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    example = form.written.text([("NAME", "ARGUMENTS")])
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call functions to help with the user's request. These are there, each with the JSON schema of its "
        f"parameters:\n<tools>\n{listed}\n</tools>\n\nTo call one, write its NAME, and its ARGUMENTS as a JSON object, "
        f"in exactly this form:\n{example}"
    )


def _in_words(message: _Message, form: ToolFormat) -> _Message:
    """The message for a template that knows system, user and assistant only."""
    found: _Message = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" in message:
        calls = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
        written = form.written.text(calls, joint="\n")
        found["content"] = f"{found['content']}\n{written}" if found["content"] else written
    return found


def _with_words(message: _Message, words: str) -> _Message:
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": f"\n\n{words}"}]}
    return {**message, "content": f"{content}\n\n{words}"}


def _in_parts(message: _Message) -> _Message:
    """The message with the content as the client sent it: in parts, unless words were added to it since."""
    parts = message.get("content_parts")
    if parts is None:
        return message
    found = {name: value for name, value in message.items() if name != "content_parts"}
    if found["content"] == "\n".join(part["text"] for part in parts):
        found["content"] = parts
    return found


def _merged(messages: Sequence[_Message]) -> list[_Message]:
    """Results of several calls in one message."""
    found: list[_Message] = []
    for message in messages:
        last = found[-1] if found else None
        is_result = message["role"] == "user" and message["content"].startswith("<tool_response>\n")
        if is_result and last is not None and last["role"] == "user" and last["content"].endswith("\n</tool_response>"):
            found[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            found.append(message)
    return found
