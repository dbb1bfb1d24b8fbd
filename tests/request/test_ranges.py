from __future__ import annotations

import pytest

from rayllm.request.ranges import check_int, check_number


def test_the_bounds_themselves_are_allowed() -> None:
    for value in (0, 0.5, 1):
        check_number("top_p", value, 0, 1)
    for count in (1, 3):
        check_int("n", count, 1, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"^top_p=1.5 is outside \(0, 1\]; 1 is off$"),
        (0, r"^top_p=0 is outside \(0, 1\]; 1 is off$"),
        (float("nan"), r"^top_p=nan is outside"),
        (True, r"^top_p must be a number, got True$"),
        ("1", r"^top_p must be a number, got '1'$"),
    ],
)
def test_a_number_outside_names_field_value_range_and_hint(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_number("top_p", value, 0, 1, low_open=True, hint="; 1 is off")


@pytest.mark.parametrize(
    ("value", "message"), [(4, r"^n=4 is outside \[1, 3\]$"), (2.0, "^n must be an integer, got 2.0$")]
)
def test_an_integer_outside_names_field_value_and_range(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_int("n", value, 1, 3)
