"""Heads of harmony's messages, and contents of several messages as one text."""

from __future__ import annotations

import pytest
from parsing.readings import cuts, read

from rayllm.parsing.channels import Joint, called, channel_of, next_head
from rayllm.parsing.events import Event, Text
from rayllm.parsing.text_reader import TextReader


@pytest.mark.parametrize(
    ("head", "channel", "function"),
    [
        ("<|channel|>final", "final", None),
        ("<|start|>assistant<|channel|> analysis", "analysis", None),
        ("<|channel|>commentary to=functions.get.weather-1 <|constrain|>json", "commentary", "get.weather-1"),
        (" to=functions.weather<|channel|>commentary", "commentary", "weather"),
        ("<|channel|>commentary to=browser.search", "commentary", None),
        ("<|start|>assistant", "", None),
        (f"to=functions.{'x' * 300}", "", "x" * 256),
    ],
)
def test_a_head_names_its_channel_and_the_function_called(head: str, channel: str, function: str | None) -> None:
    assert channel_of(head) == channel
    assert called(head) == function


def test_an_empty_line_stands_between_the_contents_of_two_messages_alone() -> None:
    make = Joint(Text)
    make.begin()
    make.begin()  # the message before had no content
    assert [make("a"), make("b")] == [Text("a"), Text("b")]
    make.begin()
    assert [make("c"), make("d")] == [Text("\n\nc"), Text("d")]


@pytest.mark.parametrize(
    ("written", "head", "rest"),
    [
        ("<|channel|>final<|message|>yes", "<|channel|>final", "yes"),
        ("<|end|>\n<|start|>assistant<|channel|>final<|message|>yes", "<|start|>assistant<|channel|>final", "yes"),
        (" to=functions.f<|channel|>commentary<|message|>{}", " to=functions.f<|channel|>commentary", "{}"),
        ("<|message|>yes", "", "yes"),
        ("<|return|>", "", ""),
        ("yes", "", "yes"),
        ("<|channel|>analy", "", ""),
        ("to=day, then", "", "to=day, then"),
    ],
)
def test_the_next_head_is_read_however_it_is_cut(written: str, head: str, rest: str) -> None:
    for pieces in cuts(written):
        text = TextReader()
        assert read(text, next_head(text, ("<|channel|>",)), pieces) == ([], head), pieces
        assert text.rest == rest, pieces


def test_a_mark_that_begins_no_head_comes_as_text() -> None:
    text = TextReader()
    expected: list[Event] = [Text("<|channel|>")]
    content = "x" * 600
    assert read(text, next_head(text, ("<|channel|>",)), ["<|channel|>", content]) == (expected, "")
    assert text.rest == content
