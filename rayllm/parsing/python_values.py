"""Python literals, as models write them, sent as JSON piece by piece. Nothing is ever evaluated as an expression."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable

from rayllm.parsing.events import Event
from rayllm.parsing.text_reader import Reading, TextReader

_MAX_DEPTH = 100
_MAX_NUMBER_CHARACTERS = 64
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_QUOTES = ("'", '"')
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER = re.compile(r"[+-]?[0-9.][0-9a-zA-Z_.+-]*")
_AFTER_SCALAR = re.compile(r"[\s,\])}:=]")
_STRING_STOPS = {quote: re.compile(rf"[{quote}\\]") for quote in _QUOTES}
_STRING_PART = re.compile(r"['\"\\\x00-\x1f]")
"""What must not be in new text for it to stand in JSON's string as it is."""
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_PART_OF_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U[0-9a-fA-F]{0,7}|[0-7]{1,2})?")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""} | {
    character: character for character in "\\'\""
}

Send = Callable[[str], Event]


def send_value(text: TextReader, send: Send, depth: int = 0) -> Reading[bool]:
    """One value; a tuple is a list, and what is no literal becomes a string. Whether it was whole: where not, neither
    is the JSON, and the text stays from where it could not be read."""
    yield from text.skip()
    character = yield from text.peek()
    if character in _QUOTES:
        return (yield from _send_string(text, send))
    if character in _CLOSERS:
        return depth < _MAX_DEPTH and (yield from _send_items(text, send, depth))
    raw = yield from _scalar(text)
    if raw:
        yield send(_json_scalar(raw))
    return bool(raw)


def _send_items(text: TextReader, send: Send, depth: int) -> Reading[bool]:
    closer = _CLOSERS[text.take(1)]
    is_map = closer == "}"
    yield send("{" if is_map else "[")
    separator = ""
    while True:
        yield from text.skip()
        if (yield from text.peek()) == closer:
            text.take(1)
            yield send("}" if is_map else "]")
            return True
        if separator:
            yield send(separator)
        if is_map and not (yield from _send_key(text, send)):
            return False
        if not (yield from send_value(text, send, depth + 1)):
            return False
        yield from text.skip()
        if (yield from text.peek()) == ",":
            text.take(1)
            separator = ", "
        elif (yield from text.peek()) != closer:
            return False


def _send_key(text: TextReader, send: Send) -> Reading[bool]:
    """The key of a dict, which JSON wants as a string, and the colon."""
    if (yield from text.peek()) in _QUOTES:
        if not (yield from _send_string(text, send)):
            return False
    elif raw := (yield from _scalar(text)):
        yield send(json.dumps(raw, ensure_ascii=False))
    yield from text.skip()
    if (yield from text.peek()) != ":":
        return False
    text.take(1)
    yield send(": ")
    return True


def _scalar(text: TextReader) -> Reading[str]:
    while (found := _AFTER_SCALAR.search(text.rest)) is None and not text.ended:
        yield None
    return text.take(len(text.rest) if found is None else found.start())


def _json_scalar(raw: str) -> str:
    if raw in _WORDS:
        return _WORDS[raw]
    if _JSON_NUMBER.fullmatch(raw):
        return raw
    if len(raw) <= _MAX_NUMBER_CHARACTERS and _NUMBER.fullmatch(raw):
        try:
            number = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            number = None
        if isinstance(number, int) or (isinstance(number, float) and math.isfinite(number)):
            return json.dumps(number)
    return json.dumps(raw, ensure_ascii=False)


def _send_string(text: TextReader, send: Send) -> Reading[bool]:
    """Neighbouring strings are one, as in Python."""
    yield send('"')
    quote = text.take(1)
    while True:
        found = _STRING_STOPS[quote].search(text.rest)
        num_plain = len(text.rest) if found is None else found.start()
        if num_plain:
            yield send(_in_string(text.take(num_plain)))
        if found is None:
            if text.ended:
                return False
            text.quick = _STRING_PART, send
            yield None
        elif found.group() == "\\":
            escape = yield from _escape(text)
            yield send(_json_escape(escape))
        else:
            text.take(1)
            yield from text.skip()
            if (yield from text.peek()) not in _QUOTES:
                yield send('"')
                return True
            quote = text.take(1)


def _escape(text: TextReader) -> Reading[str]:
    while not text.ended and _PART_OF_ESCAPE.fullmatch(text.rest):
        yield None
    found = _ESCAPE.match(text.rest)
    return text.take(1 if found is None else found.end())


def _json_escape(escape: str) -> str:
    kind, digits = escape[1:2], escape[2:]
    if kind == "u" and digits:
        return escape
    if kind in ("x", "U") and digits:
        code = int(digits, 16)
        return _in_string(chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else "\ufffd")
    if kind.isdigit():
        return _in_string(chr(int(escape[1:], 8)))
    return _in_string(_ESCAPED.get(kind, escape))


def _in_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
