"""The bytes of a body to a JSON object: strict JSON, one value a name, no endless nesting, no more than is of use.

The parser is one call into C, which keeps the whole process waiting. So what it would have to make is counted first:
each step of that is a short pass over the bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from rayllm.errors import RequestError

MAX_DEPTH = 128
LARGE_BODY_BYTES = 64 * 1024
"""Beyond it a body is large: parsed and checked beside the event loop (`api.offload`)."""
MAX_CONTAINERS = 2**15
MAX_NAMES = 40_000
MAX_STRINGS = 2**17
MAX_VALUES = 2**18
"""Entries of lists and objects in all: token ids, mostly. A model with a longer context may have more."""
_MIN_BODY_BYTES = 4 * 2**20
_TOKEN_BYTES = 32
"""What a token takes as JSON text, generously: on average 4 characters, of which some are escaped."""
_SLICE_BYTES = 2**18
_OVERLAP_BYTES = 16
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_JSON_NUMBER = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}")


def max_body_bytes(max_model_len: int, vocab_size: int) -> int:
    """The largest body that a model of that context length and vocabulary can use: a context as text or as ids."""
    id_bytes = len(str(vocab_size)) + 2
    return max(_MIN_BODY_BYTES, 2**20 + max_model_len * max(_TOKEN_BYTES, id_bytes))


def max_values(max_model_len: int) -> int:
    """The most entries that such a body may hold."""
    return max(MAX_VALUES, 2 * max_model_len)


def parse_object(body: bytes, max_num_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object of a request. Raises `RequestError` (400; 413 for one that holds too much) for everything else.

    Python's own parser, not the fastest: only it can see names that are given twice, and say where NaN was.
    """
    if len(body) > LARGE_BODY_BYTES:
        _check_counts(body, max_num_values)
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} ({error.reason})", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    check_text = _is_in(_SURROGATE, body)
    if check_text or body.count(b"[") + body.count(b"{") > MAX_DEPTH or _is_in(_NO_JSON_NUMBER, body):
        for name, field in value.items():
            _check_values(name, field, check_text)
    return value


def _check_counts(body: bytes, max_num_values: int) -> None:
    """Refuses what holds too many parts. Those in texts do not count; they are looked for only where it matters."""
    if _fits(body, max_num_values):
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_count("texts", plain.count(b'"') // 2, MAX_STRINGS)
    outside = b"".join(plain.split(b'"')[::2])
    first_end = min(end for end in (outside.find(b"]"), outside.find(b"}"), len(outside)) if end >= 0)
    if outside.count(b"[", 0, first_end) + outside.count(b"{", 0, first_end) > MAX_DEPTH:
        raise _too_deep()
    _check_count("lists and objects", outside.count(b"[") + outside.count(b"{"), MAX_CONTAINERS)
    _check_count("names", outside.count(b":"), MAX_NAMES)
    _check_count("values", outside.count(b",") + 1, max_num_values)


def _fits(body: bytes, max_num_values: int) -> bool:
    """Whether there cannot be too many, wherever they stand."""
    return (
        body.count(b'"') <= 2 * MAX_STRINGS
        and body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS
        and body.count(b":") <= MAX_NAMES
        and body.count(b",") < max_num_values
    )


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def _check_count(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise RequestError(
            f"the body holds {number} {what}, at most {limit} are read: send less in one request",
            code="body_too_large",
            status=413,
        )


def _is_in(pattern: re.Pattern[bytes], body: bytes) -> bool:
    """`pattern.search`, in slices, between which other threads get their turn."""
    starts = range(0, len(body), _SLICE_BYTES)
    return any(pattern.search(body, start, start + _SLICE_BYTES + _OVERLAP_BYTES) is not None for start in starts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RequestError(
            f"the name {twice[:100]!r} is given twice in one object", param=twice[:100], code="invalid_json"
        )
    return found


def _check_values(name: str, field: Any, check_text: bool) -> None:
    """Refuses what is no JSON though the parser takes it (NaN, Infinity), lone surrogates, and deep
    nesting."""
    if check_text and not _is_text(name):
        raise RequestError("a field's name holds a lone surrogate, which is no text", code="invalid_json")
    level = [field]
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"{name[:100]}: {value!r} is not a JSON number", param=name[:100])
            if check_text and isinstance(value, str) and not _is_text(value):
                raise RequestError(f"{name[:100]}: holds a lone surrogate, which is no text", param=name[:100])
        level = [inner for value in level if isinstance(value, (list, dict)) for inner in _inside(value)]
        if not level:
            return
    raise RequestError(f"{name[:100]}: nested deeper than {MAX_DEPTH} levels", param=name[:100])


def _inside(value: list[Any] | dict[str, Any]) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    else:
        yield from value
        yield from value.values()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
