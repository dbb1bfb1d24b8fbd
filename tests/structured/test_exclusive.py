from __future__ import annotations

from typing import Any

import pytest

from rayllm.structured.exclusive import MAX_ALTERNATIVES, exclude_each_other


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ([{"const": "a"}, {"const": "b"}], True),
        ([{"enum": ["a", 1]}, {"enum": [1, "b"]}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"type": "string"}, {"type": ["object", "null"]}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}], True),
        ([{"type": "string", "format": "uri"}, {"type": "string", "format": "ipv6"}], False),
        ([_object(kind={"const": "a"}, x={}), _object(kind={"const": "b"}, x={})], True),
        ([_object(kind={"const": "a"}), _object(other={"const": "b"})], False),
        ([{}, {"type": "string"}], False),
        ([{"const": number} for number in range(MAX_ALTERNATIVES)], True),
        ([{"const": number} for number in range(MAX_ALTERNATIVES + 1)], False),
        ("no list", False),
    ],
)
def test_only_alternatives_that_no_value_can_share_exclude_each_other(alternatives: Any, expected: bool) -> None:
    assert exclude_each_other(alternatives, lambda schema: schema) == expected


def test_references_are_followed() -> None:
    named = {"A": {"const": "a"}, "B": {"const": "b"}}
    references = [{"$ref": "A"}, {"$ref": "B"}]
    assert exclude_each_other(references, lambda schema: named.get(schema.get("$ref", ""), schema))
