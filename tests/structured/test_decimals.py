from __future__ import annotations

import decimal
import itertools
import re
from typing import Annotated, Any

import pydantic
import pytest

from rayllm.structured.decimals import decimal_pattern

_TEXTS = ["".join(parts) for n in range(7) for parts in itertools.product("0.-7", repeat=n)]


def _patterns(**limits: Any) -> list[str]:
    """What Pydantic writes for a decimal with these limits."""
    kind: Any = Annotated[decimal.Decimal, pydantic.Field(**limits)]
    schema = pydantic.TypeAdapter(kind).json_schema()
    return [part["pattern"] for part in schema.get("anyOf", [schema]) if "pattern" in part]


@pytest.mark.parametrize(
    "limits", [{}, {"decimal_places": 2}, {"max_digits": 4}, {"max_digits": 4, "decimal_places": 2}]
)
def test_every_match_is_one_of_pydantics_pattern_and_a_decimal(limits: dict[str, int]) -> None:
    for pattern in _patterns(**limits):
        found = decimal_pattern(pattern)
        assert found is not None, pattern
        matches = [text for text in _TEXTS if re.search(found, text)]
        assert len(matches) > 10
        for text in matches:
            assert re.search(pattern, text), (pattern, found, text)
            decimal.Decimal(text)


def test_other_patterns_are_left_alone() -> None:
    assert decimal_pattern(r"^\d+$") is None
    assert decimal_pattern("") is None
