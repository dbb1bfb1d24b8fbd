"""Values and arguments as models write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayllm.parsing.json_values import arguments_text, is_json, loaded, pair_value


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "{", "", "[" * 100_000, "'a'"])
def test_what_is_no_json_is_no_value(text: str) -> None:
    assert loaded(text) is None
    assert not is_json(text)


def test_null_is_json() -> None:
    assert is_json("null")
    assert loaded("[1.5, null]") == [1.5, None]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("", "{}"),
        ("null", "{}"),
        (json.dumps('{"a": 1}'), '{"a": 1}'),
        (json.dumps("hello"), '"hello"'),
        ("5", "5"),
        ('"{', '"{'),
    ],
)
def test_arguments_in_a_string_are_unpacked_and_null_is_an_empty_object(written: str, arguments: str) -> None:
    assert arguments_text(written) == arguments


@pytest.mark.parametrize(
    ("raw", "schema", "value"),
    [
        ("12", {"type": "string"}, '"12"'),
        ("12", {"enum": ["12", "13"]}, '"12"'),
        ("12", {"enum": [12, 13]}, "12"),
        ("12", {"type": "integer"}, "12"),
        ("\n12\n", None, "12"),
        ("\n\n12", {"type": "string"}, '"\\n12"'),
        (" null ", {}, "null"),
        ("null", {"type": "string"}, '"null"'),
        ("Zürich", {"type": "integer"}, '"Zürich"'),
        ("", {"type": "integer"}, '""'),
        ('{"a": [1]}', {"type": "object"}, '{"a": [1]}'),
    ],
)
def test_plain_text_becomes_json_by_the_schemas_type(raw: str, schema: Any, value: str) -> None:
    assert pair_value(raw, schema, is_whole=True) == value


def test_a_value_that_is_cut_is_a_string_without_its_end() -> None:
    assert pair_value('say "a', {"type": "integer"}, is_whole=False) == '"say \\"a'
    assert pair_value("12", {"type": "integer"}, is_whole=False) == '"12'
