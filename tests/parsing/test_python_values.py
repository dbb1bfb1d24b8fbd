"""Python literals become JSON, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsing.readings import cuts, read

from rayllm.parsing.events import Text
from rayllm.parsing.python_values import send_value
from rayllm.parsing.text_reader import TextReader


def sent(pieces: Sequence[str]) -> tuple[str, bool, str]:
    """The JSON, whether the value was whole, and what was left."""
    text = TextReader()
    events, is_whole = read(text, send_value(text, Text), pieces)
    return "".join(event.text for event in events if isinstance(event, Text)), is_whole, text.rest


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("True", True),
        ("None", None),
        ("false", False),
        ("-1_000", -1000),
        (".5", 0.5),
        ("0x10", 16),
        ("007", "007"),
        ("1e5", 1e5),
        ("1.e999", "1.e999"),
        ("nan", "nan"),
        ("'a' \"b\"\n 'c'", "abc"),
        (r"'\x41\u00e9\U0001F389\101\q\ud83c\udf89'", "Aé🎉A\\q🎉"),
        (r"'\xe9\U00110000'", "é\ufffd"),
        ("'it\\'s \"\ttab'", "it's \"\ttab"),
        ("(1, 'a',)", [1, "a"]),
        ("{'a': [True, {}], 5: (), }", {"a": [True, {}], "5": []}),
    ],
)
def test_literals_of_python_become_json(written: str, value: Any) -> None:
    for pieces in cuts(f"{written}, next"):
        text, is_whole, rest = sent(pieces)
        assert json.loads(text) == value, pieces
        assert is_whole
        assert rest == ", next"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(value=_JSON, size=st.integers(1, 9))
def test_what_python_writes_of_a_value_becomes_its_json(value: Any, size: int) -> None:
    text = f"{value!r})"
    written, is_whole, rest = sent([text[start : start + size] for start in range(0, len(text), size)])
    assert json.loads(written) == value
    assert (is_whole, rest) == (True, ")")


@pytest.mark.parametrize(
    ("written", "json_text", "rest"),
    [
        ("'Zü", '"Zü', ""),
        ("[1, 2", "[1, 2", ""),
        ("[1 2]", "[1", "2]"),
        ("{'a' 1}", '{"a"', "1}"),
        ("[" * 101, "[" * 100, "["),
        (")", "", ")"),
    ],
)
def test_a_value_that_is_not_whole_is_sent_as_far_as_it_can_be_read(written: str, json_text: str, rest: str) -> None:
    assert sent([written]) == (json_text, False, rest)


def test_an_expression_is_a_string_and_never_run() -> None:
    assert sent(["__import__('os')"]) == ("\"__import__('os'\"", True, ")")


def test_a_string_is_sent_while_it_is_written() -> None:
    text = TextReader()
    reading = send_value(text, Text)
    text.rest = "'Zü"
    assert [next(reading), next(reading), next(reading)] == [Text('"'), Text("Zü"), None]
    text.rest += "rich"
    assert next(reading) == Text("rich")
