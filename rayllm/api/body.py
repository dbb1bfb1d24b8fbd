"""The bytes of a body to a JSON object: strict JSON, one value a name, no endless nesting."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from rayllm.errors import RequestError

MAX_DEPTH = 128
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_JSON_NUMBER = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises `RequestError` (400) for everything else.

    Python's own parser, not the fastest: only it can see names that stand twice, and tell where NaN was.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} ({error.reason})", code="invalid_json") from None
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    check_text = _SURROGATE.search(body) is not None
    if check_text or _NO_JSON_NUMBER.search(body) or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        for name, field in value.items():
            _check_values(name, field, check_text)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RequestError(
            f"the name {twice[:100]!r} stands twice in one object", param=twice[:100], code="invalid_json"
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
