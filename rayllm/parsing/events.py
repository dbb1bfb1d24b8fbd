"""What a choice's text means, piece by piece: the events that every API shape is written from.

    parser = chat_format.parser(...)                # an `OutputParser`; None where the text is only text
    for event in parser.push(new_text): ...         # for each delta
    for event in parser.finish(): ...               # once, after the last

In order: `Reasoning` pieces, then `Text` pieces and calls. A call is one `ToolCallBegin`, any number of
`ToolCallArguments`, one `ToolCallEnd`; calls are numbered from 0 and never interleave. The joined `text` of a call's
arguments is the JSON that the model wrote. Where nothing constrained it, or a limit cut it, it may be no JSON: then its
`ToolCallEnd` holds the call as `unread` text. White space around reasoning and calls is dropped, and so is a mark after
a call that the end of the text cuts; what looked like a call and cannot be read as one comes as `Text`; else no
character is lost, doubled or moved. Events depend on the text alone, not on how it was cut into deltas: joined pieces
are always the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int
    unread: str | None = None
    """The call as the model wrote it, where its arguments are no JSON: then it is no call, but text."""


Event = Text | Reasoning | ToolCallBegin | ToolCallArguments | ToolCallEnd


def joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring pieces of one kind made one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, (Text, Reasoning)) and type(last) is type(event):
            found[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            found[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found
