"""Heads of messages in OpenAI's harmony, and how the contents of several messages become one text.

An answer is a row of messages, each `<|start|>assistant<|channel|>CHANNEL to=WHOM <|constrain|>json<|message|>CONTENT`
and `<|end|>`; the prompt holds the first `<|start|>assistant`. Whom it is to may also stand before the channel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rayllm.parsing.events import Event, Text
from rayllm.parsing.text_reader import Reading, TextReader

_MAX_HEAD_CHARACTERS = 512
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BEGINS = ("<|start|>", "<|channel|>", "<|constrain|>", " to=", "to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_CALLED = re.compile(r"\bto=functions\.([\w.-]{1,256})")
_PART_OF_HEAD = re.compile(
    r"(<\|start\|>)?\w*( ?to=[\w.-]*)?\s*(<\|channel\|>\s*\w*( to=[\w.-]*)?\s*(<\|constrain\|>\s*)?\w*)?"
)


def channel_of(head: str) -> str:
    """`analysis`, `commentary` or `final`; empty where the head names none."""
    found = _CHANNEL.search(head)
    return found.group(1) if found else ""


def called(head: str) -> str | None:
    """The function that the message is to."""
    found = _CALLED.search(head)
    return found.group(1) if found else None


class Joint:
    """Makes events of the contents of one kind; an empty line stands between those of two messages."""

    def __init__(self, make: Callable[[str], Event]):
        self._make = make
        self._has_sent = False
        self._is_due = False

    def begin(self) -> None:
        """A message begins."""
        self._is_due = self._has_sent

    def __call__(self, text: str) -> Event:
        joint = "\n\n" if self._is_due else ""
        self._has_sent, self._is_due = True, False
        return self._make(joint + text)


def next_head(text: TextReader, marks: Sequence[str]) -> Reading[str]:
    """Past the end of a message and the head of the next, which is returned; empty where there is none. A head that is
    cut means nothing; a mark that begins none comes as text."""
    while mark := (yield from text.next_of(_ENDS)):
        text.take(len(mark))
        yield from text.skip()
    if (yield from text.next_of((_MESSAGE,))):
        text.take(len(_MESSAGE))
        return ""
    if not (yield from text.next_of(_BEGINS)):
        return ""
    while (num := text.rest.find(_MESSAGE)) < 0 and len(text.rest) <= _MAX_HEAD_CHARACTERS + len(_MESSAGE):
        if text.ended:
            if _PART_OF_HEAD.fullmatch(text.rest):
                text.take(len(text.rest))
            break
        yield None
    if 0 <= num <= _MAX_HEAD_CHARACTERS:
        head = text.take(num)
        text.take(len(_MESSAGE))
        return head
    if mark := (yield from text.next_of(marks)):
        yield Text(text.take(len(mark)))
    return ""
