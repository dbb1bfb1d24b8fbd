"""What reads a text that comes in pieces gives the same result however the text is cut."""

from __future__ import annotations

import pytest
from parsing.readings import cuts, read

from rayllm.parsing.events import Event, Text, joined
from rayllm.parsing.text_reader import TextReader, first_of


@pytest.mark.parametrize(
    ("written", "value", "rest"),
    [
        ('{"a": [1, "}"]} after', '{"a": [1, "}"]}', " after"),
        (r'["\"]", 2]]', r'["\"]", 2]', "]"),
        (r'"a\\" b', r'"a\\"', " b"),
        ("-1.5e3, 2", "-1.5e3", ", 2"),
        ("true</tool_call>", "true", "</tool_call>"),
        ('{"a": 1</tool_call>', '{"a": 1', "</tool_call>"),
        ('{"a": "cut', '{"a": "cut', ""),
        ('"cut', '"cut', ""),
    ],
)
def test_a_json_value_ends_where_it_is_closed_or_a_mark_begins(written: str, value: str, rest: str) -> None:
    for pieces in cuts(written):
        text = TextReader()
        events, found = read(text, text.value(), pieces)
        assert (events, found, text.rest) == ([], value, rest), pieces


def test_an_object_is_sent_as_it_comes() -> None:
    text = TextReader()
    events, found = read(text, text.value(Text), ['{"a', '": "b', '"} x'])
    assert events == [Text('{"a'), Text('": "b'), Text('"}')]
    assert (found, text.rest) == (None, " x")


def test_text_flows_up_to_the_first_mark_without_the_space_before_it() -> None:
    for pieces in cuts("1 < 2 is so \n<tool>rest"):
        text = TextReader()
        events, mark = read(text, text.flow(("<tool>", "<end>"), Text), pieces)
        assert (joined(events), mark, text.rest) == ([Text("1 < 2 is so")], "<tool>", "rest"), pieces
        assert text.dropped == " \n"


def test_the_beginning_of_a_mark_is_held_and_comes_as_text_at_the_end() -> None:
    text = TextReader()
    reading = text.flow(("<tool>",), Text)
    text.rest = "so <to"
    assert next(reading) == Text("so")
    assert next(reading) is None
    assert text.rest == " <to"
    text.ended = True
    assert next(reading) == Text(" <to")


def test_a_kept_mark_is_still_to_be_read() -> None:
    text = TextReader()
    _, mark = read(text, text.flow(("<a>",), Text, keeps_mark=True), ["x<a>y"])
    assert (mark, text.rest) == ("<a>", "<a>y")


@pytest.mark.parametrize(("written", "found"), [("abd!", "abd"), ("abc", "abc"), ("ab", None), ("xab", None)])
def test_the_next_of_some_texts_stays(written: str, found: str | None) -> None:
    for pieces in cuts(written):
        text = TextReader()
        assert read(text, text.next_of(("abc", "abd")), pieces) == ([], found), pieces
        assert text.rest == written


@pytest.mark.parametrize(("written", "cut"), [("", True), ("</to", True), ("</tool>", False), ("</tu", False)])
def test_a_mark_that_the_end_cuts_is_known(written: str, cut: bool) -> None:
    text = TextReader()
    assert read(text, text.ends_within(("</tool>",)), [written]) == ([], cut)


@pytest.mark.parametrize(
    ("written", "found", "rest"), [("key</k> value", ("key", True), " value"), ("key</", ("key</", False), "")]
)
def test_what_stands_before_a_mark_is_read_with_it(written: str, found: tuple[str, bool], rest: str) -> None:
    for pieces in cuts(written):
        text = TextReader()
        assert read(text, text.until("</k>"), pieces) == ([], found), pieces
        assert text.rest == rest


def test_what_was_taken_can_be_put_back() -> None:
    text = TextReader()
    text.rest, text.taken = "  a,b", []
    none: list[Event] = []
    assert read(text, text.skip(), []) == (none, None)
    assert text.take(2) == "a,"
    assert text.rest == "b"
    text.put_back()
    assert (text.rest, text.taken) == ("  a,b", None)


def test_the_mark_that_begins_first_is_found_and_of_those_the_longest() -> None:
    assert first_of("x<ab><a", ("<a", "<ab>", "x")) == (0, "x")
    assert first_of("..<ab>", ("<a", "<ab>")) == (2, "<ab>")
    assert first_of("..", ("<a",)) is None
