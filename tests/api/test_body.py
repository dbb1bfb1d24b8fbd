from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.api.body import MAX_DEPTH, parse_object
from rayllm.errors import RequestError


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"   ", "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1}xxx', "not valid JSON"),
        (b'{/*x*/"a": 1}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"null", "JSON object, got NoneType"),
        (b"[]", "JSON object, got list"),
        (b'"x"', "JSON object, got str"),
        (b"NaN", "JSON object, got float"),
        (b'{"a": "\xc0\xaf"}', "not UTF-8: byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"a": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested deeper"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "a: nested deeper"),
    ],
)
def test_what_is_no_object_of_strict_json_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        parse_object(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400"])
def test_a_number_that_json_does_not_have_is_named(number: bytes) -> None:
    for body in (b'{"top_p": %s}', b'{"top_p": {"x": [%s]}}'):
        with pytest.raises(RequestError, match="top_p") as caught:
            parse_object(body % number)
        assert caught.value.param == "top_p"


@pytest.mark.parametrize("body", [rb'{"stop": ["a\ud800"]}', rb'{"stop": {"\udc00": 1}}', rb'{"\ud800": 1}'])
def test_half_a_character_is_no_text(body: bytes) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        parse_object(body)


def test_escaped_characters_and_nul_are_plain_text() -> None:
    assert parse_object(rb'{"a": "\ud83c\udf89\u0000", "b": 1e-320}') == {"a": "🎉\0", "b": 1e-320}


def test_nesting_up_to_the_limit_is_read() -> None:
    depth = MAX_DEPTH - 1

    assert parse_object(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")["a"] is not None


@given(body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_give_an_object_or_a_request_error(body: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert isinstance(parse_object(body), dict)
