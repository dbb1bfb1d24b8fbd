"""Text to events (see `events`), in one pass and piece by piece. A pure function of the text.

The parser is a generator that reads from a `TextReader`, so each format reads as if the whole text were there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayllm.parsing.channels import Joint, called, channel_of, next_head
from rayllm.parsing.events import Event, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd, joined
from rayllm.parsing.json_values import arguments_text, is_json, loaded, pair_value
from rayllm.parsing.python_values import send_value
from rayllm.parsing.reasoning import ReasoningFormat
from rayllm.parsing.text_reader import Reading, Steps, TextReader, first_of
from rayllm.parsing.tool_formats import Payload, ToolFormat

MAX_NAME_CHARACTERS = 256
"""A call whose name is longer is no call but text."""
_NAME = re.compile(r"[^\s<>{}\"]+")
_WORD = re.compile(r"[\w.-]*")
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")
_NOTHING = re.compile(r"(?!)")


class _NoCallError(Exception):
    """What began as a call cannot be read as one."""


class OutputParser:
    """Parses one choice. `tools`: the known tools' names and the JSON schemas of their parameters. Without a
    `tool_format` calls are not looked for, without a `reasoning_format` reasoning is not. A format that frames all
    text is read without tools as well, and then has no calls.

    `opened`: the prompt already began the reasoning. `call_id` makes the id of call number n. `only_one`: the first
    call ends the answer (`is_done`); what follows it is nobody's.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None = None,
        reasoning_format: ReasoningFormat | None = None,
        *,
        tools: Mapping[str, Any] | None = None,
        opened: bool = False,
        call_id: Callable[[int], str] = "call_{}".format,
        only_one: bool = False,
    ):
        self._tools = tools or {}
        self._has_tools = tools is not None
        self._call_id = call_id
        self._text = TextReader()
        self.num_calls = 0
        """Calls begun so far."""
        self.num_whole_calls = 0
        """Those that ended with arguments that are JSON."""
        self._arguments: list[str] = []
        self.is_done = False
        self._only_one = only_one
        self.in_reasoning = opened and reasoning_format is not None
        self._steps = self._whole(tool_format, reasoning_format)

    def push(self, text: str) -> Sequence[Event]:
        """The events that this text completes."""
        quick = self._text.quick
        if quick is not None:
            if text and quick[0].search(text) is None:
                if self._text.call is not None:
                    self._text.call.append(text)
                return [quick[1](text)]
            self._text.quick = None
        self._text.rest += text
        return self._run()

    def finish(self) -> Sequence[Event]:
        """No more text comes: the events of what was held back. A call under way ends."""
        self._text.ended = True
        self._text.quick = None
        return self._run()

    def _run(self) -> list[Event]:
        found: list[Event] = []
        while not self.is_done:
            event = next(self._steps, None)
            if event is None:
                break
            found.append(event)
        return joined(found) if len(found) > 1 else found

    # ------------------------------------------------------------------------------------------------- whole text

    def _whole(self, tool_format: ToolFormat | None, reasoning_format: ReasoningFormat | None) -> Steps:
        if tool_format is not None and tool_format.payload is Payload.CHANNELS:
            yield from self._messages(tool_format, reasoning_format is not None)
            return
        if reasoning_format is not None:
            yield from self._reasoning(reasoning_format)
        if tool_format is not None:
            yield from self._content(tool_format)
            return
        while not self._text.ended or self._text.rest:
            if self._text.rest:
                yield Text(self._text.take(len(self._text.rest)))
            self._text.quick = _NOTHING, Text
            yield None

    def _reasoning(self, form: ReasoningFormat) -> Steps:
        if not self.in_reasoning:
            self._text.taken = []
            yield from self._text.skip()
            begin = yield from self._text.next_of(form.begin)
            if begin is None:
                self._text.put_back()
                return
            self._text.take(len(begin))
            self._text.taken = None
            self.in_reasoning = True
        yield from self._text.skip()
        yield from self._text.flow(form.end, Reasoning)
        self.in_reasoning = False
        yield from self._text.skip()

    def _content(self, form: ToolFormat) -> Steps:
        if form.bare:
            self._text.taken = []
            yield from self._text.skip()
            yield from self._calls(form, known_only=True)
        while True:
            marks = [mark for mark in (form.begin, *form.noise, form.end if self.num_calls else "") if mark]
            if self.num_calls and (yield from self._text.ends_within(marks)):
                return
            mark = yield from self._text.flow(marks, Text)
            if mark is None:
                return
            if mark == form.begin:
                self._text.taken = [self._text.dropped, mark]
                yield from self._calls(form)
            else:
                yield from self._text.skip()

    def _calls(self, form: ToolFormat, known_only: bool = False) -> Steps:
        """What follows a beginning. What was read since and is no call comes as text."""
        read = {Payload.OBJECT: self._objects, Payload.PYTHON: self._python_calls}.get(form.payload, self._named_call)
        try:
            yield from read(form, known_only)
        except _NoCallError:
            if text := "".join(self._text.taken or ()):
                yield Text(text)
        else:
            self._text.taken = None
            yield from self._text.skip()
        self._text.taken = None

    def _begin(self, name: Any, known_only: bool) -> Steps:
        is_name = isinstance(name, str) and len(name) <= MAX_NAME_CHARACTERS and _NAME.fullmatch(name)
        if not is_name or (known_only and name not in self._tools):
            raise _NoCallError
        self._text.call, self._text.taken = self._text.taken or [], None
        self._arguments = []
        self.num_calls += 1
        yield ToolCallBegin(self.num_calls - 1, self._call_id(self.num_calls - 1), name)

    def _end(self) -> Steps:
        self.is_done = self._only_one
        is_whole = is_json("".join(self._arguments))
        self.num_whole_calls += is_whole
        yield ToolCallEnd(self.num_calls - 1, None if is_whole else "".join(self._text.call or ()))
        self._text.call, self._text.taken = None, []

    @property
    def has_unread_calls(self) -> bool:
        """Whether something began as a call and turned out to be none."""
        return self.num_whole_calls < self.num_calls

    def _send(self, arguments: str) -> Event:
        self._arguments.append(arguments)
        return ToolCallArguments(self.num_calls - 1, arguments)

    # --------------------------------------------------------------------------------------------------- channels

    def _messages(self, form: ToolFormat, has_reasoning: bool) -> Steps:
        """Heads and contents, in turn. The prompt holds the beginning of the first head, or all of it."""
        text = self._text
        marks = (form.begin, form.end, *form.noise)
        answer, thoughts = Joint(Text), Joint(Reasoning)
        while True:
            head = yield from next_head(text, marks)
            name = called(head) if self._has_tools else None
            if name is None:
                self.in_reasoning = has_reasoning and channel_of(head) == "analysis"
                made = thoughts if self.in_reasoning else answer
                made.begin()
                yield from text.flow(marks, made, keeps_mark=True)
                self.in_reasoning = False
            else:
                yield from self._begin(name, known_only=False)
                yield from text.skip()
                if (yield from text.peek()) == "{":
                    yield from text.value(self._send)
                else:
                    yield from text.flow(marks, self._send, keeps_mark=True)
                yield from self._end()
                text.taken = None
                yield from text.skip()
            if text.ended and not text.rest:
                return

    # ---------------------------------------------------------------------------------------------------- objects

    def _objects(self, form: ToolFormat, known_only: bool) -> Steps:
        """One object or several, with what may stand between them."""
        num_before = self.num_calls
        while True:
            yield from self._text.skip()
            character = yield from self._text.peek()
            if character == "{":
                yield from self._object(known_only)
            elif form.end and (yield from self._text.next_of((form.end,))):
                if self.num_calls == num_before:
                    raise _NoCallError
                self._text.take(len(form.end))
                return
            elif character and character in "[,;}]":
                self._text.take(1)
                if character == "]" and self.num_calls > num_before:
                    if not form.end:
                        return
                    self._text.taken = []
            elif self.num_calls == num_before:
                raise _NoCallError
            else:
                self._text.put_back()
                return

    def _object(self, known_only: bool) -> Steps:
        """`{"name": ..., "arguments": ...}`, in any order and among other members."""
        self._text.take(1)
        num_before = self.num_calls
        early: str | None = None
        has_arguments = False
        while True:
            yield from self._text.skip(",")
            character = yield from self._text.peek()
            if character != '"':
                break
            key = loaded((yield from self._text.value()) or "")
            yield from self._text.skip(":")
            begun = self.num_calls > num_before
            if key in _NAME_KEYS and not begun:
                yield from self._begin(loaded((yield from self._text.value()) or ""), known_only)
                if early is not None:
                    yield self._send(arguments_text(early))
            elif key in _ARGUMENT_KEYS and not has_arguments:
                has_arguments = True
                early = yield from self._text.value(self._send if begun else None)
                is_cut = early == "" and self._text.ended and not self._text.rest
                if begun and early is not None and not is_cut:
                    yield self._send(arguments_text(early))
            elif known_only and not begun and key not in _OTHER_KEYS:
                raise _NoCallError
            else:
                yield from self._text.value()
        if self.num_calls == num_before:
            raise _NoCallError
        if character == "}":
            self._text.take(1)
            if not has_arguments:
                yield self._send("{}")
        yield from self._end()

    # ----------------------------------------------------------------------------------------------------- as Python

    def _python_calls(self, form: ToolFormat, known_only: bool) -> Steps:
        """`[name(key=value, ...), ...]`, or objects."""
        text = self._text
        yield from text.skip()
        character = yield from text.peek()
        if character == "[":
            text.take(1)
            yield from text.skip()
            character = yield from text.peek()
        elif character != "{":
            raise _NoCallError
        if character == "{":
            yield from self._objects(form, known_only)
            return
        while True:
            yield from self._python_call(known_only)
            yield from text.skip()
            if (yield from text.peek()) == ",":
                text.take(1)
                yield from text.skip()
            elif (yield from text.peek()) != "]":
                break
            if (yield from text.peek()) == "]":
                text.take(1)
                break
        yield from text.skip()
        if form.end and (yield from text.next_of((form.end,))):
            text.take(len(form.end))

    def _python_call(self, known_only: bool) -> Steps:
        text, num_before = self._text, self.num_calls
        name = yield from self._word()
        if (yield from text.peek()) != "(":
            raise _NoCallError
        text.take(1)
        opening = "{"
        while True:
            yield from text.skip()
            key = yield from self._word()
            yield from text.skip()
            character = yield from text.peek()
            is_over = character == ")" and not key
            if self.num_calls == num_before:
                if not is_over and (character != "=" or not key):
                    raise _NoCallError
                yield from self._begin(name, known_only)
            if is_over:
                text.take(1)
                yield self._send("{}" if opening == "{" else "}")
                break
            if character != "=" or not key:
                break
            text.take(1)
            yield self._send(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
            opening = ", "
            if not (yield from send_value(text, self._send)):
                break
            yield from text.skip()
            if (yield from text.peek()) == ",":
                text.take(1)
            elif (yield from text.peek()) != ")":
                break
        yield from self._end()

    def _word(self) -> Reading[str]:
        """Letters, digits, `_`, `-` and `.`, as many as there are; but of too many only a part."""
        text = self._text
        while (num := _word_length(text.rest)) == len(text.rest) <= MAX_NAME_CHARACTERS and not text.ended:
            yield None
        return text.take(num)

    # ------------------------------------------------------------------------------------------- name, then arguments

    def _named_call(self, form: ToolFormat, known_only: bool) -> Steps:
        yield from self._text.skip()
        if not known_only and (yield from self._text.peek()) in ("[", "{"):
            yield from self._objects(form, known_only)
            return
        name = yield from (self._known_name() if known_only else self._name(form))
        yield from self._begin(name, known_only)
        yield from self._text.skip()
        if form.payload is Payload.PAIRS:
            yield from self._pairs(form, self._tools.get(name))
        elif (yield from self._text.peek()) == "{":
            yield from self._text.value(self._send)
        else:
            yield from self._text.flow([mark for mark in (form.end, form.begin) if mark], self._send, keeps_mark=True)
        yield from self._end()
        self._text.taken = None
        yield from self._text.skip("`")
        if form.end and (yield from self._text.next_of((form.end,))):
            self._text.take(len(form.end))

    def _known_name(self) -> Reading[str]:
        line = yield from self._text.next_of([f"{name}\n" for name in self._tools])
        if line is None:
            raise _NoCallError
        return self._text.take(len(line))[:-1]

    def _name(self, form: ToolFormat) -> Reading[str]:
        if form.name_begin and (yield from self._text.next_of((form.name_begin,))):
            self._text.take(len(form.name_begin))
        stops = [mark for mark in (*form.name_end, form.end, form.key[0], form.id_mark, "{") if mark]
        limit = MAX_NAME_CHARACTERS + max(map(len, stops))
        while (found := first_of(self._text.rest, stops)) is None:
            if self._text.ended or len(self._text.rest) > limit:
                raise _NoCallError
            yield None
        if found[0] > MAX_NAME_CHARACTERS:
            raise _NoCallError
        name = self._text.take(found[0]).strip()
        if found[1] == form.id_mark:
            self._text.take(len(found[1]))
            yield from self._text.until(form.name_end[0])
        elif found[1] in form.name_end:
            self._text.take(len(found[1]))
        return name

    def _pairs(self, form: ToolFormat, schema: Any) -> Steps:
        """Arguments as marked keys and values, written as JSON; each is sent when it is whole."""
        opening = "{"
        properties = schema.get("properties") if isinstance(schema, dict) else None
        while True:
            yield from self._text.skip()
            mark = yield from self._text.next_of((form.key[0], form.end, *form.noise))
            if mark == form.key[0]:
                self._text.take(len(mark))
                key = (yield from self._text.until(form.key[1]))[0].strip()
                yield from self._text.skip_one(form.value[0])
                raw, is_whole = yield from self._text.until(form.value[1])
                kind = properties.get(key) if isinstance(properties, dict) else None
                yield self._send(f"{opening}{json.dumps(key, ensure_ascii=False)}: {pair_value(raw, kind, is_whole)}")
                opening = ", "
            elif mark is None or mark == form.end:
                if mark is not None:
                    yield self._send("{}" if opening == "{" else "}")
                return
            else:
                self._text.take(len(mark))


def _word_length(text: str) -> int:
    found = _WORD.match(text)
    return 0 if found is None else found.end()
