"""The rest of a text that comes piece by piece, read as if all of it were there.

What reads is a generator: it yields events, and None where it needs more text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

from rayllm.parsing.events import Event
from rayllm.text.stop import num_held

_STRUCTURE = re.compile(r'["{}\[\]<`]')
"""What counts outside a string; the last two cannot stand in JSON there, so a marker begins."""
_STRING_END = re.compile(r'"|\\.', re.DOTALL)
_STRING_PART = re.compile(r'["\\]')
_AFTER_SCALAR = re.compile(r"[\s,}\]<`]")

_T = TypeVar("_T")
Reading = Generator[Event | None, None, _T]
Steps = Reading[None]


class TextReader:
    """`rest` is what has come and was not taken."""

    def __init__(self) -> None:
        self.rest = ""
        self.taken: list[str] | None = None
        """What was taken of something that may turn out to be something else; None: not kept."""
        self.call: list[str] | None = None
        """What was taken of a call that has begun; None: none has."""
        self.dropped = ""
        """White space before the last mark that `flow` met."""
        self.ended = False
        """No more text comes."""
        self.quick: tuple[re.Pattern[str], Callable[[str], Event]] | None = None
        """While a text flows: what must not be in new text for it to be one event as it is. Saves most of the cost."""

    def take(self, num: int) -> str:
        """The next `num` characters, which must be there."""
        text, self.rest = self.rest[:num], self.rest[num:]
        if self.taken is not None:
            self.taken.append(text)
        if self.call is not None:
            self.call.append(text)
        return text

    def put_back(self) -> None:
        self.rest = "".join(self.taken or ()) + self.rest
        self.taken = None

    def peek(self) -> Reading[str]:
        """The next character, nothing at the end; it stays."""
        while not self.rest and not self.ended:
            yield None
        return self.rest[:1]

    def skip(self, also: str = "") -> Steps:
        """Past white space and the characters `also`."""
        while True:
            self.take(len(self.rest) - len(self.rest.lstrip(f" \t\r\n{also}")))
            if self.rest or self.ended:
                return
            yield None

    def skip_one(self, mark: str) -> Steps:
        if mark:
            yield from self.skip()
            if (yield from self.next_of((mark,))):
                self.take(len(mark))

    def next_of(self, texts: Sequence[str]) -> Reading[str | None]:
        """Which of the texts comes next; it stays."""
        while True:
            for text in texts:
                if self.rest.startswith(text):
                    return text
            if self.ended or not any(text.startswith(self.rest) for text in texts):
                return None
            yield None

    def ends_within(self, texts: Sequence[str]) -> Reading[bool]:
        """Whether nothing comes but the beginning of one of the texts, cut by the end."""
        found = yield from self.next_of(texts)
        return found is None and self.ended and any(text.startswith(self.rest) for text in texts)

    def until(self, mark: str) -> Reading[tuple[str, bool]]:
        """What stands before the mark, which is taken too; and whether it came."""
        while (start := self.rest.find(mark)) < 0:
            if self.ended:
                return self.take(len(self.rest)), False
            yield None
        text = self.take(start)
        self.take(len(mark))
        return text, True

    def flow(self, marks: Sequence[str], make: Callable[[str], Event], keeps_mark: bool = False) -> Reading[str | None]:
        """Tells what comes before the first of the marks, at once, but for white space before a mark. Returns the mark,
        which is taken too unless `keeps_mark`."""
        suspect = _suspect(tuple(mark[0] for mark in marks))
        while True:
            found = first_of(self.rest, marks)
            if found is not None:
                before = self.take(found[0])
                shown_before = before.rstrip()
                self.dropped = before[len(shown_before) :]
                if shown_before:
                    yield make(shown_before)
                return found[1] if keeps_mark else self.take(len(found[1]))
            num_ready = len(self.rest)
            if not self.ended:
                num_ready = len(self.rest[: num_ready - num_held(self.rest, marks)].rstrip())
            if num_ready:
                yield make(self.take(num_ready))
            if self.ended:
                return None
            if not self.rest:
                self.quick = suspect, make
            yield None

    def value(self, send: Callable[[str], Event] | None = None) -> Reading[str | None]:
        """A JSON value, as it stands. With `send`, an object or a list is sent as it comes, and None returned."""
        character = yield from self.peek()
        if character and character in "{[":
            return (yield from self._nested(send))
        return (yield from (self._string() if character == '"' else self._scalar()))

    def _nested(self, send: Callable[[str], Event] | None) -> Reading[str | None]:
        parts: list[str] = []
        depth, in_string, is_over = 0, False, False
        while not is_over:
            num, depth, in_string, is_over = _scan(self.rest, depth, in_string)
            if self.ended and not is_over:
                num, is_over = len(self.rest), True
            text = self.take(num)
            if send is not None and text:
                yield send(text)
            parts.append(text)
            if not is_over:
                if send is not None and in_string and not self.rest:
                    self.quick = _STRING_PART, send
                yield None
        return None if send is not None else "".join(parts)

    def _string(self) -> Reading[str]:
        position = 1
        while True:
            found = _STRING_END.search(self.rest, position)
            if found is not None and found.group() == '"':
                return self.take(found.end())
            if found is not None:
                position = found.end()
            elif self.ended:
                return self.take(len(self.rest))
            else:
                position = max(position, len(self.rest) - 1)
                yield None

    def _scalar(self) -> Reading[str]:
        while (found := _AFTER_SCALAR.search(self.rest)) is None:
            if self.ended:
                return self.take(len(self.rest))
            yield None
        return self.take(found.start())


@lru_cache(maxsize=64)
def _suspect(beginnings: tuple[str, ...]) -> re.Pattern[str]:
    """Finds what may begin a mark, or be white space before one."""
    return re.compile("|".join([*map(re.escape, beginnings), r"\s\Z"]))


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """The mark that begins first (of those, the longest), and where."""
    found = [(start, mark) for mark in marks if (start := text.find(mark)) >= 0]
    return min(found, key=lambda match: (match[0], -len(match[1])), default=None)


def _scan(text: str, depth: int, in_string: bool) -> tuple[int, int, bool, bool]:
    """How many characters go on with an object or list, the new state, and whether it is over."""
    position = 0
    while True:
        found = (_STRING_END if in_string else _STRUCTURE).search(text, position)
        if found is None:
            cut = in_string and text.endswith("\\", position)  # the other half is still to come
            return len(text) - cut, depth, in_string, False
        position, character = found.end(), found.group()
        if in_string:
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "<`":
            return found.start(), depth, False, True
        else:
            depth += 1 if character in "{[" else -1
            if depth <= 0:
                return position, 0, False, True
