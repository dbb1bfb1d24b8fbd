"""Drives a reader of text that comes piece by piece, as the output parser does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rayllm.parsing.events import Event
from rayllm.parsing.text_reader import Reading, TextReader

_T = TypeVar("_T")


def read(text: TextReader, reading: Reading[_T], pieces: Sequence[str]) -> tuple[list[Event], _T]:
    """The events and the result; the pieces come one by one, then the end. What is not read is left in `text.rest`."""
    events: list[Event] = []
    left = list(pieces)
    while True:
        try:
            event = next(reading)
        except StopIteration as stop:
            text.rest += "".join(left)
            return events, stop.value
        if event is not None:
            events.append(event)
            continue
        assert not text.ended, "a reading asks for more text after the end"
        text.quick = None
        if left:
            text.rest += left.pop(0)
        else:
            text.ended = True


def cuts(text: str) -> list[list[str]]:
    """The text whole, character by character, and cut in two at each place."""
    return [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
