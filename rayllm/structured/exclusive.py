"""Whether alternatives of a `oneOf` exclude each other, so that `anyOf` says the same. JSON Schema 2020-12."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_Schema = dict[str, Any]
Resolve = Callable[[_Schema], _Schema]
"""The schema that a `$ref` points at, for a schema that is only that; else the schema itself."""

_EXCLUSIVE_FORMATS = frozenset({"date-time", "time", "date", "ipv4", "ipv6", "uuid", "email"})
"""No text has two of these formats."""
MAX_ALTERNATIVES = 64
_MAX_DEPTH = 4


def exclude_each_other(alternatives: Any, resolve: Resolve) -> bool:
    """Whether no value can follow two of them. False where that is not plain: `oneOf` stays what it is."""
    if not isinstance(alternatives, list) or len(alternatives) > MAX_ALTERNATIVES:
        return False
    return all(
        _exclude(first, second, resolve, _MAX_DEPTH)
        for index, first in enumerate(alternatives)
        for second in alternatives[:index]
    )


def _exclude(first: Any, second: Any, resolve: Resolve, depth: int) -> bool:
    if not isinstance(first, dict) or not isinstance(second, dict) or not depth:
        return False
    first, second = resolve(first), resolve(second)
    values, others = _values(first), _values(second)
    if values is not None and others is not None:
        return not values & others
    kinds, other_kinds = _types(first), _types(second)
    if kinds and other_kinds and not kinds & other_kinds:
        return True
    if kinds == other_kinds == {"string"}:
        return first.get("format") != second.get("format") and _EXCLUSIVE_FORMATS.issuperset(
            str(schema.get("format")) for schema in (first, second)
        )
    if kinds == other_kinds == {"object"}:
        return any(
            _exclude(first["properties"][name], second["properties"][name], resolve, depth - 1)
            for name in _required(first) & _required(second)
        )
    return False


def _values(schema: _Schema) -> frozenset[str] | None:
    """The values that are allowed, as JSON text; None where they are not listed. Numbers may be written in two ways."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or any(isinstance(value, (float, list, dict)) for value in listed):
        return None
    return frozenset(json.dumps(value) for value in listed)


def _types(schema: _Schema) -> frozenset[str]:
    """The types that are named; an integer is a number too."""
    given = schema.get("type")
    named = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return frozenset("number" if name == "integer" else str(name) for name in named)


def _required(schema: _Schema) -> frozenset[str]:
    """Names that every value has, and that have a schema."""
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list) or not isinstance(properties, dict):
        return frozenset()
    return frozenset(name for name in required if isinstance(name, str) and name in properties)
